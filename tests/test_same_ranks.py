"""Ranks that were not started for the same run are refused, on all of them."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_run import config
from support.toy_task import PointExamples

from nmt.config.mapping import to_mapping
from nmt.distributed import World
from nmt.errors import UserError
from nmt.run.same_ranks import (
    check_same_options,
    check_seen_by_all,
    fingerprints,
    machines_without,
)


@dataclass(frozen=True)
class Answers(World):
    """A world whose other ranks answer what they are told to."""

    others: Sequence[list[Any]] = ()
    """What each other rank has, in the order in which values are gathered."""

    def gather(self, value: Any) -> list[Any]:
        """Return this rank's value, and the next ones of the others."""
        return [value, *(values.pop(0) for values in self.others)]


def world(*others: list[Any]) -> World:
    return Answers(0, 1 + len(others), torch.device("cpu"), others=others)


HERE = socket.gethostname()


def test_options_that_differ_are_named_with_the_machines(tmp_path: Path) -> None:
    here = config(tmp_path / "run")
    mine = {**to_mapping(here, with_paths=False), "torch": torch.__version__}
    elsewhere = config(tmp_path / "another place")
    check_same_options(elsewhere, world([("machine-b", mine)], [("machine-b", mine)]))
    check_same_options(here, world([("machine-b", {**mine, "num-workers": "7"})]))
    other = {**mine, "batch-size": "64"}
    with pytest.raises(UserError) as caught:
        check_same_options(here, world([("machine-a", mine)], [("machine-b", other)]))
    assert str(caught.value) == (
        f"`batch-size` must be the same on all ranks, but is '32' on rank 0 ({HERE}) and '64' on rank 2 "
        "(machine-b). Start the same command on all machines."
    )
    with pytest.raises(UserError, match=r"`torch` must be the same on all ranks"):
        check_same_options(here, world([("machine-b", {**mine, "torch": "0.1"})]))


def test_data_that_differ_are_refused_and_one_rank_of_a_machine_reads_them() -> None:
    examples = {"training": PointExamples(5, seed=1), "validation": PointExamples(3, seed=1)}
    same = fingerprints(examples, world())
    assert len(same) == 2
    assert fingerprints(examples, world([(HERE, None), []], [("machine-b", None), same])) == same
    other = [same[0], "another"]
    with pytest.raises(UserError, match=r"validation examples .* those on machine-b differ"):
        fingerprints(examples, world([(HERE, None), []], [("machine-b", None), other]))


def test_a_checkpoint_that_a_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    assert machines_without(tmp_path, world([("machine-b", True)])) == []
    check_seen_by_all(tmp_path, world([("machine-b", True)]))
    with pytest.raises(UserError, match=r"must be seen by all machines, .* but is not by machine-b. Copy it"):
        check_seen_by_all(tmp_path, world([("machine-b", False)], [("machine-b", False)]))
