#!/usr/bin/env bash
# Runs compose.yaml for real: build, up, a streamed answer, the worker's container killed and started again, then the
# HMM's (the weights stay where they are), down, and nothing left over. Prints SKIP and exits 0 where no engine answers.
#
# ELASTICMOE_COMPOSE_MODEL: a checkpoint folder, or a name that `elasticmoe model list` knows (default tiny-mixtral).
# ELASTICMOE_COMPOSE_READY_S: seconds until it serves, or serves again (default 300).
# ELASTICMOE_COMPOSE_KEEP_IMAGE: use the image of this name as it is instead of building one.
set -euo pipefail
cd "$(dirname "$0")/.."

BUILD_S=1800
READY_S=${ELASTICMOE_COMPOSE_READY_S:-300}
ANSWER_S=120
DOWN_S=120
HARDENING='{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}'
HARDENING+=' {{.HostConfig.Privileged}} pid={{.HostConfig.PidMode}} ipc={{.HostConfig.IpcMode}}'

skip() { echo "SKIP: $*"; exit 0; }
fail() { echo "FAIL: $*" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

command -v docker >/dev/null || skip "there is no docker command"
timeout 20 docker info >/dev/null 2>&1 || skip "no container engine answers"
if timeout 20 docker compose version >/dev/null 2>&1; then
  compose_command=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose_command=(docker-compose)
else
  skip "there is neither docker compose nor docker-compose"
fi
for tool in curl python3; do command -v "$tool" >/dev/null || skip "there is no $tool"; done

project="elasticmoe-test-$$-$RANDOM"
work=$(mktemp -d)
services=(store keeper hmm worker scaler router)
label="label=com.docker.compose.project=$project"
compose() { "${compose_command[@]}" --project-name "$project" --file compose.yaml "$@"; }
compose_for() { # seconds, arguments: compose with a deadline
  local seconds=$1
  shift
  timeout "$seconds" "${compose_command[@]}" --project-name "$project" --file compose.yaml "$@"
}

# What the project has left: containers, volumes, networks. Nothing printed: nothing left.
leftovers() {
  docker ps --all --quiet --filter "$label"
  docker volume ls --quiet --filter "$label"
  docker network ls --quiet --filter "$label"
}

cleanup() {
  local status=$?
  trap - EXIT
  trap '' INT TERM
  set +e
  if [ "$status" -ne 0 ]; then
    echo "---- containers and logs ----" >&2
    compose ps >&2
    timeout 60 docker ps --all --filter "$label" --format '{{.Names}} {{.Status}}' >&2
    compose_for 60 logs --no-color --timestamps --tail=200 >&2
  fi
  step "taking everything down"
  compose_for "$DOWN_S" --profile monitoring down --volumes --remove-orphans >"$work/down.log" 2>&1
  if [ -n "$(leftovers)" ]; then
    cat "$work/down.log" >&2
    echo "FAIL: left over: $(leftovers | tr '\n' ' ')" >&2
    [ "$status" -ne 0 ] || status=1
  else
    step "no container, volume or network is left"
  fi
  rm -rf "$work"
  [ "$status" -ne 0 ] || echo "PASS in $SECONDS s"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Wait until a command succeeds: seconds, what is awaited, command...
await() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || fail "$what: not within the deadline"
    sleep 0.5
  done
}

has() { [ "$(docker inspect --format "$2" "$1")" = "$3" ]; } # container, template, value
container() { compose ps --quiet "$1"; }
incarnation() { docker inspect --format '{{.Id}} {{.State.StartedAt}} {{.RestartCount}}' "$(container "$1")"; }
num_loads() { compose_for 60 logs --no-color hmm | grep -c 'load done' || true; }
weights() { timeout "$ANSWER_S" docker exec --interactive "$(container hmm)" python - <deploy/weights.py; }

chat() { # one greedy answer, streamed; its tokens and their logprobs, one a line
  curl --no-buffer --silent --show-error --fail-with-body --max-time "$ANSWER_S" "$url/v1/chat/completions" \
    --header 'Content-Type: application/json' \
    --data '{"messages": [{"role": "user", "content": "Tell me about expert models."}], "stream": true,
             "temperature": 0, "max_tokens": 24, "ignore_eos": true, "logprobs": true}' |
    tee "$work/answer.txt" | python3 deploy/chat_tokens.py
}

await_chat() { # file, what is awaited: ask until an answer is whole, and leave its tokens in the file
  local deadline=$((SECONDS + READY_S))
  until chat >"$1" 2>"$work/chat.log"; do
    [ "$SECONDS" -lt "$deadline" ] || { cat "$work/chat.log" "$work/answer.txt" >&2; fail "$2"; }
    sleep 0.5
  done
  step "streamed $(cat "$work/chat.log")"
}

# ---- the image and a model -------------------------------------------------------------------------------------------

export ELASTICMOE_IMAGE=${ELASTICMOE_COMPOSE_KEEP_IMAGE:-elasticmoe:compose-test}
export ELASTICMOE_PORT=0 ELASTICMOE_ADMIN_PORT=0 # the engine chooses free ones
export ELASTICMOE_MODEL_DIR=$work/model
export ELASTICMOE_SERVED_NAME=compose-test
export ELASTICMOE_KV_BYTES=${ELASTICMOE_KV_BYTES:-67108864}
base=${ELASTICMOE_PYTHON_IMAGE:-python:3.11-slim-bookworm}
if docker image inspect --format '{{.Config.Env}}' "$base" 2>/dev/null | grep -q PIP_FIND_LINKS; then
  export ELASTICMOE_TORCH_INDEX="" # the base brings wheels of its own
fi

if [ -z "${ELASTICMOE_COMPOSE_KEEP_IMAGE:-}" ]; then
  step "building the image"
  compose_for "$BUILD_S" build init >"$work/build.log" 2>&1 || { tail -50 "$work/build.log" >&2; fail "the build"; }
fi
step "image $(docker image inspect --format '{{.Size}}' "$ELASTICMOE_IMAGE" | awk '{printf "%.0f MB", $1 / 1e6}')"

model=${ELASTICMOE_COMPOSE_MODEL:-tiny-mixtral}
if [ -d "$model" ]; then
  ELASTICMOE_MODEL_DIR=$(cd "$model" && pwd)
else
  step "making model $model"
  timeout "$BUILD_S" docker run --rm --network none --user "$(id -u):$(id -g)" --volume "$work:/out" \
    "$ELASTICMOE_IMAGE" elasticmoe model make "$model" /out/model >/dev/null || fail "model $model"
  chmod -R a+rX "$work"
fi

# ---- up --------------------------------------------------------------------------------------------------------------

step "starting the containers"
compose_for "$READY_S" up --detach --no-build >"$work/up.log" 2>&1 || { cat "$work/up.log" >&2; fail "up"; }
url=http://$(compose port router 8000)
admin=http://$(compose port scaler 8100)
await "$READY_S" "the router's /ready" curl --silent --fail --max-time 5 "$url/ready"
await "$READY_S" "the scaler's /ready" curl --silent --fail --max-time 5 "$admin/ready"
step "ready at $url"

for name in "${services[@]}"; do
  found=$(docker inspect --format "$HARDENING" "$(container "$name")")
  [ "$found" = "10001:10001 true [ALL] [no-new-privileges:true] false pid= ipc=private" ] || fail "$name has: $found"
done
step "containers are unprivileged, read-only and have pid and ipc namespaces of their own"

secrets_of() { docker exec "$(container "$1")" ls -1 /run/elasticmoe/secrets | tr '\n' ' '; }
[ "$(secrets_of router)" = "store-reader.password " ] || fail "the router knows: $(secrets_of router)"
[ "$(secrets_of scaler)" = "admin.token store.password " ] || fail "the scaler knows: $(secrets_of scaler)"
for name in keeper hmm worker; do
  [ -z "$(secrets_of "$name")" ] || fail "$name knows: $(secrets_of "$name")"
done
for name in "${services[@]}"; do
  docker inspect --format '{{.HostConfig.NanoCpus}} {{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}' \
    "$(container "$name")" | grep --quiet -E '^[1-9][0-9]* [1-9][0-9]* [1-9][0-9]*$' || fail "$name has no limits"
done
step "each container knows its own secrets alone, and has limits of cores, memory and processes"

[ "$(curl --silent --output /dev/null --write-out '%{http_code}' --max-time 10 "$admin/v1/layout")" = 401 ] ||
  fail "the admin listener answers without a token"
token=$(docker exec "$(container scaler)" cat /run/elasticmoe/secrets/admin.token)
curl --silent --fail --max-time 10 --header "Authorization: Bearer $token" "$admin/v1/layout" >"$work/layout.json" ||
  fail "the admin listener refuses the token"

# The page's files are those of the installed package.
curl --silent --fail --max-time 10 "$admin/" >"$work/page.html" || fail "the web page"
files=$(grep -oE '(src|href)="/page/[^"]+"' "$work/page.html" | cut -d'"' -f2)
[ -n "$files" ] || fail "the web page names no file"
for file in $files /page/views/now.js; do
  curl --silent --fail --max-time 10 --output /dev/null "$admin$file" || fail "the web page's $file"
done
step "the web page is served with its $(wc -w <<<"$files") files"

# ---- the profile `monitoring` ----------------------------------------------------------------------------------------

# Prometheus' own image, or the distribution's package on the base image where that cannot be pulled.
watched=${ELASTICMOE_PROMETHEUS_IMAGE:-$(compose --profile monitoring config | sed -n 's/^ *image: *//p' | grep prometheus || true)}
if [ -z "$watched" ] || ! docker image inspect "$watched" >/dev/null 2>&1 && ! timeout 120 docker pull "$watched" >/dev/null 2>&1; then
  watched=elasticmoe-prometheus:compose-test
  printf '%s\n' "FROM $base" 'USER root' \
    'RUN apt-get update && apt-get install --yes --no-install-recommends prometheus' \
    'ENTRYPOINT ["/usr/bin/prometheus"]' |
    timeout 300 docker build --tag "$watched" - >"$work/prometheus.log" 2>&1 || watched=""
fi
if [ -n "$watched" ]; then
  export ELASTICMOE_PROMETHEUS_IMAGE=$watched
  compose_for "$READY_S" --profile monitoring up --detach --no-build prometheus >"$work/prometheus.log" 2>&1 ||
    { cat "$work/prometheus.log" >&2; fail "Prometheus"; }
  watches() { timeout 20 docker exec --interactive "$(container scaler)" python - <deploy/watched.py; }
  await 120 "Prometheus scrapes router and scaler" watches
  step "Prometheus scrapes both listeners and knows the alerts"
else
  echo "NOT RUN: the profile monitoring: no image of Prometheus can be had: $(tail -1 "$work/prometheus.log")"
fi

# ---- an answer, a dead worker, the same answer -----------------------------------------------------------------------

await_chat "$work/before.txt" "a first answer"
weights >"$work/weights.before" || fail "the HMM's checksums"
step "the HMM holds $(grep -c / "$work/weights.before") records: $(head -1 "$work/weights.before")"
hmm_before=$(incarnation hmm)
[ "$(num_loads)" = 1 ] || fail "the HMM loaded $(num_loads) times"

worker=$(container worker)
worker_before=$(incarnation worker)
docker kill --signal KILL "$worker" >/dev/null
await 30 "the worker's end" has "$worker" '{{.State.Running}}' false
step "killed the worker's container"
docker start "$worker" >/dev/null
await_chat "$work/after.txt" "an answer after the worker's death"

[ "$(incarnation worker)" != "$worker_before" ] || fail "the worker was not started again"
cmp "$work/before.txt" "$work/after.txt" >&2 || fail "the greedy answer changed"
weights >"$work/weights.after" || fail "the HMM's checksums after the worker's death"
diff "$work/weights.before" "$work/weights.after" >&2 || fail "the weights changed"
[ "$(incarnation hmm)" = "$hmm_before" ] || fail "the HMM is another one"
[ "$(num_loads)" = 1 ] || fail "the HMM loaded $(num_loads) times"
await "$READY_S" "the scaler's /ready after the worker's death" curl --silent --fail --max-time 5 "$admin/ready"
step "the HMM lived on: one load, equal checksums, the same greedy answer"

# ---- a dead HMM: ranks go on, its successor takes over what the keeper holds -----------------------------------------

hmm=$(container hmm)
docker kill --signal KILL "$hmm" >/dev/null
await 30 "the HMM's end" has "$hmm" '{{.State.Running}}' false
await_chat "$work/without.txt" "an answer without the HMM"
cmp "$work/before.txt" "$work/without.txt" >&2 || fail "the greedy answer changed without the HMM"
docker start "$hmm" >/dev/null
await "$READY_S" "the HMM's return" weights
weights >"$work/weights.adopted" || fail "the checksums after the HMM's death"
diff "$work/weights.before" "$work/weights.adopted" >&2 || fail "the weights changed with the HMM's death"
[ "$(num_loads)" = 1 ] || fail "the HMM loaded $(num_loads) times"
await "$READY_S" "the scaler's /ready after the HMM's death" curl --silent --fail --max-time 5 "$admin/ready"
step "killed and started the HMM: an answer meanwhile, still one load, equal checksums"

for name in "${services[@]}"; do
  await 60 "$name's health" has "$(container "$name")" '{{.State.Health.Status}}' healthy
done
step "all containers are healthy"

compose_for "$DOWN_S" stop >"$work/stop.log" 2>&1 || { cat "$work/stop.log" >&2; fail "stop"; }
for name in "${services[@]}"; do
  id=$(docker ps --all --quiet --filter "$label" --filter "label=com.docker.compose.service=$name")
  has "$id" '{{.State.ExitCode}}' 0 || fail "$name did not end with exit status 0 when it was asked to stop"
done
step "all containers stopped when asked, with exit status 0"
