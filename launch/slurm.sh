#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains on the GPUs of several Slurm nodes, one process for each GPU.
#
#   sbatch --nodes=4 launch/slurm.sh train --config=configs/demo.py --workdir=DIR
#   launch/slurm.sh --dry-run train ...     prints what each task would run
#
# DIR must be on a file system that all nodes see. Two minutes before its time is
# over, or when it is preempted, the job gets SIGTERM: all processes save, and the
# job queues again and goes on from there. PYTHON is the interpreter.
#SBATCH --job-name=spatial_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail

dry=""
if [[ "${1:-}" == "--dry-run" ]]; then
  dry=yes
  shift
fi
if [[ $# -eq 0 || "$*" != *--workdir=* ]]; then
  echo "error: give a command and its options, for instance: $0 train --config=configs/demo.py --workdir=DIR" >&2
  exit 2
fi
verb="$1"
shift

# jax reads from Slurm who is who; each task sees its own GPU. A lost node ends
# the others instead of leaving them to wait.
set -- srun --kill-on-bad-exit=1 --gpus-per-task=1 --gpu-bind=none \
  "${PYTHON:-.venv/bin/python}" -m spatial_jax "$verb" --multihost "$@"
if [[ -n "$dry" ]]; then
  printf '%q ' "$@"
  echo
  exit
fi
status=0
"$@" || status=$?
# Told to stop (143) or a node was lost: once more, from the last checkpoint.
if [[ $status -ne 0 && $status -ne 2 && "${SLURM_RESTART_COUNT:-0}" -lt 100 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
