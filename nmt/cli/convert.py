"""nmt-convert: a model folder from a model of another toolkit."""

import sys
from collections.abc import Sequence

from nmt.cli.command import run_command
from nmt.cli.options import ConvertOptions
from nmt.config import parse_command

PROG = "nmt-convert"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        options = parse_command(
            ConvertOptions, arguments, prog=PROG, description="Convert a model of fairseq to a model folder."
        )
        from nmt.interop.fairseq import convert_checkpoint

        done = convert_checkpoint(
            options.checkpoint,
            options.dict_dir,
            options.to,
            source_lang=options.source_lang,
            target_lang=options.target_lang,
        )
        if done.is_guessed:
            print(
                f"{PROG}: warning: nothing tells which language is the source; taken for it is {done.source_lang} "
                "(say it with --source-lang)",
                file=sys.stderr,
            )
        print(f"{options.to}: {done.source_lang} to {done.target_lang}, {done.num_parameters:,} weights")

    run_command(PROG, body)


if __name__ == "__main__":
    main()
