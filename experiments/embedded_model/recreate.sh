#!/usr/bin/env bash
# Makes mar/embedded/model again, in about four and a half hours on two CPU cores:  bash experiments/embedded_model/recreate.sh [folder for the stages]
set -euo pipefail
cd "$(dirname "$0")/../.."
stages=${1:-runs/embedded_model}
mkdir -p "$stages"

stage() { # number, model to start from, then words of mar.sft; the same command goes on where it was cut off
    local number=$1 begin=$2; shift 2
    echo "stage $number: tail -f $stages/$number/sft.jsonl"
    ${PYTHON:-python} -m mar.sft +experiment=clinic model=hf model.path="$begin" run_dir="$stages/$number" \
        model.explain_decimals=false \
        sft.mixture=all sft.muon=true sft.batch=32 sft.warmup_steps=50 sft.decay=0.7 'optim.betas=[0.9,0.95]' \
        sft.eval_every=0 sft.save_every=500 logger.console=plain "$@" > "$stages/stage$number.log"
}

# answers: single plain ones first, then every form
${PYTHON:-python} experiments/embedded_model/begin.py "$stages/0"
stage 1 "$stages/0" sft.plain_steps=800 sft.steps=2000 sft.lr=1e-3 sft.dtype=bfloat16
stage 2 "$stages/1" sft.plain_steps=200 sft.steps=900 sft.lr=1e-3 seed=1 sft.hint=0.2 sft.hint_spread=0.1 sft.dtype=bfloat16
stage 3 "$stages/2" sft.steps=750 sft.lr=7e-4 seed=2 sft.hint=0.25 sft.hint_counts=8 sft.hint_spread=0.1 sft.dtype=bfloat16
# confidences: all of their mass near the truth, until the probability of an answer can be read where its confidence is written
stage 4 "$stages/3" sft.steps=700 sft.lr=1e-3 seed=3 sft.hint=1 sft.hint_counts=4 sft.hint_spread=0.1
stage 5 "$stages/4" sft.steps=900 sft.lr=8e-4 seed=4 sft.hint=1 sft.hint_counts=4 sft.hint_spread=0.1
stage 6 "$stages/5" sft.steps=850 sft.lr=1e-3 seed=5 sft.hint=1 sft.hint_counts=6 sft.hint_spread=0.1
# nearer to the truth, several demonstrations a patient (stage 7 was planned for 1,500 steps and ended at 750, its rate still at .0007)
stage 7 "$stages/6" sft.steps=750 sft.rows=6 sft.batch=16 sft.lr=1e-3 seed=10 sft.hint=1 sft.hint_counts=4 sft.hint_spread=0.02
stage 8 "$stages/7" sft.steps=520 sft.rows=6 sft.batch=16 sft.lr=7e-4 seed=13 sft.hint=1 sft.hint_counts=4 sft.hint_spread=0.02
# and noise again, with a third of the mass near the truth; then the forms once more, which the confidences had cost something
stage 9 "$stages/8" sft.steps=100 sft.rows=6 sft.batch=16 sft.lr=3e-4 seed=15 sft.hint=0.35 sft.hint_counts=4 sft.hint_spread=0.02
stage 10 "$stages/9" sft.steps=220 sft.rows=4 sft.batch=24 sft.lr=3e-4 seed=16 sft.hint=0.35 sft.hint_counts=2 sft.hint_spread=0.02 sft.dtype=bfloat16
for file in mar/embedded/model/*; do cp "$stages/10/$(basename "$file")" "$file"; done
