"""Hold a model's translations of the quickstart's test set against looking up, and show a few."""

import argparse
from pathlib import Path

from nearest_neighbour import score_copying

NUM_SHOWN = 5


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="the folder that make_corpus.py wrote")
    parser.add_argument("translations", type=Path, help="of the sentences in test.en")
    arguments = parser.parse_args()
    train, test = (
        tuple(read_lines(arguments.text / f"{split}.{language}") for language in ("en", "de"))
        for split in ("train", "test")
    )
    translations = read_lines(arguments.translations)
    right = sum(ours == theirs for ours, theirs in zip(translations, test[1], strict=True)) / len(test[1])
    by_edits, by_ngrams = score_copying(train, test)
    print("exactly right:")
    print(
        f"  {by_edits:6.1%}  copying the translation of the training sentence that is nearest by word edits"
    )
    print(f"  {by_ngrams:6.1%}  copying the one that is nearest by shared n-grams of words")
    print(f"  {right:6.1%}  the model")
    step = len(translations) // NUM_SHOWN
    for i in range(0, NUM_SHOWN * step, step):
        print(f"\nsource     {test[0][i]}\nreference  {test[1][i]}\nmodel      {translations[i]}")


if __name__ == "__main__":
    main()
