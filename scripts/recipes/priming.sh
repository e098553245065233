#!/usr/bin/env bash
# Response priming in one command: a student learns from a teacher that reads a priming text, for each of the texts, and by the published
# objective for comparison; accuracy, attention, table, figures.
#
#   bash scripts/recipes/priming.sh SCALE OUT [--dry-run]
#
# SCALE is a folder of configs/response-priming/: tiny (two CPU cores, a quarter of an hour, models from nothing, word problems of its
# own), real (SmolLM2-135M-Instruct on GSM8K), real-cpu (256 of its questions), llama-3.1-8b (the paper's). --dry-run prints every
# command and does nothing. A stage whose result is there is skipped, so the same command continues; one cut off continues where it saved.
#
#   DATA                 GSM8K: a folder with train.jsonl and test.jsonl (not for tiny)
#   PRETRAINED_STUDENT   Hugging Face folder of the student (not for tiny)
#   PRETRAINED_TEACHER   of its teacher; default: the student's own, which then learns from itself with the text in front
#   RANKS                processes; default: the scale's own number
#   PYTHON               default: python3
set -uo pipefail

if [[ $# -lt 2 ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
scale=$1 out=$2 dry=
if [[ ${3:-} == --dry-run ]]; then dry=yes; fi
root=$(cd "$(dirname "$0")/../.." && pwd)
recipes=$root/scripts/recipes configs=$root/configs/response-priming/$scale python=${PYTHON:-python3}
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ! -f $configs/scale.yaml ]]; then
    echo "error: SCALE $scale: configs/response-priming/ has $(cd "$root/configs/response-priming" && dirname */scale.yaml | xargs)" >&2
    exit 2
fi
from_nothing=$(sed -n 's/^vocab_size: *//p' "$configs/scale.yaml")
if [[ -n $from_nothing ]]; then
    student=$out/student/hf teacher=$out/teacher/hf
elif [[ -n $dry ]]; then
    student=${PRETRAINED_STUDENT:-PRETRAINED_STUDENT} teacher=${PRETRAINED_TEACHER:-${PRETRAINED_STUDENT:-PRETRAINED_TEACHER}} DATA=${DATA:-DATA}
else
    : "${DATA:?is not set; name the folder that holds GSM8K\'s train.jsonl and test.jsonl}"
    student=${PRETRAINED_STUDENT:?is not set; name the Hugging Face folder of the student} teacher=${PRETRAINED_TEACHER:-$PRETRAINED_STUDENT}
fi
ranks=${RANKS:-$(sed -n 's/^ranks: *//p' "$configs/scale.yaml")}
beside=()  # what students are scored with: the teacher, for the KL to it, where that is no 800 GB
if grep -q "^held_out_kl: true" "$configs/scale.yaml"; then beside=(--teacher-model "$teacher"); fi
launch=("$python" -m torch.distributed.run --standalone --nproc_per_node "$ranks")
texts=(none confidence teacher ground-truth)
runs=(sft "${texts[@]/#/kd-}" kd-hint kd-original)
if [[ -z $dry ]]; then mkdir -p "$out/logs" || exit 2; fi
source "$recipes/stages.sh"

train() {  # NAME CONFIG FLAGS...
    stage "$1" "$out/$1/hf" "${launch[@]}" "$root/scripts/pretrain_kd.py" --config "$configs/$2.yaml" \
        --valid-data "$out/data/valid.jsonl" --save "$out/$1" "${@:3}"
}

distil() {  # NAME FLAGS...: the student, from the teacher as the flags let it read
    train "$1" response_priming --model "$student" --teacher-model "$teacher" --train-data "$out/data/train.jsonl" "${@:2}"
}

evaluate() {  # NAME MODEL QUESTIONS FLAGS...
    stage "evaluate_$1" "$out/evaluation/$1/results.json" "${launch[@]}" "$root/scripts/evaluate.py" \
        --config "$configs/evaluate.yaml" --model "$2" --gsm8k "$out/data/$3.jsonl" --save "$out/evaluation/$1" "${@:4}"
}

stage data "$out/data" "$python" "$recipes/prepare_priming.py" --configs "$configs" --data "${DATA:-.}" --out "$out/data"
if [[ -n $from_nothing ]]; then
    train teacher teacher --model "$out/data/models/teacher" --train-data "$out/data/teacher.jsonl"
    train student student --model "$out/data/models/student" --train-data "$out/data/student.jsonl"
fi
train sft sft --model "$student" --train-data "$out/data/train.jsonl"
for text in "${texts[@]}"; do
    distil "kd-$text" --teacher-priming "$text"
done
distil kd-hint --teacher-prompt-field hint
distil kd-original --teacher-priming ground-truth --priming-objective original
for text in "${texts[@]}"; do
    evaluate "teacher-$text" "$teacher" "test_$text"
done
evaluate student "$student" test "${beside[@]}"
looked_at=("student=$student")
for run in "${runs[@]}"; do
    evaluate "$run" "$out/$run/hf" test "${beside[@]}"
    looked_at+=("$run=$out/$run/hf")
done
stage attention "$out/attention/attention.json" "$python" "$root/scripts/analyze_attention.py" --config "$configs/attention.yaml" \
    --model "${looked_at[@]}" --data "$out/data/test.jsonl" --save "$out/attention"
stage report "$out/report/table.md" "$python" "$recipes/report_priming.py" --out "$out" --scale "$scale" \
    --commit "$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)"
if [[ -z $dry ]]; then cat "$out/report/table.md"; fi
