#!/bin/bash
# Checks a configuration here, then submits it, so that no job waits in the queue for a misspelt path:
#   experiments/cluster/submit.sh [OPTIONS OF sbatch, such as --nodes=2] fit --config experiments/...
set -euo pipefail
options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
done

python -m lit_defect check "${@:2}"
sbatch "${options[@]}" "$(dirname "$0")/run.sbatch" "$@"
