"""nmt-average: a model folder whose weights are the mean of several checkpoints."""

import sys
from collections.abc import Sequence

from nmt.cli.command import run_command
from nmt.cli.options import AverageOptions
from nmt.config import parse_command
from nmt.errors import UserError

PROG = "nmt-average"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        options = parse_command(
            AverageOptions, arguments, prog=PROG, description="Average the newest checkpoints of a run."
        )
        from nmt.checkpoint import CheckpointFolder, average_models

        folder = CheckpointFolder(options.checkpoints)
        updates = folder.updates()[-options.last :]
        if len(updates) < options.last:
            raise UserError(
                f"`{options.checkpoints}` must hold at least {options.last} checkpoints, but holds "
                f"{len(updates)}. Average fewer (`--last`), or train with a larger `--keep-last`."
            )
        average_models([folder.at(update) for update in updates], options.output)
        print(f"{options.output}: the mean of updates {', '.join(map(str, updates))}")

    run_command(PROG, body)


if __name__ == "__main__":
    main()
