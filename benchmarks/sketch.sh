#!/usr/bin/env bash
# Few-bit copies as predictors: without training at several bits, then trained end to end; docs/quality.md.
#
#   TRAIN=train.jsonl WIKI=wikitext2.test.raw C4=c4.eval.jsonl OUT=results benchmarks/sketch.sh
#
# TRAIN is text for the trained ones (benchmarks/prepare_text.py); the others are rounded on the embedded text. HOST is another
# host's options (HOST="host=tiny"), PARTS what to do, STEPS and BLOCKS the length of a training and the blocks (of text.block
# tokens) of its steps, TOKENS those that are evaluated, SPREAD=learned trains how many neurons each layer keeps too, BALANCED=true
# lets scores compete in the gradient. One process at a time: several on one GPU take turns.
set -euo pipefail
: "${TRAIN:?}" "${WIKI:?}" "${C4:?}" "${OUT:=outputs/sketch}" "${HOST:=host=smollm2 host.device=cuda}" "${STEPS:=800}" "${BLOCKS:=8}"
: "${TOKENS:=32768}" "${ROWS:=4096}" "${LR:=1e-4}" "${FIELDS:=[prefix,gold_completion]}" "${BITS:=1 2 3 4}" "${CAL:=text=embedded}"
: "${PARTS:=plain kl50 kl30 thr50 thr30 one50 one30 heads}" "${SEED:=0}" "${SPREAD:=layer}" "${BALANCED:=false}"
export GNOMON_ROOT="$OUT/root"
python=${PYTHON:-python3}
mkdir -p "$OUT"

train() { # name, then overrides
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$python" train.py $HOST predictor=sketch criterion=magnitude harvest.mode=online harvest.batch=8 out="$OUT/$name" seed="$SEED" \
    callbacks.early_stopping=null "$@" 2>&1 | tee "$OUT/train-$name.log" | tail -1
}
evaluate() { # name, then overrides: neurons alone, every position sparse, on both texts
  local name=$1 i texts
  shift
  texts=("text=wikitext2 text.path=$WIKI" "text=c4 text.path=$C4 text.fields=$FIELDS")
  for i in 0 1; do
    # shellcheck disable=SC2086
    "$python" evaluate.py -m experiment=compare $HOST ${texts[i]} text.tokens="$TOKENS" backend=mask protocol=all protocol.prompt=null \
      policy=sketch budget.bytes=null hydra.sweep.dir="$OUT/eval-$name" hydra.sweep.subdir="$i-\${hydra.job.num}" "$@" 2>&1 |
      tee -a "$OUT/eval-$name.log" | tail -3
  done
}
list() { local IFS=,; echo "$*"; }

rows="text=file text.path=$TRAIN text.tokens=$((STEPS * ROWS))"
kl="$rows objective=kl predictor.tune=true student.blocks=$BLOCKS trainer.max_steps=$STEPS trainer.val_check_interval=$(((STEPS + 7) / 8))
  harvest.heldout_tokens=8192 harvest.means_tokens=16384 optimizer.lr=$LR"
# shellcheck disable=SC2086
for part in $PARTS; do
  date "+%T $part"
  case $part in
    plain)
      plain=()
      for bits in $BITS; do
        train "bits$bits" $CAL predictor.bits="$bits" trainer.max_steps=0 density.heads=1.0
        plain+=("$OUT/bits$bits")
      done
      evaluate plain policy.predictor="$(list "${plain[@]}")" budget.heads=1.0 budget.neurons=0.5,0.3
      ;;
    kl50 | kl30 | thr50 | thr30 | one50 | one30) # trained at 0.5 or 0.3 of the neurons, by the K best or thresholds, from two bits or one
      bits=2 choose=topk
      [[ $part == one* ]] && bits=1
      [[ $part == thr* ]] && choose=threshold
      name=$part-$SEED
      [[ $SPREAD != layer ]] && name+=-$SPREAD
      [[ $BALANCED == true ]] && name+=-balanced
      train "$name" $kl predictor.bits="$bits" density.heads=1.0 density.neurons="0.${part: -2:1}" student.choose="$choose" \
        student.spread="$SPREAD" objective.balanced="$BALANCED"
      evaluate "$name" policy.predictor="$OUT/$name" budget.heads=1.0 budget.neurons=0.5,0.3 budget.spread="$SPREAD" \
        policy.params.choose=topk,threshold
      ;;
    heads) # two thirds of the heads and half of the neurons, without and with end-to-end training
      train heads $rows density.heads=0.67 harvest.batch_size="$ROWS" harvest.heldout_tokens=8192 trainer.max_steps="$STEPS" \
        trainer.val_check_interval="$STEPS" optimizer.lr=2e-3
      train klheads $kl init="$OUT/heads" density.heads=0.67 density.neurons=0.5
      evaluate heads policy.predictor="$OUT/heads,$OUT/klheads" budget.heads=0.67 budget.neurons=0.5
      ;;
    *)
      echo "PARTS: no part named $part" >&2
      exit 2
      ;;
  esac
done
