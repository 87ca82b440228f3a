#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains on a Cloud TPU pod, or on several joined by the data-centre network.
#
#   export PROJECT=my-project ZONE=us-west4-a NAME=run1 TYPE=v5litepod-16
#   launch/tpu_vm.sh create            ask for the chips, wait until they are there
#   launch/tpu_vm.sh install           copy this folder to all hosts, install
#   launch/tpu_vm.sh run train --config=configs/demo.py --workdir=gs://BUCKET/run1
#   launch/tpu_vm.sh resume train ...  the three, again and again until it is done
#   launch/tpu_vm.sh stop              SIGTERM: all hosts save and end
#   launch/tpu_vm.sh delete
#
# --dry-run as the first word prints the commands instead. Also read: SPOT=1
# (cheaper, may be taken away), SLICES=2 (pods), VERSION (of the runtime).
# Logs of all hosts come back; what process 0 prints is the run's.
set -euo pipefail

dry=""
if [[ "${1:-}" == "--dry-run" ]]; then
  dry=yes
  shift
fi
command="${1:-help}"
shift || true

fail() {
  echo "error: $*" >&2
  exit 2
}

call() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

SLICES="${SLICES:-1}"

runtime() {
  case "$TYPE" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE: set VERSION to its runtime, for instance tpu-ubuntu2204-base" ;;
  esac
}

nodes() {
  if [[ "$SLICES" == 1 ]]; then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

queued() {
  local verb="$1"
  shift
  call gcloud compute tpus queued-resources "$verb" "$NAME" \
    "--project=$PROJECT" "--zone=$ZONE" "$@"
}

# State of the request: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ... or NONE.
state() {
  gcloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" \
    "--zone=$ZONE" "--format=value(state.state)" 2>/dev/null || echo NONE
}

on_all_hosts() {
  local command="$1" node pid pids=()
  local status=0
  for node in $(nodes); do
    set -- gcloud compute tpus tpu-vm ssh "$node" "--project=$PROJECT" \
      "--zone=$ZONE" --worker=all "--command=$command"
    if [[ -n "$dry" ]]; then
      call "$@"
    else
      "$@" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=$?; done
  return $status
}

create() {
  local version="${VERSION:-}"
  [[ -n "$version" ]] || version="$(runtime)"
  local more=("--accelerator-type=$TYPE" "--runtime-version=$version")
  if [[ "$SLICES" == 1 ]]; then
    more+=("--node-id=$NAME")
  else
    more+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [[ -n "${SPOT:-}" ]] && more+=(--spot)
  queued create "${more[@]}"
  [[ -n "$dry" ]] && return
  until [[ "$(state)" == ACTIVE ]]; do
    case "$(state)" in FAILED | SUSPENDED | NONE) fail "the request is $(state)" ;; esac
    sleep 30
  done
}

install() {
  local node archive=runs/spatial_jax.tar.gz
  call mkdir -p runs
  call git archive --format=tar.gz "--output=$archive" HEAD
  for node in $(nodes); do
    call gcloud compute tpus tpu-vm scp "$archive" "$node:" \
      "--project=$PROJECT" "--zone=$ZONE" --worker=all
  done
  on_all_hosts "mkdir -p spatial_jax && tar -xzf spatial_jax.tar.gz -C spatial_jax \
&& cd spatial_jax && python3 -m venv .venv \
&& .venv/bin/python -m pip install -q -c constraints.txt -e '.[tpu]'"
}

# The same command starts a run and goes on with it.
run() {
  [[ $# -gt 0 ]] || fail "run what? for instance: run train --config=configs/demo.py --workdir=gs://BUCKET/NAME"
  [[ "$*" == *"--workdir=gs://"* ]] || fail "--workdir must be a bucket, gs://BUCKET/NAME: hosts share it, and it outlives them"
  local verb="$1"
  shift
  on_all_hosts "cd spatial_jax && echo \$\$ > run.pid && exec .venv/bin/python -m spatial_jax $verb --multihost $(printf '%q ' "$@")"
}

resume() {
  local tries=0
  until run "$@"; do
    tries=$((tries + 1))
    [[ $tries -lt ${TRIES:-100} ]] || fail "still failing after $tries tries"
    echo "try $tries ended; the request is $(state)" >&2
    case "$(state)" in
      ACTIVE) sleep 10 ;;
      *)
        queued delete --force --quiet || true
        create
        install
        ;;
    esac
  done
}

[[ "$command" == help ]] && exec sed -n '4,17s/^# \{0,1\}//p' "$0"
for name in PROJECT ZONE NAME TYPE; do
  [[ -n "${!name:-}" ]] || fail "$name is not set; see the head of $0"
done
case "$command" in
  create) create ;;
  install) install ;;
  run) run "$@" ;;
  resume) resume "$@" ;;
  stop) on_all_hosts "kill -TERM \$(cat spatial_jax/run.pid)" ;;
  delete) queued delete --force --quiet ;;
  *) fail "unknown command $command; one of create, install, run, resume, stop, delete" ;;
esac
