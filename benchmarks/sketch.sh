#!/usr/bin/env bash
# Few-bit copies as predictors: without training at several bits, then trained end to end; docs/quality.md.
#
#   TRAIN=train.jsonl WIKI=wikitext2.test.raw C4=c4.eval.jsonl OUT=results benchmarks/sketch.sh
#
# TRAIN is text for the trained ones (benchmarks/prepare_text.py); the others are rounded on the embedded text. HOST is another
# host's options (HOST="host=tiny"), STEPS and BLOCKS the length of a training and the blocks (of text.block tokens) of its
# steps, TOKENS those that are evaluated. One process at a time: several on one GPU take turns.
set -euo pipefail
: "${TRAIN:?}" "${WIKI:?}" "${C4:?}" "${OUT:=outputs/sketch}" "${HOST:=host=smollm2 host.device=cuda}" "${STEPS:=800}" "${BLOCKS:=8}"
: "${TOKENS:=32768}" "${ROWS:=4096}" "${LR:=1e-4}" "${FIELDS:=[prefix,gold_completion]}" "${BITS:=1 2 3 4}" "${CAL:=text=embedded}"
export GNOMON_ROOT="$OUT/root"
python=${PYTHON:-python3}
mkdir -p "$OUT"

train() { # name, then overrides
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$python" train.py $HOST predictor=sketch criterion=magnitude harvest.mode=online harvest.batch=8 out="$OUT/$name" \
    callbacks.early_stopping=null "$@" 2>&1 | tee "$OUT/train-$name.log" | tail -1
}
evaluate() { # name, then overrides: neurons alone, every position sparse, on both texts
  local name=$1 i texts
  shift
  texts=("text=wikitext2 text.path=$WIKI" "text=c4 text.path=$C4 text.fields=$FIELDS")
  for i in 0 1; do
    # shellcheck disable=SC2086
    "$python" evaluate.py -m experiment=compare $HOST ${texts[i]} text.tokens="$TOKENS" backend=mask protocol=all protocol.prompt=null \
      policy=sketch budget.bytes=null hydra.sweep.dir="$OUT/$name" hydra.sweep.subdir="$i-\${hydra.job.num}" "$@" 2>&1 |
      tee -a "$OUT/$name.log" | tail -3
  done
}
list() { local IFS=,; echo "$*"; }

plain=()
for bits in $BITS; do
  train "bits$bits" $CAL predictor.bits="$bits" trainer.max_steps=0 density.heads=1.0
  plain+=("$OUT/bits$bits")
done
rows="text=file text.path=$TRAIN text.tokens=$((STEPS * ROWS))"
kl="$rows objective=kl predictor.tune=true student.blocks=$BLOCKS trainer.max_steps=$STEPS trainer.val_check_interval=$(((STEPS + 7) / 8))
  harvest.heldout_tokens=8192 harvest.means_tokens=16384 optimizer.lr=$LR"
# shellcheck disable=SC2086
{
  train kl50 $kl density.heads=1.0 density.neurons=0.5
  train kl30 $kl density.heads=1.0 density.neurons=0.3
  train heads $rows density.heads=0.67 harvest.batch_size="$ROWS" harvest.heldout_tokens=8192 trainer.max_steps="$STEPS" \
    trainer.val_check_interval="$STEPS" optimizer.lr=2e-3
  train klheads $kl init="$OUT/heads" density.heads=0.67 density.neurons=0.5
}
evaluate plain policy.predictor="$(list "${plain[@]}")" budget.heads=1.0 budget.neurons=0.5,0.3
evaluate trained policy.predictor="$OUT/kl50,$OUT/kl30" budget.heads=1.0 budget.neurons=0.5,0.3
evaluate heads policy.predictor="$OUT/heads,$OUT/klheads" budget.heads=0.67 budget.neurons=0.5
