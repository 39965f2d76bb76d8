"""nmt-train: train a model, or go on with a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from nmt.cli.command import run_command
from nmt.config.mapping import CONFIG_FLAG, parse_command, peek, read_yaml
from nmt.errors import EXIT_RESUMABLE, UserError
from nmt.options import TrainConfig
from nmt.system.signals import StopRequest
from nmt.task import load_task, task_names

PROG = "nmt-train"
_DESCRIPTION = "Train a model. The same command goes on from the last checkpoint of its --save-dir."
_COMMON = (  # of all tasks; options that a task does not have are skipped
    *("save_dir", "arch", "model", "train_dir", "val_dir", "pretrained", "share_all_embeddings", "dropout"),
    *("max_tokens", "batch_size", "update_freq", "lr", "lr_scheduler", "warmup_updates", "max_epoch"),
    *("max_update", "patience", "best_checkpoint_metric", "device", "precision", "dry_run"),
)
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE: a script that waits for the job must not take it for finished


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        task_options = load_task(_task_name(arguments))
        config = parse_command(
            TrainConfig[task_options],  # type: ignore[valid-type]
            arguments,
            prog=PROG,
            description=_describe_tasks(_DESCRIPTION),
            common=_COMMON,
        )
        from nmt.train_loop import train

        with StopRequest(PROG) as stop:
            result = train(config, stop=stop)
        if not result.is_finished:
            raise SystemExit(EXIT_RESUMABLE)

    run_command(PROG, body, exit_code_of_closed_pipe=EXIT_CLOSED_PIPE)


def _describe_tasks(description: str) -> str:
    names = ", ".join(sorted(task_names()))
    return f"{description}\n\n--task is one of: {names}. Each has options of its own: `{PROG} --task NAME --help`."


def _task_name(argv: Sequence[str]) -> str:
    """Return the name of the task, on which the other options depend."""
    name = peek(argv, "--task")
    config_path = peek(argv, CONFIG_FLAG)
    if name is None and config_path is not None:
        name = read_yaml(Path(config_path)).get("task")
    if not isinstance(name, str | None):
        raise UserError(f"{config_path}: `task` must be one name, but is {name}. Write `task: NAME`.")
    return name or "translation"


if __name__ == "__main__":
    main()
