"""The story of a run: epochs, updates, reports, validation, checkpoints, and when to stop."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from nmt.config.mapping import check_options, check_types, write_yaml
from nmt.data.batch_loader import refuse_import_by_worker
from nmt.distributed import World, join_world
from nmt.errors import UnreadableExamplesError, UserError, one_line
from nmt.options import TrainConfig
from nmt.run.advice import advice
from nmt.run.agenda import Due
from nmt.run.forecast import cost_rows, left_out, size_rows, time_row
from nmt.run.memory_probe import decide_split
from nmt.run.opening import Run, open_run
from nmt.run.pace import try_updates
from nmt.run.run_log import read_records
from nmt.run.same_ranks import check_same_options, check_seen_by_all, machines_without
from nmt.run.taking_up import go_back, resume, take_up
from nmt.system.determinism import deterministic_algorithms
from nmt.system.places import check_save_dir
from nmt.system.signals import StopRequest
from nmt.system.slower import telling_what_is_slower
from nmt.task import LooksOver
from nmt.task_extras import check_model, notes_of
from nmt.update.compilation import compile_failures


@dataclass(frozen=True)
class TrainingResult:
    """What has come of a run."""

    best: Path
    """The folder of the best checkpoint, or the last one if none was validated: a model, ready to use."""
    history: list[dict[str, Any]]
    """What the run has reported, oldest first, also before it was resumed: the records of metrics.jsonl. Each has
    its "kind" ("train" since the last report, "epoch", "valid"), its "update", and what was measured."""
    stopped_because: str
    """The limit that was reached, or who asked it to stop."""
    is_finished: bool = True
    """False if the same configuration goes on from here: the run was asked to stop."""


def train(config: TrainConfig[Any], *, stop: StopRequest | None = None) -> TrainingResult:
    """Train until a limit of the configuration is reached, going on from the last checkpoint if there is one.

    Under torchrun every rank calls this, and every rank gets the result.

    Args:
        config: Everything that determines the run.
        stop: A way to end the run early: at the request of any rank all of them finish an update and save.

    Raises:
        LostRankError: Another rank has ended, or does not answer.
        UserError: The configuration, the data or the checkpoint to go on from do not fit.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"`config` must be a configuration, but is a {type(config).__name__}. "
            "Make one with nmt.train_config(data=..., save_dir=...)."
        )
    refuse_import_by_worker()
    check_types(config)
    check_options(config)
    check_save_dir(config.save_dir)
    timeout = timedelta(minutes=config.rank_timeout)
    with (
        compile_failures(config.optimization.compile),
        deterministic_algorithms(config.deterministic),
        join_world(config.device, timeout=timeout) as world,
    ):
        if world.was_stopped():  # torchrun takes a stopped rank for a failed one, and starts all ranks again
            if world.is_main:
                print("stopped before torchrun started the ranks again: no update is made", file=sys.stderr)
            return TrainingResult(config.save_dir / "checkpoints" / "last", [], "an earlier request", False)
        check_same_options(config, world)
        return _train_or_preview(config, world, stop or StopRequest())


def _train_or_preview(config: TrainConfig[Any], world: World, stop: StopRequest) -> TrainingResult:
    with closing(open_run(config, world, stop)) as run:
        if not config.dry_run:
            return train_run(run)
        for line in preview(run):
            if world.is_main:
                print(one_line(line), flush=True)
        return TrainingResult(run.checkpoints.path / "best", [], "dry-run")


def train_run(run: Run) -> TrainingResult:
    """Train from where a run stands to its end."""
    run.log.open()
    _resume_or_start(run)
    try:
        while not (now := run.due()).is_last:
            _train_epoch(run)
        run.votes.raise_refusals()
        if now.validate_at_end:
            _validate_and_save(run)
    except UnreadableExamplesError as error:  # all ranks are here
        raise UserError(f"{error} {_save_where_it_stands(run)}".rstrip()) from error
    if now.reason is None:
        return _end_early(run)
    run.reports.end(now.reason, best=_best_path(run), progress=run.progress, followed=run.followed)
    return _result(run, now.reason, is_finished=True)


def preview(run: Run) -> Iterator[str]:
    """Yield the lines that a run would begin with and, later, one on the time; nothing is written.

    Afterwards this process can no longer train.
    """
    saved = run.world.broadcast(run.checkpoints.updates())
    if saved:
        yield from take_up(run, saved[-1])[0].lines
    done = run.trainer.update
    yield from look_ahead(run)
    seconds = try_updates(run.trainer, run.batches)
    yield time_row(run.config, run.batches, seconds=seconds, done=done)


def look_ahead(run: Run) -> Iterator[str]:
    """Yield lines on what a run will be, as they become known. Split the batches that do not fit into memory."""
    yield from describe(run)
    slower: list[str] = []
    with telling_what_is_slower(slower):  # the first batches try kernels out
        decide_split(run.trainer, run.batches, run.packing)
        costs = cost_rows(run.trainer, run.batches)
    yield from [*slower, *costs]


def describe(run: Run) -> Iterator[str]:
    """Yield what is known of a run before anything is computed; changes nothing."""
    yield from left_out(run.batches, run.config)  # first, since it ends the run if nothing is left
    yield from run.chosen
    yield from [*notes_of(run.train_examples), *notes_of(run.valid_examples)]
    if isinstance(run.task, LooksOver):
        yield from run.task.look_over(run.train_examples, run.valid_examples, run.world)
    yield from advice(run.config, run.surroundings)
    with run.trainer.evaluated_model() as model:
        check_model(run.task, model, run.world)
    yield from size_rows(run.trainer, run.batches, num_valid=len(run.valid_examples))


def _resume_or_start(run: Run) -> None:
    """Resume from the newest checkpoint if there is one; say what the run will be, and write its configuration."""
    saved = run.world.broadcast(run.checkpoints.updates())
    if saved:
        check_seen_by_all(run.checkpoints.at(saved[-1]), run.world)
        resume(run, saved[-1])
        run.look_at_clock()  # the time may be up already, or its limit may have been raised
        if run.due().validate:  # the run was stopped right before a validation
            _validate_and_save(run)
    else:
        run.log.cut_records(0, update=0)
        if missing := machines_without(run.config.save_dir, run.world):
            run.log.say(
                f"warning: `save-dir` is not seen by {', '.join(missing)}: only rank 0 writes there, and all "
                "ranks read it when the run is taken up. Name one that they share, or copy it before that"
            )
    for line in look_ahead(run):
        run.log.say(line)
    if run.world.is_main:
        write_yaml(run.config, run.config.save_dir / "config.yaml")
    run.votes.agree()


def _train_epoch(run: Run) -> None:
    """Make the updates that are left of this epoch, or fewer if the run ends within it."""
    trainer, metrics, clock = run.trainer, run.trainer.metrics, run.clock
    run.epoch = run.batches.epoch
    clock.start_training()
    for micro_batches in run.reports.waiting.watch(run.batches):
        # "train" is what has been seen since the last report, "epoch" since the epoch began.
        with metrics.scope("epoch"), metrics.scope("train"):
            trainer.train_step(micro_batches, epoch=run.epoch, wants_stop=run.votes.wants_stop)
        run.votes.note(trainer.num_wanting_stop)
        clock.count_training()
        run.reports.update(epoch=run.epoch, clock=clock)
        if trainer.cancellations.known_in_a_row() >= run.config.optimization.max_bad_updates:
            go_back(run)
            return
        if run.due().report:
            _report(run, "train")
        _validate_or_save(run, run.due())
        if run.due().is_last:
            return  # even at an epoch's end: the epoch is reported if the run is resumed with a later limit
        clock.start_training()
    _report(run, "epoch")
    _validate_or_save(run, run.due())


def _report(run: Run, scope: str) -> None:
    """Log what a scope has seen, and empty it."""
    run.reports.scope(scope, epoch=run.epoch, clock=run.clock)
    run.look_at_clock()


def _validate_or_save(run: Run, now: Due) -> None:
    if now.validate:
        _validate_and_save(run)
    elif now.save:
        _save(run)


def _validate_and_save(run: Run) -> None:
    """Measure the validation set, note the values of the metrics that are followed, and save."""
    trainer, options, start = run.trainer, run.config.optimization, run.clock.seconds
    # Rank 0 decides for all: a difference in the last bit must not stop one rank and not another.
    results = run.world.broadcast(trainer.validate(run.valid_examples, run.valid_batches))
    run.followed.note(run.progress, trainer.update, results)
    if options.lr_scheduler == "plateau":
        metric = run.followed.plateau
        trainer.plateau.note(results[metric], options, better=run.followed.better[metric])
    position = {"update": trainer.update, "epoch": run.epoch}
    best_so_far = {**run.followed.best_values(run.progress), "hours": run.clock.hours}
    run.reports.validation({**position, **results, **best_so_far})
    run.reports.remarks(run.valid_examples, results)
    if run.config.tensorboard:
        run.log.illustrate(trainer.update, trainer.illustrate(run.valid_examples))
    _save(run)
    run.reports.pace.validation_seconds = run.clock.seconds - start


def _save(run: Run) -> None:
    """Write a checkpoint, point the links at it, and remove those that need not be kept."""
    run.look_at_clock()
    if run.due().keep:
        run.progress.kept.append(run.trainer.update)
    with run.trainer.evaluated_weights():
        weights = run.trainer.whole_weights()
        optimizer, trainer_state = run.trainer.state_dict()
        run.reports.cancelled()  # `state_dict` has read the last flags: name these updates before the checkpoint
        if run.world.is_main:
            run.checkpoints.save(
                run.trainer.update,
                weights=weights,
                task=run.task,
                config=run.config,
                measured=run.progress.measured.get(run.trainer.update),
                optimizer=optimizer,
                state=run.state(trainer_state).to_json(),
            )
            run.link_best_and_prune()
    run.votes.agree()  # also a barrier: the others wait until rank 0 has saved


def _end_early(run: Run) -> TrainingResult:
    """Save where the run stands, after a request to stop."""
    update = run.trainer.update
    _save_where_it_stands(run)
    named = run.votes.reason()
    run.world.note_stop()
    done = f"after update {update}, which is saved" if update else "before the first update"
    run.log.say(f"stopped: {named} {done}; the same command goes on from there")
    return _result(run, named, is_finished=False)


def _save_where_it_stands(run: Run) -> str:
    """Save what has been trained, and say so."""
    update = run.trainer.update
    if update and update not in run.world.broadcast(run.checkpoints.updates()):
        _save(run)
    return f"Update {update} is saved, and the same command goes on from there." if update else ""


def _result(run: Run, reason: str, *, is_finished: bool) -> TrainingResult:
    history = read_records(run.config.save_dir)[0] if run.world.is_main else []
    return TrainingResult(_best_path(run), run.world.broadcast(history), reason, is_finished)


def _best_path(run: Run) -> Path:
    path = run.checkpoints.path
    # A run that ended before its first validation has no best checkpoint.
    return run.checkpoints.linked("best" if (path / "best").exists() else "last")
