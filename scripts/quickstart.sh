#!/usr/bin/env bash
# The main job in minutes: write a corpus, preprocess, train, translate unseen sentences, score.
#
#   scripts/quickstart.sh [FOLDER]      FOLDER (runs/quickstart) receives everything
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment

OUT=${1:-runs/quickstart}
mkdir -p "$OUT"

say "1/5 a corpus of English sentences and their German translations -> $OUT/text"
"$BIN/python" examples/quickstart/make_corpus.py "$OUT/text"

say "2/5 text -> pieces -> ids -> $OUT/data"
"$BIN/nmt-preprocess" --config examples/quickstart/preprocess.yaml \
    --trainpref "$OUT/text/train" --validpref "$OUT/text/valid" --testpref "$OUT/text/test" \
    --destdir "$OUT/data" --overwrite

say "3/5 training -> $OUT/run (the same command goes on from where it was stopped)"
# With exit code 75, for "stopped, goes on with the same command", this ends here too (set -e).
"$BIN/nmt-train" "$OUT/data" --config examples/quickstart/train.yaml --save-dir "$OUT/run"

say "4/5 translating 500 sentences that are not in the training text -> $OUT/test.out.de"
"$BIN/nmt-generate" --model "$OUT/run/checkpoints/best" --input "$OUT/text/test.en" \
    --output "$OUT/test.out.de" --reference "$OUT/text/test.de" --beam 5

say "5/5 is it learned or looked up?"
"$BIN/python" examples/quickstart/compare.py "$OUT/text" "$OUT/test.out.de"
