"""nmt-preprocess: raw text in, a data directory out."""

import sys
from collections.abc import Sequence

from nmt.cli.command import run_command
from nmt.config.mapping import parse_command
from nmt.data.options import PreprocessOptions
from nmt.errors import one_line

PROG = "nmt-preprocess"
_DESCRIPTION = (
    "Train a SentencePiece model on parallel text, or take one, and encode the text with it: "
    "a data directory for nmt-train."
)
_COMMON = (
    *("source_lang", "target_lang", "trainpref", "validpref", "testpref", "destdir", "vocab_size", "workers"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""

    def body() -> None:
        options = parse_command(
            PreprocessOptions,
            sys.argv[1:] if argv is None else argv,
            prog=PROG,
            description=_DESCRIPTION,
            common=_COMMON,
        )
        # Imported here, so that --help and a misspelt option are answered at once.
        from nmt.data.preprocess import preprocess

        preprocess(options, log=lambda line: print(one_line(line), file=sys.stderr, flush=True))

    run_command(PROG, body)


if __name__ == "__main__":
    main()
