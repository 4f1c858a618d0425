#!/usr/bin/env bash
# The reference tables: harvest speed, one predictor of each kind trained online on over 2 M tokens,
# and both evaluated on WikiText-2 test (64 blocks of 512) under both protocols.
#
#   TRAIN=train.jsonl TEST=wikitext2.test.raw DEVICE=cuda OUT=results benchmarks/main_job.sh
#
# TRAIN comes from benchmarks/prepare_text.py (WikiText-2 train without <unk>, and C4).
set -euo pipefail
: "${TRAIN:?}" "${TEST:?}" "${DEVICE:=cuda}" "${OUT:=outputs/main_job}" "${STEPS:=512}" "${ROWS:=4096}"
export GNOMON_ROOT="$OUT/root"
python=${PYTHON:-python3}
mkdir -p "$OUT"

"$python" benchmarks/harvest_speed.py --device "$DEVICE" --out "$OUT/harvest_speed.json"

train() { # name, then overrides
  local name=$1 start=$SECONDS
  shift
  "$python" train.py host.device="$DEVICE" text=file text.path="$TRAIN" \
    text.tokens=$((STEPS * ROWS)) predictor="$name" objective=bce harvest.mode=online \
    harvest.batch=8 harvest.heldout_tokens=16384 harvest.means_tokens=131072 \
    harvest.batch_size="$ROWS" trainer.max_steps="$STEPS" trainer.val_check_interval="$STEPS" \
    callbacks.early_stopping=null "$@" 2>&1 | tee "$OUT/train-$name.log"
  echo "train $name: $((SECONDS - start)) s" | tee -a "$OUT/train-$name.log"
}
train shadow predictor.hidden=1024 predictor.rank=1024 optimizer.lr=1e-3
train dejavu predictor.rank=256 predictor.activation=true optimizer.lr=2e-3

"$python" evaluate.py -m host.device="$DEVICE" text=wikitext2 text.path="$TEST" text.tokens=32768 \
  text.batch=8 policy=shadow,dejavu budget.density=null budget.heads=1.0,0.67 \
  budget.neurons=0.5,0.75 protocol=all,decode bytes.dtype=bfloat16 \
  measure.quality.generation.tokens=0 hydra.sweep.dir="$OUT/sweep" 2>&1 | tee "$OUT/evaluate.log" | tail -60
