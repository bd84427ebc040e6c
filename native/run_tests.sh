#!/usr/bin/env bash
# Builds and runs the C++ unit tests: plain, with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer
# (without the tests that fork, which it does not follow). Usage: native/run_tests.sh [plain|asan|tsan ...]
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)

build() { # name, build type, sanitizers
  cmake -S . -B "build/native-$1" -G Ninja -DCMAKE_BUILD_TYPE="$2" -DELASTICMOE_TESTS=ON -DELASTICMOE_SANITIZE="$3" >/dev/null
  cmake --build "build/native-$1" --parallel "$jobs" -- --quiet
}

run() { # name, then ctest's options
  local name=$1
  shift
  echo "== $name"
  ctest --test-dir "build/native-$name/native" --output-on-failure --no-tests=error "$@"
}

variants=("$@")
[ ${#variants[@]} -gt 0 ] || variants=(plain asan tsan)
for variant in "${variants[@]}"; do
  case $variant in
    plain)
      build plain Release ""
      run plain
      ;;
    asan)
      build asan RelWithDebInfo "address,undefined"
      ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 run asan
      ;;
    tsan)
      build tsan RelWithDebInfo "thread"
      TSAN_OPTIONS=halt_on_error=1 run tsan -LE fork
      ;;
    *)
      echo "unknown variant: $variant (plain, asan, tsan)" >&2
      exit 2
      ;;
  esac
done
