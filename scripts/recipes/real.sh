#!/usr/bin/env bash
# A real model in one command: SmolLM2-135M-Instruct teaches ten of its own thirty layers to answer MiniLLM's Dolly prompts. SFT, KD, SeqKD,
# MiniLLM, on-policy KD, PromptKD and PromptKD with a text for the teacher begin with the same healed student and take as many steps;
# scores, table, figures, answers side by side.
#
#   DATA=minillm-data bash scripts/recipes/real.sh OUT [--dry-run]
#
# The model comes by pip (scripts/get_model.py). --dry-run prints every command and does nothing. A stage whose result is there is skipped,
# so the same command continues; one cut off continues where it saved.
#
#   DATA       folder with dolly/{train,dev,valid}.jsonl and, as far as at hand, self-inst and vicuna
#   SCALE      a folder of configs/real/: cpu (default; two cores, two hours), gpu (one, minutes), smoke (that it runs)
#   TEACHER    another Hugging Face folder with a chat template; LAYERS of it are the student's, "0 2 4", default: the scale's own
#   WIKITEXT   a text file: loss on its paragraphs is scored too
#   JOBS       stages that need nothing of each other at a time; default: the scale's own, cpu: 2, a core each
#   RANKS      processes; default: the scale's own number
#   PYTHON     default: python3
set -uo pipefail

if [[ $# -lt 1 ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
out=$1 scale=${SCALE:-cpu} dry=
if [[ ${2:-} == --dry-run ]]; then dry=yes DATA=${DATA:-DATA}; fi
root=$(cd "$(dirname "$0")/../.." && pwd)
recipes=$root/scripts/recipes configs=$root/configs/real/$scale python=${PYTHON:-python3}
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ! -f $configs/scale.yaml ]]; then
    echo "error: SCALE=$scale: configs/real/ has $(cd "$root/configs/real" && dirname */scale.yaml | xargs)" >&2
    exit 2
fi
: "${DATA:?is not set; name the folder that holds dolly/train.jsonl}"
setting() { sed -n "s/^$1: *\([^#]*[^# ]\).*/\1/p" "$configs/scale.yaml"; }
ranks=${RANKS:-$(setting ranks)} jobs=${JOBS:-$(setting jobs)} layers=${LAYERS:-$(setting layers)} teacher=${TEACHER:-$out/teacher}
methods=(sft kd seqkd minillm on_policy_kd promptkd promptkd_primed)
if [[ -z $dry ]]; then mkdir -p "$out/logs" || exit 2; fi
launch=("$python")
if ((ranks > 1)); then launch+=(-m torch.distributed.run --standalone --nproc_per_node "$ranks"); fi
source "$recipes/stages.sh"

train() {  # NAME MODEL FLAGS...
    stage "$1" "$out/$1/hf" "${launch[@]}" "$root/scripts/pretrain_kd.py" --config "$configs/train.yaml" --model "$2" \
        --train-data "$out/data/train.jsonl" --valid-data "$out/data/valid.jsonl" --save "$out/$1" "${@:3}"
}

distil() {  # METHOD-SEED: the healed student, for as many steps as every other; who learns nothing but its own text, by shorter ones
    local method=${1%-*} flags=(--seed "${1##*-}")
    case $method in
        sft) flags+=(--method sft) ;;
        kd) flags+=(--method kd --kd-ratio 0.5) ;;
        seqkd) flags+=(--method seqkd) ;;
        minillm) flags+=(--method minillm --ppo-epochs 2 --num-rollouts "$(setting num_rollouts)") ;;
        on_policy_kd) flags+=(--method kd --on-policy-ratio 1 --kd-ratio 1 --kd-objective reverse_kl --lr "$(setting on_policy_lr)") ;;
        promptkd) flags+=(--method promptkd --lr "$(setting on_policy_lr)" --teacher-lr "$(setting prompt_lr)") ;;
        promptkd_primed) flags+=(--method promptkd --lr "$(setting on_policy_lr)" --teacher-lr "$(setting prompt_lr)" --teacher-priming ground-truth) ;;
    esac
    if [[ $method != sft ]]; then flags+=(--teacher-model "$teacher"); fi
    train "$1" "$out/healed/hf" "${flags[@]}"
}

evaluate() {  # NAME MODEL FLAGS...
    stage "evaluate_$1" "$out/evaluation/$1/results.json" "${launch[@]}" "$root/scripts/evaluate.py" --config "$configs/evaluate.yaml" \
        --model "$2" --data "$out"/data/test/*.jsonl --save "$out/evaluation/$1" "${@:3}"
}

compare() {  # NAME: a student beside the teacher
    evaluate "$1" "$out/$1/hf" --teacher-model "$teacher"
}

report() { "$python" "$recipes/report_real.py" --out "$out" --scale "$scale" "$@"; }

if [[ -z ${TEACHER:-} ]]; then stage teacher "$teacher" "$python" "$root/scripts/get_model.py" smollm2-135m --save "$teacher"; fi
stage data "$out/data" "$python" "$recipes/prepare_real.py" --configs "$configs" --data "$DATA" --out "$out/data" ${WIKITEXT:+--wikitext "$WIKITEXT"}
stage pruned "$out/pruned" "$python" "$root/scripts/make_student.py" --model "$teacher" --layers $layers --save "$out/pruned"
train healed "$out/pruned" --method sft --train-iters "$(setting heal_iters)" --lr "$(setting heal_lr)"
each distil "${methods[@]/%/-10}"
evaluate teacher "$teacher" --no-exposure-bias
each compare healed "${methods[@]/%/-10}"
if [[ -n $dry ]]; then exit; fi
mapfile -t again < <(report --best "$(setting again)")
each distil "${again[@]/%/-20}"
each compare "${again[@]/%/-20}"
report --commit "$(git -C "$root" describe --always --dirty 2>/dev/null || echo "${COMMIT:-unknown}")"
cat "$out/report/table.md"
