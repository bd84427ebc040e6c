#!/bin/bash
# Runs a command with CANN's libraries and those of the driver on the loader's path, where the image has them.
driver=/usr/local/Ascend/driver/lib64
export LD_LIBRARY_PATH="$driver:$driver/driver:$driver/common${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
for file in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do
  if [ -r "$file" ]; then
    # shellcheck disable=SC1090
    . "$file"
    break
  fi
done
exec "$@"
