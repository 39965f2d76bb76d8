"""Which metrics a run follows: for the best checkpoint, for patience, for a plateau, and for more that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.errors import UserError
from nmt.options import CheckpointOptions, TrainConfig
from nmt.run.validation_history import Direction, Progress
from nmt.task import Task


@dataclass(frozen=True)
class Followed:
    """The names of the metrics, each of which the task has."""

    best: str
    patience: str
    plateau: str
    kept: Sequence[str]
    """Those, other than `best`, of which the best checkpoints are kept too."""
    better: Mapping[str, Direction]
    """Which way each metric of the task is better."""

    @classmethod
    def of(cls, config: TrainConfig[Any], task: Task[Any]) -> "Followed":
        """Take the names from the options.

        Raises:
            UserError: The task has no such metric.
        """
        checkpoints, optimization = config.checkpoints, config.optimization
        best = checkpoints.best_checkpoint_metric
        named = {"best-checkpoint-metric": [best], "keep-best-metrics": [*checkpoints.keep_best_metrics]}
        named["patience-metric"] = [optimization.patience_metric or best]
        named["plateau-metric"] = [optimization.plateau_metric or best]
        for option, metrics in named.items():
            for metric in metrics:
                if metric not in task.metrics:
                    known = ", ".join(task.metrics)
                    raise UserError(f"`{option}` must be one of {known}, but is {metric}. Name one.")
        kept = [metric for metric in dict.fromkeys(checkpoints.keep_best_metrics) if metric != best]
        [patience], [plateau] = named["patience-metric"], named["plateau-metric"]
        return cls(best, patience, plateau, kept, dict(task.metrics))

    def note(self, progress: Progress, update: int, results: Mapping[str, float]) -> None:
        """Take in a validation."""
        progress.note(
            update,
            results[self.best],
            better=self.better[self.best],
            measured=results,
            patience=None if self.patience == self.best else (self.patience, self.better[self.patience]),
        )

    def best_values(self, progress: Progress) -> dict[str, float]:
        """Return the best value of each metric whose best checkpoints are kept, that which chooses `best` last."""
        values = {
            f"best {metric}": progress.measured[ranking[0]][metric]
            for metric in self.kept
            if (ranking := progress.ranking(self.better[metric], metric=metric))
        }
        ranking = progress.ranking(self.better[self.best])
        return values | ({f"best {self.best}": progress.values[ranking[0]]} if ranking else {})

    def link_best_and_prune(
        self,
        checkpoints: CheckpointFolder,
        progress: Progress,
        options: CheckpointOptions,
        *,
        update: int,
        may_prune: bool,
    ) -> None:
        """Point `best`, and `best-METRIC` of others, at the best checkpoints, and remove those not to be kept.

        Args:
            checkpoints: Of the run.
            progress: What it remembers.
            options: What is kept.
            update: Of the newest checkpoint. Later ones belong to a part of the run that it has given up.
            may_prune: Whether any may be removed.
        """
        saved = [there for there in checkpoints.updates() if there <= update]
        rankings = {f"best-{name}": progress.ranking(self.better[name], metric=name) for name in self.kept}
        rankings["best"] = progress.ranking(self.better[self.best])
        keep = {*saved[-options.keep_last :], *progress.kept}
        for link, ranking in rankings.items():
            there = [validated for validated in ranking if validated in saved]
            if there:
                checkpoints.link(link, there[0])
            else:
                (checkpoints.path / link).unlink(missing_ok=True)
            keep |= {*there[: options.keep_best]}
        if may_prune:
            checkpoints.prune(keep)
