#!/usr/bin/env bash
# The first hour on a machine with a GPU in one command: compiled kernels tested and timed, an iteration taken apart, the `small`
# comparison, and all that they said in one archive to send along with a report of what is wrong.
#
#   DATA=minillm-data bash scripts/first_hour.sh OUT [--smoke] [--dry-run]
#
# A stage that has ended well is skipped, so the same command continues; one that fails does not keep the others from running, and
# stands in the archive. Weights, data and answers stay out of it; logs name folders of this machine.
#
#   --smoke   the smallest of everything, in a minute on a CPU and without timing a kernel: whether the command works
#   DATA      folder with dolly/train.jsonl, as of scripts/recipes/paper.sh; without it the `small` comparison is left out
#   PYTHON    default: python3
set -uo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
out=$1 smoke= dry= failed=()
for word in "${@:2}"; do
    case $word in
        --smoke) smoke=yes ;;
        --dry-run) dry=yes ;;
        *) echo "error: $word is unknown; there are --smoke and --dry-run" >&2; exit 2 ;;
    esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} scripts=$root/scripts
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -z $dry ]]; then mkdir -p "$out/logs" "$out/done" || exit 2; fi
source "$scripts/recipes/stages.sh"

ended_well() {  # NAME COMMAND...: the command, and a mark when it ends well
    "${@:2}" && touch "$out/done/$1"
}

try() {  # NAME COMMAND...: a stage, after whose failure the others go on
    if ! (stage "$1" "$out/done/$1" ended_well "$@"); then failed+=("$1"); fi
}

machine() {  # device, driver, versions, commit
    "$python" -m torch.utils.collect_env
    "$python" -m pip list --format=freeze
    git -C "$root" log -1 --format='commit %H %cI' 2> /dev/null || echo "commit unknown: no git repository"
    git -C "$root" status --short 2> /dev/null
    return 0
}

try machine machine
if [[ -n $smoke ]]; then
    tests=("$root/tests/kernel_tests/test_cross_entropy.py") kernels=(--device cpu --threads 1 --limit 0)  # a case compiles for minutes
    iteration=(--student-layers 1 --student-hidden 64 --teacher-layers 1 --teacher-hidden 64 --vocab-size 512 --max-length 16
               --max-prompt-length 8 --mbs 2 --gbs 2 --repetitions 1 --measure iteration)
    recipe=(tiny "$out/tiny" --dry-run)
else
    tests=("$root/tests/kernel_tests" -m "not slow") kernels=(--seconds 0.4) iteration=(--preset gpt2-base --measure iteration memory)
    recipe=(small "$out/small")
fi
try kernel_tests "$python" -m pytest "${tests[@]}"
if [[ -z $smoke ]]; then try captured_steps "$python" -m pytest "$root/tests/test_generation.py" -k captured_step_gives; fi
try benchmark_kernels "$python" "$scripts/benchmark_kernels.py" "${kernels[@]}" --out "$out/kernels"
try benchmark "$python" "$scripts/benchmark.py" "${iteration[@]}" --out "$out/iteration"
if [[ -n $smoke || -n ${DATA:-} ]]; then
    try recipe bash "$scripts/recipes/paper.sh" "${recipe[@]}"
else
    echo "== recipe: left out; DATA=folder that holds dolly/train.jsonl runs it"
fi
if [[ -n $dry ]]; then exit 0; fi

printf '%s\n' "${failed[@]:-none}" > "$out/failed.txt"
archive=$out/first_hour.tar.gz
(cd "$out" && find . -type f -size -4M \( -name '*.log' -o -name '*.txt' -o -name '*.csv' -o -name '*.png' -o -name '*.md' \
    -o -name metrics.jsonl -o -name config.yaml -o -name results.json \) -not -path './small/data/*' -print0 \
    | sort -z | tar --null -T - -czf first_hour.tar.gz) || exit 1
echo "== $archive: ${#failed[@]} of the stages failed${failed[*]:+ (${failed[*]})}"
[[ ${#failed[@]} == 0 ]]
