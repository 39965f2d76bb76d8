"""A run goes on from one of its checkpoints: after it has ended, or after too many cancelled updates."""

from collections.abc import Mapping

from torch import Tensor

from nmt.checkpoints.model_folder import load_config
from nmt.checkpoints.same_run import refuse_other_run
from nmt.run.going_back import checkpoint_to_go_back_to
from nmt.run.memory_probe import lower
from nmt.run.opening import Run
from nmt.run.resume import Resumption, compare, position_in_data
from nmt.run.state import Position, RunState


def take_up(run: Run, update: int) -> tuple[Resumption, RunState]:
    """Load a checkpoint, and find out what has changed since then; nothing is written."""
    folder = run.checkpoints.at(update)
    with run.checkpoints.offering_an_earlier(update):
        refuse_other_run(run.task, run.config, folder)
        optimizer, state = _read(run, update)
        resumption = compare(load_config(folder), run.config, state, run.surroundings, folder=folder)
        _load(run, update, optimizer, state, position=resumption.position)
    return resumption, state


def resume(run: Run, update: int) -> None:
    """Go on from a checkpoint, and say so."""
    resumption, state = take_up(run, update)
    _forget_what_came_after(run, update, state)
    resumption.report(run.log, update=update, epoch=run.batches.epoch)


def go_back(run: Run) -> None:
    """Go on from the last good checkpoint with half the learning rate, after too many cancelled updates.

    Raises:
        UserError: There is none, or this has been tried too often.
    """
    limit = run.config.optimization.max_bad_updates
    saved = run.world.broadcast(run.checkpoints.updates())
    good, lr_scale = checkpoint_to_go_back_to(saved, run.trainer, limit=limit)
    seconds = run.clock.seconds
    optimizer, state = _read(run, good)
    position, _ = position_in_data(state, run.surroundings, accepts_changed=True)
    _load(run, good, optimizer, state, position=position)
    _forget_what_came_after(run, good, state)
    run.clock.seconds_before = seconds  # time spent on the abandoned updates still counts
    run.trainer.lr_scale = lr_scale
    run.log.report(
        "back",
        {"update": run.trainer.update, "epoch": run.epoch, "lr scale": lr_scale, "bad updates": limit},
    )


def _read(run: Run, update: int) -> tuple[Mapping[str, Tensor], RunState]:
    optimizer, state = run.checkpoints.load_state(update)
    return optimizer, RunState.from_json(state)


def _load(
    run: Run, update: int, optimizer: Mapping[str, Tensor], state: RunState, *, position: Position
) -> None:
    """Take over the state of a checkpoint, and go on from a position in the data."""
    run.trainer.load_weights(run.checkpoints.at(update))
    run.trainer.load_state_dict(optimizer, state.trainer)
    run.batches.load_state_dict(position)
    # The lower of both limits: an earlier process may have had more memory than this device has.
    run.batches.split_above = lower(state.split_above, run.batches.split_above)
    run.progress, run.clock = state.progress, state.clock
    # The epoch of the last update. A run may have been saved after an epoch whose validation was not possible.
    run.epoch = run.batches.epoch - (state.batches["examples_consumed"] == 0)


def _forget_what_came_after(run: Run, update: int, state: RunState) -> None:
    """Remove the reports after the loaded checkpoint, set the links anew, and prune old checkpoints."""
    run.log.cut_records(state.records_size, update=update)
    # No rank may still be reading when rank 0 removes old checkpoints.
    run.world.barrier()
    if run.world.is_main:
        # An earlier process may have been killed before it did this.
        run.checkpoints.link("last", update)
        run.link_best_and_prune()
