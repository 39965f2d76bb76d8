"""nmt-average: a model folder whose weights are the mean of several checkpoints."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nmt.checkpoints.find_folder import find_checkpoints
from nmt.cli.command import run_command
from nmt.cli.options import AverageOptions
from nmt.config.mapping import parse_command
from nmt.errors import UserError
from nmt.system.places import check_new_folder

if TYPE_CHECKING:
    from nmt.checkpoints.run_folder import CheckpointFolder

PROG = "nmt-average"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        options = parse_command(
            AverageOptions,
            arguments,
            prog=PROG,
            description="Average the newest or the best checkpoints of a run.",
        )
        updates = average_run(options)
        print(f"{options.output}: the mean of updates {', '.join(map(str, updates))}")

    run_command(PROG, body)


def average_run(options: AverageOptions) -> list[int]:
    """Write the mean of some checkpoints of a run as a model folder, and return their updates."""
    from nmt.checkpoints.model_folder import average_models
    from nmt.checkpoints.run_folder import CheckpointFolder

    check_new_folder(options.output, name="output")
    folder = CheckpointFolder(find_checkpoints(options.checkpoints) or options.checkpoints)
    if not folder.updates():
        raise UserError(
            f"`{options.checkpoints}` must be a run or its `checkpoints` folder, but holds no checkpoint. "
            "Name the `save-dir` of a run that has saved."
        )
    count = options.count
    found = _best(folder) if options.best else folder.updates()[::-1]
    if len(found) < count:
        kind, keep = ("validated", "keep-best") if options.best else ("saved", "keep-last")
        raise UserError(
            f"`{options.checkpoints}` must hold at least {count} {kind} checkpoints, but holds {len(found)}. "
            f"Average fewer, or train with a larger `--{keep}`."
        )
    updates = sorted(found[:count])
    average_models([folder.at(update) for update in updates], options.output)
    return updates


def _best(folder: "CheckpointFolder") -> list[int]:
    """Return the updates of the validated checkpoints, best first by `best-checkpoint-metric`."""
    from nmt.checkpoints.model_folder import load_config
    from nmt.run.validation_history import Progress

    saved = folder.updates()
    newest = folder.at(saved[-1])
    _, state = folder.load_state(saved[-1])
    config = load_config(newest)
    better = config.task_options.build(newest).metrics[config.checkpoints.best_checkpoint_metric]
    return [update for update in Progress.from_json(state["progress"]).ranking(better) if update in saved]


if __name__ == "__main__":
    main()
