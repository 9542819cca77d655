#!/usr/bin/env bash
# Makes mar/embedded/model again, in about three hours on two CPU cores:  bash experiments/embedded_model/recreate.sh [folder for the stages]
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
# and noise again, with a quarter of the mass near the truth
stage 7 --model "$stages/6" --muon --steps 150 --lr 5e-4 --seed 6 --hint 0.25 --hint-counts 8 --hint-spread 0.1 --dtype bfloat16
cp "$stages"/7/* mar/embedded/model/
