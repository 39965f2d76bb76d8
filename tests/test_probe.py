"""A batch that is run to see what it takes leaves no trace."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_run import assert_bit_equal, config
from support.toy_task import Points, PointTask

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.data.options import BatchingOptions
from nmt.distributed import single
from nmt.run.memory_probe import with_max_tokens
from nmt.update.objective import Objective
from nmt.update.precision import Precision
from nmt.update.probe import probe

CPU = torch.device("cpu")


def a_batch() -> Points:
    examples = PointTask().open_split("train")
    return examples.collate([examples[i] for i in range(8)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_changes_nothing(precision: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = PointTask()
    model = task.build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    objective = Precision(precision, CPU).wrap(Objective(task, model), model)
    compute_loss, seen = task.compute_loss, []

    def watched(model: Any, batch: Points) -> Any:
        torch.rand(3)  # as dropout would
        output = compute_loss(model, batch)
        seen.append(model.training)
        if fails:
            raise RuntimeError("out of memory")
        return output

    monkeypatch.setattr(task, "compute_loss", watched)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            probe(objective, a_batch(), device=CPU, num_copies=2)
    else:
        probe(objective, a_batch(), device=CPU, num_copies=2)
    assert seen == [True]
    assert_bit_equal(model.state_dict(), before)  # batch norm's statistics too
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_memory_is_reserved_for_weights_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    task = PointTask()
    model = task.build_model()
    frozen, *trained = model.parameters()
    frozen.requires_grad_(False)
    like, reserved = torch.empty_like, []
    monkeypatch.setattr(torch, "empty_like", lambda tensor: reserved.append(tensor) or like(tensor))  # type: ignore[func-returns-value]
    probe(Objective(task, model), a_batch(), device=CPU, num_copies=2)
    assert [id(tensor) for tensor in reserved] == [id(tensor) for tensor in trained * 2]


def test_max_tokens_is_found_with_a_model_and_a_loss_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that has a limit; the search itself is tested in `test_memory.py`."""

    def find(run: Any, examples: Any, window: Any, **_: Any) -> int:
        run(examples.collate([examples[index] for index in window[:4].tolist()]))
        return 640

    monkeypatch.setattr("nmt.run.memory_probe.find_max_tokens", find)
    monkeypatch.setattr("nmt.trainer.Trainer.__init__", None)
    task = PointTask()
    model = task.build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, lines = with_max_tokens(
        replace(config(tmp_path), batching=BatchingOptions(max_tokens="auto")),
        task,
        model,
        task.open_split("train"),
        world=single(CPU),
        checkpoints=CheckpointFolder(tmp_path / "checkpoints"),
    )
    assert found.batching.max_tokens == 640
    assert lines == ["max-tokens auto: 640, what the memory has room for"]
    assert_bit_equal(model.state_dict(), before)
