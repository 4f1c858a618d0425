#!/usr/bin/env bash
# Every policy at equal bytes, and what end-to-end training buys: the tables of docs/systems.md and docs/quality.md.
#
#   TRAIN=train.jsonl WIKI=wikitext2.test.raw C4=c4.eval.jsonl TASKS=<folder> OUT=results benchmarks/compare.sh
#
# TRAIN comes from benchmarks/prepare_text.py (WikiText-2 train without <unk>, and C4 documents that are not in C4).
# TASKS may be left out. STEPS and ROWS shrink the trainings, HOST is another host's options (HOST="host=tiny").
# One process at a time: several on one GPU take turns and are slower than one after another.
set -euo pipefail
: "${TRAIN:?}" "${WIKI:?}" "${C4:?}" "${TASKS:=}" "${OUT:=outputs/compare}" "${STEPS:=512}" "${ROWS:=4096}"
: "${HOST:=host=smollm2 host.device=cuda}" "${TOKENS:=32768}" "${HELD:=16384}" "${KL:=800}" "${FIELDS:=[prefix,gold_completion]}"
: "${DEJAVU:=predictor.rank=256}" "${SHADOW:=predictor.hidden=1024 predictor.rank=512}"
export GNOMON_ROOT="$OUT/root"
python=${PYTHON:-python3}
mkdir -p "$OUT"

train() { # name, then overrides
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$python" train.py $HOST text=file text.path="$TRAIN" out="$OUT/$name" "$@" 2>&1 | tee "$OUT/train-${name//\//-}.log"
}
rows="text.tokens=$((STEPS * ROWS)) callbacks.early_stopping=null"
bce="$rows objective=bce harvest.mode=online harvest.batch=8 harvest.batch_size=$ROWS harvest.heldout_tokens=$HELD
  harvest.means_tokens=$((8 * HELD)) trainer.max_steps=$STEPS trainer.val_check_interval=$STEPS"
kl="$rows objective=kl harvest.heldout_tokens=$((HELD / 2)) harvest.means_tokens=$HELD
  trainer.val_check_interval=$(((KL + 7) / 8)) density.heads=1.0"
# shellcheck disable=SC2086
{
  train root/predictors/calibration predictor=calibration harvest.batch=8 text.tokens=$((4 * HELD))
  train sketch $rows predictor=sketch trainer.max_steps=0 criterion=magnitude harvest.mode=online harvest.batch=8 \
    harvest.heldout_tokens=$((HELD / 8)) harvest.means_tokens=$HELD
  train bce/dejavu $bce predictor=dejavu $DEJAVU optimizer.lr=2e-3
  train bce/shadow $bce predictor=shadow $SHADOW optimizer.lr=1e-3
  train kl/dejavu50 $kl predictor=dejavu $DEJAVU init="$OUT/bce/dejavu" optimizer.lr=3e-4 density.neurons=0.5 trainer.max_steps="$KL"
  train kl/dejavu30 $kl predictor=dejavu $DEJAVU init="$OUT/bce/dejavu" optimizer.lr=3e-4 density.neurons=0.3 trainer.max_steps="$KL"
  train kl/shadow50 $kl predictor=shadow $SHADOW init="$OUT/bce/shadow" optimizer.lr=5e-5 density.neurons=0.5 trainer.max_steps="$KL"
}

texts=("text=wikitext2 text.path=$WIKI" "text=c4 text.path=$C4 text.fields=$FIELDS")
sweep() { # name, then overrides: on both texts, one table for both
  local name=$1 i
  shift
  for i in 0 1; do
    # shellcheck disable=SC2086
    "$python" evaluate.py -m experiment=compare $HOST ${texts[i]} text.tokens="$TOKENS" backend=mask \
      hydra.sweep.dir="$OUT/$name" hydra.sweep.subdir="$i-\${hydra.job.num}" "$@" 2>&1 | tee -a "$OUT/$name.log" | tail -3
  done
}
all=static,oracle,random,dense_int8,griffin,glass,cats,chess,variants/chess_ffn,teal,skip_sublayers,variants/skip_ffn
all=$all,variants/skip_layers,variants/skip_similar,ffsplit,variants/ffsplit_int4,variants/ffsplit_lowrank
dejavu=policy.predictor="$OUT/bce/dejavu,$OUT/kl/dejavu50,$OUT/kl/dejavu30" shadow=policy.predictor="$OUT/bce/shadow,$OUT/kl/shadow50"
sweep decode policy=$all
sweep decode policy=sketch policy.predictor="$OUT/sketch" hydra.sweep.subdir='k${hydra.job.num}-${now:%f}'
sweep decode policy=teal_attention policy.params.inner.predictor="$OUT/sketch" hydra.sweep.subdir='t${hydra.job.num}-${now:%f}'
sweep decode policy=dejavu policy.predictor="$OUT/bce/dejavu" hydra.sweep.subdir='d${hydra.job.num}-${now:%f}'
sweep decode policy=shadow policy.predictor="$OUT/bce/shadow" hydra.sweep.subdir='s${hydra.job.num}-${now:%f}'
heads="budget.heads=1.0 budget.bytes=0.9,0.8,0.7,0.65"
fixed="budget.heads=1.0 budget.neurons=0.5,0.3 budget.bytes=null protocol=all protocol.prompt=null"
for part in "heads_dense|$heads" "all|$fixed"; do
  name=${part%%|*} budget=${part#*|}
  # shellcheck disable=SC2086
  {
    sweep "$name" $budget policy=static,oracle
    sweep "$name" $budget policy=sketch policy.predictor="$OUT/sketch" hydra.sweep.subdir='k${hydra.job.num}-${now:%f}'
    sweep "$name" $budget policy=dejavu "$dejavu" hydra.sweep.subdir='d${hydra.job.num}-${now:%f}'
    sweep "$name" $budget policy=shadow "$shadow" hydra.sweep.subdir='s${hydra.job.num}-${now:%f}'
  }
done
if [[ -n "$TASKS" ]]; then
  "$python" evaluate.py -m experiment=compare $HOST text.path="$WIKI" "measure=[quality,tasks]" tasks.path="$TASKS" tasks.batch=128 \
    policy=$all hydra.sweep.dir="$OUT/tasks" backend=mask 2>&1 | tee "$OUT/tasks.log" | tail -3
fi
