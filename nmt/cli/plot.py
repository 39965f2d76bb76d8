"""nmt-plot: draw the curves of one or several runs."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from nmt.cli.command import run_command
from nmt.cli.options import PlotOptions
from nmt.config.mapping import parse_command
from nmt.errors import UserError, one_line
from nmt.system.places import check_output_file

PROG = "nmt-plot"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        options = parse_command(
            PlotOptions,
            arguments,
            prog=PROG,
            description="Draw loss, metrics, learning rate and speed of runs into one picture.",
        )
        check_output_file(options.output)
        if find_spec("matplotlib") is None:
            raise UserError(
                f"`{PROG}` must have matplotlib, which is not installed. Run pip install matplotlib."
            )
        from nmt.run.plot import draw, open_runs, without_font_warnings

        runs, left_out = open_runs(options.runs)
        for line in left_out:
            print(f"{PROG}: left out: {one_line(line)}", file=sys.stderr)
        with without_font_warnings():
            draw(runs, x=options.x, metrics=options.metrics).savefig(options.output)
        print(options.output)

    run_command(PROG, body)


if __name__ == "__main__":
    main()
