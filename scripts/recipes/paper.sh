#!/usr/bin/env bash
# The comparison of the PromptKD paper in one command: teacher, SFT, KD, SeqKD, MiniLLM, PromptKD, scores, table, figures.
#
#   DATA=minillm-data bash scripts/recipes/paper.sh SCALE OUT [--dry-run]
#
# SCALE is a folder of configs/: tiny, small (both train from nothing), gpt2-base, gpt2-medium, gpt2-large, opt-1.3b, opt-2.7b,
# opt-6.7b, llama-7b. A stage whose result is there is skipped, so the same command continues; one cut off continues where it saved.
#
#   DATA                 folder with dolly/{train,dev,valid}.jsonl and, as far as at hand, self-inst, vicuna, sinst, uinst
#   PRETRAINED_TEACHER   Hugging Face folders of the models to start from (not for tiny and small)
#   PRETRAINED_STUDENT
#   TOKENIZER            tiny and small: a tokenizer's folder; default: one trained on the data
#   LM_DATA              text for MiniLLM's language-modelling loss; default: the training data
#   RANKS                processes; default: the scale's own number
#   PYTHON               default: python3
set -uo pipefail

if [[ $# -lt 2 ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
scale=$1 out=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
recipes=$root/scripts/recipes configs=$root/configs/$scale python=${PYTHON:-python3}
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ! -f $configs/scale.yaml ]]; then
    echo "error: SCALE $scale: configs/ has $(cd "$root/configs" && dirname */scale.yaml | xargs)" >&2
    exit 2
fi
if [[ ${3:-} == --dry-run ]]; then
    exec "$python" "$recipes/plan.py" --configs "$configs" --out "$out"
fi
: "${DATA:?is not set; name the folder that holds dolly/train.jsonl}"
ranks=${RANKS:-$(sed -n 's/^ranks: *//p' "$configs/scale.yaml")}
student=${PRETRAINED_STUDENT:-$out/data/student} teacher=${PRETRAINED_TEACHER:-$out/data/teacher}
models=(sft_teacher sft_student kd seqkd minillm promptkd)
mkdir -p "$out/logs" || exit 2

launch=("$python" -m torch.distributed.run --standalone --nproc_per_node "$ranks")
source "$recipes/stages.sh"

train() {  # NAME FLAGS...
    stage "$1" "$out/$1/hf" "${launch[@]}" "$root/scripts/pretrain_kd.py" --config "$configs/$1.yaml" \
        --train-data "$DATA/dolly/train.jsonl" --valid-data "$DATA/dolly/dev.jsonl" --save "$out/$1" "${@:2}"
}

student_of() {  # NAME: of a run the student with the best held-out Rouge-L, as in the papers; of a folder put in its place, what it has
    if [[ -e $out/$1/best ]]; then echo "$out/$1/best"; else echo "$out/$1/hf"; fi
}

evaluate() {  # NAME
    local compared=(--teacher-model "$(student_of sft_teacher)")
    if [[ $1 == sft_teacher ]]; then compared=(--no-exposure-bias); fi
    stage "evaluate_$1" "$out/evaluation/$1/results.json" "${launch[@]}" "$root/scripts/evaluate.py" --config "$configs/evaluate.yaml" \
        --model "$(student_of "$1")" "${compared[@]}" --data "$out"/data/test/*.jsonl --save "$out/evaluation/$1"
}

stage data "$out/data" "$python" "$recipes/prepare.py" --configs "$configs" --data "$DATA" --out "$out/data"
train sft_teacher --model "$teacher"
train sft_student --model "$student"
stage initial_student "$out/initial_student" "$python" "$recipes/initial_student.py" --run "$out/sft_student" --save "$out/initial_student"
train kd --model "$student" --teacher-model "$(student_of sft_teacher)"
train seqkd --model "$student" --teacher-model "$(student_of sft_teacher)"
train minillm --model "$out/initial_student" --teacher-model "$(student_of sft_teacher)" ${LM_DATA:+--lm-data "$LM_DATA"}
train promptkd --model "$out/initial_student" --teacher-model "$(student_of sft_teacher)"
for name in "${models[@]}"; do
    evaluate "$name"
done
stage report "$out/report/table.md" "$python" "$recipes/report.py" --out "$out" --methods "${models[@]}"
cat "$out/report/table.md"
