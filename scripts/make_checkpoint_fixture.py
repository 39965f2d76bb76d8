#!/usr/bin/env python3
"""Make the small checkpoints of the present format version that `tests/test_formats.py` loads and uses.

    .venv/bin/python scripts/make_checkpoint_fixture.py

Writes tests/data/checkpoints-VERSION/: the run of a one-layer translation model of width 8 with its data, ended
after an update of the second epoch. Run it once when `FORMAT_VERSION` in `nmt/checkpoints/tensor_file.py` changes,
commit the folder, and keep those of earlier versions for as long as they are to load.
"""

import os
import random
import shutil
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from nmt.checkpoints.tensor_file import FORMAT_VERSION
from nmt.cli.preprocess import main as preprocess
from nmt.cli.train import main as train
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID

DATA = Path(__file__).parent.parent / "tests" / "data"
SIZES = {"train": 60, "valid": 8}


def main() -> None:
    """Preprocess, train, and keep what resuming needs."""
    folder = DATA / f"checkpoints-{FORMAT_VERSION}"
    if folder.exists():
        raise SystemExit(f"error: {folder} must not exist yet: the format has its checkpoint already.")
    folder.mkdir(parents=True)
    os.chdir(folder)  # the configuration names places from here
    rng = random.Random(1)
    for split, size in SIZES.items():
        lines = [" ".join(rng.choices("0123456789", k=rng.randint(2, 6))) for _ in range(size)]
        for language, step in (("xx", 1), ("yy", -1)):
            text = "".join(" ".join(line.split()[::step]) + "\n" for line in lines)
            Path(f"{split}.{language}").write_text(text)
    # SentencePiece's usual normalisation would make its model 240 KB large.
    SentencePieceTrainer.train(
        sentence_iterator=iter(Path("train.xx").read_text().splitlines()),
        model_prefix="pieces",
        model_type="bpe",
        vocab_size=275,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        **{"bos_id": BOS_ID, "pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID},
    )
    prefixes = [argument for split in SIZES for argument in (f"--{split}pref", split)]
    model = ["--sentencepiece-model", "pieces.model"]
    preprocess(["--source-lang", "xx", "--target-lang", "yy", *prefixes, *model, "--destdir", "data"])
    train(["data", "--save-dir", "run", *options(max_update=8)])
    for split in SIZES:
        for language in ("xx", "yy"):
            Path(f"{split}.{language}").unlink()
    for path in (Path("run/train.log"), Path("pieces.model"), Path("pieces.vocab")):
        path.unlink()
    for update in (path for path in Path("run/checkpoints").iterdir() if not path.is_symlink()):
        if update.name != "update-0000008":
            shutil.rmtree(update)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1024:.0f} KB")


def options(*, max_update: int) -> list[str]:
    """Return the options of the run, as the test goes on with it."""
    model = ["--encoder-layers", "1", "--decoder-layers", "1", "--share-all-embeddings", "--dropout", "0.1"]
    for side in ("encoder", "decoder"):
        model += [
            f"--{side}-embed-dim",
            "8",
            f"--{side}-ffn-embed-dim",
            "16",
            f"--{side}-attention-heads",
            "2",
        ]
    training = ["--max-tokens", "100", "--lr", "1e-2", "--warmup-updates", "4", "--log-interval", "2"]
    training += ["--max-update", str(max_update), "--device", "cpu", "--keep-last", "1", "--eval-beam", "1"]
    return [*model, *training]


if __name__ == "__main__":
    main()
