"""Strings of digits and their reversals, as text and as a data directory."""

import random
from pathlib import Path

from support.commands import succeed


def write_digits(folder: Path) -> None:
    """Write distinct strings of 2 to 8 digits and their reversals: 4,000 pairs to learn, 100 and 300 unseen."""
    rng = random.Random(1)
    strings: set[tuple[str, ...]] = set()
    while len(strings) < 4400:
        strings.add(tuple(rng.choices("0123456789", k=rng.randint(2, 8))))
    ordered = sorted(strings)
    rng.shuffle(ordered)
    for split, start, end in (("train", 0, 4000), ("valid", 4000, 4100), ("test", 4100, 4400)):
        for language, step in (("xx", 1), ("yy", -1)):
            lines = (" ".join(digits[::step]) + "\n" for digits in ordered[start:end])
            (folder / f"{split}.{language}").write_text("".join(lines))


def preprocess(text: Path, data: Path) -> None:
    prefixes = [
        argument for split in ("train", "valid", "test") for argument in (f"--{split}pref", text / split)
    ]
    languages = ["--source-lang", "xx", "--target-lang", "yy"]
    succeed("nmt-preprocess", *languages, *prefixes, "--destdir", data, "--vocab-size", 300, "--workers", 1)
