#!/usr/bin/env bash
# Merge a checkpoint of layer 11 with one of layer 13, and verify the result.
#
#   examples/merge_layer11_layer13.sh LAYER11 LAYER13 [OUTPUT]
#
# LAYER11 and LAYER13 are checkpoints, or folders of runs, whose newest checkpoint is used.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "usage: $0 LAYER11 LAYER13 [OUTPUT]" >&2
  exit 2
fi

# Prints the path of a checkpoint, or of the checkpoint with the highest step in a run. Steps are
# compared as numbers, so that checkpoint-10000 comes after checkpoint-9000.
latest() {
  local run=$1 found
  if compgen -G "$run/*npt_weights*" >/dev/null || [ -f "$run" ]; then
    printf '%s\n' "$run"
    return
  fi
  found=$(find "$run" -mindepth 1 -maxdepth 2 -type d -name 'checkpoint-[0-9]*' 2>/dev/null |
    sed 's/^\(.*checkpoint-\)\([0-9]*\)$/\2 \1\2/' | sort -n | tail -n 1 | cut -d' ' -f2-)
  if [ -z "$found" ]; then
    echo "$run: neither a checkpoint nor a run with checkpoint-N folders" >&2
    exit 1
  fi
  printf '%s\n' "$found"
}

layer11=$(latest "$1")
layer13=$(latest "$2")
output=${3:-experiments/merged_layer11_13}

npt-fast analyze --checkpoint "$layer11" "$layer13"
npt-fast merge --checkpoints "$layer11" "$layer13" --output "$output" --verify
