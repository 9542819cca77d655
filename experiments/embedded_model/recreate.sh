#!/usr/bin/env bash
# Makes mar/embedded/model again, in about four and a half hours on two CPU cores:  bash experiments/embedded_model/recreate.sh [folder for the stages]
set -euo pipefail
cd "$(dirname "$0")/../.."
stages=${1:-runs/embedded_model}
mkdir -p "$stages"

stage() { # number, then the arguments of mar.sft; its log lies beside its folder
    local number=$1; shift
    rm -rf "${stages:?}/$number"
    echo "stage $number: tail -f $stages/stage$number.jsonl"
    ${PYTHON:-python} -m mar.sft --out "$stages/$number" --log-every 25 "$@" > "$stages/stage$number.jsonl"
}

# answers: single plain ones first, then every form
${PYTHON:-python} experiments/embedded_model/begin.py "$stages/0"
stage 1 --model "$stages/0" --muon --plain-steps 800 --steps 2000 --lr 1e-3 --dtype bfloat16
stage 2 --model "$stages/1" --muon --plain-steps 200 --steps 900 --lr 1e-3 --seed 1 --hint 0.2 --hint-spread 0.1 --dtype bfloat16
stage 3 --model "$stages/2" --muon --steps 750 --lr 7e-4 --seed 2 --hint 0.25 --hint-counts 8 --hint-spread 0.1 --dtype bfloat16
# confidences: all of their mass near the truth, until the probability of an answer can be read where its confidence is written
stage 4 --model "$stages/3" --muon --steps 700 --lr 1e-3 --seed 3 --hint 1 --hint-counts 4 --hint-spread 0.1
stage 5 --model "$stages/4" --muon --steps 900 --lr 8e-4 --seed 4 --hint 1 --hint-counts 4 --hint-spread 0.1
stage 6 --model "$stages/5" --muon --steps 850 --lr 1e-3 --seed 5 --hint 1 --hint-counts 6 --hint-spread 0.1
# nearer to the truth, several demonstrations a patient (stage 7 was planned for 1,500 steps and ended at 750, its rate still at .0007)
stage 7 --model "$stages/6" --muon --steps 750 --rows 6 --prompts 16 --lr 1e-3 --seed 10 --hint 1 --hint-counts 4 --hint-spread 0.02
stage 8 --model "$stages/7" --muon --steps 520 --rows 6 --prompts 16 --lr 7e-4 --seed 13 --hint 1 --hint-counts 4 --hint-spread 0.02
# and noise again, with a third of the mass near the truth; then the forms once more, which the confidences had cost something
stage 9 --model "$stages/8" --muon --steps 100 --rows 6 --prompts 16 --lr 3e-4 --seed 15 --hint 0.35 --hint-counts 4 --hint-spread 0.02
stage 10 --model "$stages/9" --muon --steps 220 --rows 4 --prompts 24 --lr 3e-4 --seed 16 --hint 0.35 --hint-counts 2 --hint-spread 0.02 --dtype bfloat16
cp "$stages"/10/* mar/embedded/model/
