"""How well do the flags of `nmt-generate --format jsonl` find bad translations?

    python scripts/rank_bad_lines.py TRANSLATIONS.jsonl REFERENCE [--worst 0.1]

Bad are the lines of the lowest sentence chrF against the reference. For each signal: the area under the ROC curve
(the probability that a bad line has a higher signal than a good one; 0.5 is guessing), and of its flag how many
lines it marks, and how many of those are bad.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmt.translation.scoring import sentence_chrf


def area_under_curve(signal: NDArray[np.float64], is_bad: NDArray[np.bool_]) -> float:
    """Return the probability that a bad line's signal is above a good one's; ties count half."""
    _, places, counts = np.unique(signal, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[places]  # from 1, the mean of a tie
    num_bad, num_good = int(is_bad.sum()), int((~is_bad).sum())
    return float((ranks[is_bad].sum() - num_bad * (num_bad + 1) / 2) / (num_bad * num_good))


def worst_lines(scores: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Mark the lowest scores: `share` of the lines."""
    is_bad = np.zeros(len(scores), dtype=bool)
    is_bad[scores.argsort(kind="stable")[: max(1, round(share * len(scores)))]] = True
    return is_bad


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("translations", type=Path, help="what nmt-generate --format jsonl wrote")
    parser.add_argument("reference", type=Path, help="the reference, a line for each")
    parser.add_argument("--worst", type=float, default=0.1, help="share of the lines that are bad")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.translations.read_bytes().split(b"\n") if line]
    references = options.reference.read_bytes().decode().removesuffix("\n").split("\n")
    texts = [record["hypotheses"][0]["text"] if record["hypotheses"] else "" for record in records]
    scores = np.array(sentence_chrf(texts, references))
    is_bad = worst_lines(scores, options.worst)
    limit = scores[is_bad].max()
    print(f"{len(records):,} lines, {is_bad.sum():,} of them bad: sentence chrF up to {limit:.1f}")
    print(f"{'signal':16} {'AUC':>5} {'flagged':>8} {'bad of these':>13}")
    for name in next(record["signals"] for record in records if record["signals"]):
        signal = np.array([(record["signals"] or {}).get(name, 0.0) for record in records])
        flagged = np.array([name in record["flags"] for record in records])
        share = f"{is_bad[flagged].mean():.0%}" if flagged.any() else "-"
        print(f"{name:16} {area_under_curve(signal, is_bad):5.3f} {flagged.sum():8,} {share:>13}")


if __name__ == "__main__":
    main()
