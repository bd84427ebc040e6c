#!/usr/bin/env bash
# Builds Dockerfile.npu and Dockerfile.cuda but for the vendors' parts: on the base image of Dockerfile instead of CANN's,
# with torch's CPU build and without torch-npu. Then runs each as compose does, unprivileged and read-only: `doctor
# --device` there has to end with its report and `no_driver`. Prints SKIP and exits 0 where no engine answers.
#
# ELASTICMOE_PYTHON_IMAGE: the base (default python:3.11-slim-bookworm). ELASTICMOE_BUILD_NETWORK: of the builds.
set -euo pipefail
cd "$(dirname "$0")/.."

BUILD_S=1800
RUN_S=300

skip() { echo "SKIP: $*"; exit 0; }
fail() { echo "FAIL: $*" >&2; exit 1; }
step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

command -v docker >/dev/null || skip "there is no docker command"
timeout 20 docker info >/dev/null 2>&1 || skip "no container engine answers"

base=${ELASTICMOE_PYTHON_IMAGE:-python:3.11-slim-bookworm}
index=https://download.pytorch.org/whl/cpu
if docker image inspect --format '{{.Config.Env}}' "$base" 2>/dev/null | grep -q PIP_FIND_LINKS; then
  index="" # the base brings wheels of its own
fi
torch=$(sed -n 's/^TORCH := torch==//p' Makefile) # the one that we develop with: a CPU build is there
work=$(mktemp -d)
images=()
cleanup() {
  [ "${#images[@]}" -eq 0 ] || docker image rm --force "${images[@]}" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

for kind in npu cuda; do
  image=elasticmoe:$kind-test-$$
  step "building $image"
  DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} timeout "$BUILD_S" docker build --file "Dockerfile.$kind" --tag "$image" \
    --network "${ELASTICMOE_BUILD_NETWORK:-default}" --build-arg "CANN_IMAGE=$base" --build-arg "PYTHON_IMAGE=$base" \
    --build-arg "TORCH=$torch" --build-arg TORCH_NPU= --build-arg "TORCH_INDEX=$index" . >"$work/build.log" 2>&1 ||
    { tail -50 "$work/build.log" >&2; fail "the build of Dockerfile.$kind"; }
  images+=("$image")
  step "built: $(docker image inspect --format '{{.Size}}' "$image" | awk '{printf "%.0f MB", $1 / 1e6}')"
  status=0
  timeout "$RUN_S" docker run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges:true \
    --tmpfs /tmp:size=64m,mode=1777,noexec,nosuid,nodev "$image" \
    elasticmoe doctor --device "$kind" --json --report /tmp/report.json >"$work/report.json" 2>"$work/run.log" || status=$?
  [ "$status" -eq 1 ] || { cat "$work/run.log" >&2; fail "doctor in $image ended with status $status"; }
  grep -q '"text": *"no_driver: ' "$work/report.json" || { cat "$work/report.json" >&2; fail "doctor in $image"; }
  step "doctor says no_driver there, in a report"
done
echo "PASS in $SECONDS s"
