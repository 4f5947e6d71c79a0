#!/bin/bash
# Checks a study here, then submits it stage by stage, each as an array behind the one before, and last its report:
#   experiments/cluster/study.sh [OPTIONS OF sbatch, such as --gres=gpu:h100:1] FILE [--runs_dir FOLDER]
# The same command again does what is left.
set -euo pipefail
here=$(dirname "$0")
options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
done

python -m lit_defect study "$@" --dry_run >/dev/null
after=()
while IFS== read -r _ numbers; do # from lines such as "stage 1: --array=2-11"
    # afterany: jobs whose needs are not met are left out by the study itself, the others run
    job=$(sbatch --parsable "${options[@]}" "${after[@]}" --array="$numbers" "$here/study.sbatch" "$@")
    echo "jobs $numbers: $job"
    after=(--dependency="afterany:$job")
done < <(python -m lit_defect study "$@" --list | grep '^stage .*--array=')
words=$(printf '%q ' "$@")
report=$(sbatch --parsable "${after[@]}" --job-name=report --wrap "python -m lit_defect study $words--report")
echo "report: $report"
