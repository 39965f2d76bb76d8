#!/usr/bin/env bash
# Multi30k, English to German: raw text to BLEU.
#
#   examples/multi30k/run.sh [DATA_DIR [FOLDER [OPTIONS...]]]
#
# DATA_DIR   holds train.en train.de val.en val.de and test sets named test_*.en, test_*.de (each may be .gz).
#            Left out or empty, the text is downloaded from the data set's repository and checked.
# FOLDER     receives everything (runs/multi30k)
# OPTIONS    of nmt-train, such as --seed 2
#
# Every test set in DATA_DIR is translated after the training, and scored if it has a reference. The same
# command goes on with a training that was stopped, and trains nothing again that is finished.
set -euo pipefail

NUM_AVERAGED=10 # checkpoints at most; train.yaml keeps as many

# Name and SHA-256 of the unpacked text, which stays the same however it is compressed.
URL=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw
FILES="
train.en            460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6
train.de            2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72
val.en              1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227
val.de              660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660
test_2016_flickr.en 399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182
test_2016_flickr.de 4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16
"

sha256() {
    "$BIN/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

download() { # FOLDER
    local name wanted found
    mkdir -p "$1"
    while read -r name wanted; do
        if [ -z "$name" ] || { [ -f "$1/$name" ] && [ "$(sha256 "$1/$name")" = "$wanted" ]; }; then
            continue
        fi
        say "downloading $name"
        curl --fail --silent --show-error --location --retry 3 "$URL/$name.gz" | gzip -dc >"$1/$name.part" ||
            fail "$URL/$name.gz must be in reach, but is not. Get the text elsewhere and name its folder."
        found=$(sha256 "$1/$name.part")
        [ "$found" = "$wanted" ] ||
            fail "$name must have the SHA-256 $wanted, but has $found. The data set has changed, or the way here."
        mv "$1/$name.part" "$1/$name"
    done <<<"$FILES"
}

# 75 is how nmt-train says that it was stopped and can go on: half a model is neither averaged nor translated with.
stop_here() { # EXIT_CODE
    [ "$1" != 75 ] || say "stopped before its end; the same command goes on with the training"
    exit "$1"
}

# The path of a text, which may be compressed; nothing if there is none.
find_text() { # PREFIX LANGUAGE
    local path
    for path in "$1.$2" "$1.$2.gz"; do
        if [ -f "$path" ]; then
            echo "$path"
            return
        fi
    done
}

DATA_DIR=${1:-}
if [ -n "$DATA_DIR" ]; then
    [ -d "$DATA_DIR" ] || { echo "error: DATA_DIR must be a folder, but there is no $DATA_DIR." >&2; exit 2; }
    DATA_DIR=$(cd "$DATA_DIR" && pwd)
fi
FOLDER=${2:-}
if [ -n "$FOLDER" ]; then
    mkdir -p "$FOLDER"
    FOLDER=$(cd "$FOLDER" && pwd)
fi
shift $(($# < 2 ? $# : 2))

cd "$(dirname "$0")/../.."
source scripts/environment.sh
make_environment
FOLDER=${FOLDER:-runs/multi30k}
mkdir -p "$FOLDER"

if [ -z "$DATA_DIR" ]; then
    DATA_DIR="$FOLDER/text"
    say "text -> $DATA_DIR"
    download "$DATA_DIR"
fi

say "text -> pieces -> ids -> $FOLDER/data"
"$BIN/nmt-preprocess" --config examples/multi30k/preprocess.yaml \
    --trainpref "$DATA_DIR/train" --validpref "$DATA_DIR/val" --destdir "$FOLDER/data" --overwrite

say "training -> $FOLDER/run"
"$BIN/nmt-train" "$FOLDER/data" --config examples/multi30k/train.yaml --save-dir "$FOLDER/run" "$@" || stop_here $?

kept=$(ls -d "$FOLDER/run/checkpoints"/update-* | wc -l) # fewer where OPTIONS make the training short
NUM_AVERAGED=$((kept < NUM_AVERAGED ? kept : NUM_AVERAGED))
say "the mean of the last $NUM_AVERAGED checkpoints -> $FOLDER/average"
rm -rf "$FOLDER/average"
"$BIN/nmt-average" "$FOLDER/run/checkpoints" --last "$NUM_AVERAGED" --output "$FOLDER/average"

for name in $(cd "$DATA_DIR" && ls | sed -nE 's/^(test.*)\.en(\.gz)?$/\1/p' | sort -u); do
    reference=$(find_text "$DATA_DIR/$name" de)
    say "$name -> $FOLDER/$name.out.de${reference:+, scored against $reference}"
    "$BIN/nmt-generate" --model "$FOLDER/average" --input "$(find_text "$DATA_DIR/$name" en)" \
        --output "$FOLDER/$name.out.de" ${reference:+--reference "$reference"} --beam 5
done
