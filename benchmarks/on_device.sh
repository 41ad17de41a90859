#!/usr/bin/env bash
# Measures on an accelerator, stage by stage: bash benchmarks/on_device.sh [--size=debug] [--output=DIR] [STAGE ...]
# A stage has a process and a time limit of its own, so none can take the time of the next; what a stage has measured
# lies in OUTPUT/STAGE.jsonl line by line. All stages: at most 25 minutes.
set -u
options=()
stages=()
for argument in "$@"; do
  case "$argument" in
    --*) options+=("$argument") ;;
    *) stages+=("$argument") ;;
  esac
done
if [ "${#stages[@]}" -eq 0 ]; then
  stages=(kernels matmuls step layer peer)
fi
# XLA takes three quarters of a GPU's memory by itself; whole models of 3 billion parameters need more.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}"
export PYTHONUNBUFFERED=1
declare -A limit=([kernels]=150 [matmuls]=240 [step]=600 [layer]=180 [peer]=300 [profile]=120)
for stage in "${stages[@]}"; do
  timeout "${limit[$stage]}" python3 -m benchmarks.on_device "$stage" ${options[@]+"${options[@]}"}
  status=$?
  if [ "$status" -ne 0 ]; then
    echo "$stage: ended with $status; what it had measured is kept"
  fi
done
