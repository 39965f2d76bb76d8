"""Beginning with weights of one's own."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.image_files import write_folders
from torch import nn

from nmt.distributed import single
from nmt.errors import UserError
from nmt.vision.options import ImageClassificationOptions
from nmt.vision.own_weights import take_weights


def network(num_classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes))


WRAPPINGS: dict[str, Any] = {
    "alone": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "of DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
    "of Lightning, compiled": lambda state: {
        "state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_what_scripts_save(tmp_path: Path, wrapping: str) -> None:
    given, model = network(seed=1), network(seed=2)
    torch.save(WRAPPINGS[wrapping](given.state_dict()), tmp_path / "weights.pt")
    line = take_weights(model, tmp_path / "weights.pt")
    assert line == f"weights: 9 of 9 from `{tmp_path / 'weights.pt'}`"
    for name, value in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_head_for_other_classes_is_left_out_and_named(tmp_path: Path, is_folder: bool) -> None:
    given, model = network(10, seed=1), network(3, seed=2)
    head = model[3].weight.clone()
    path = tmp_path / "model.safetensors"
    save_file({**given.state_dict(), "extra": torch.zeros(2)}, path)
    line = take_weights(model, tmp_path if is_folder else path)
    assert "weights: 7 of 9 from" in line
    assert "; of another shape: 2 (3.weight (10, 4), 3.bias (10,)); not in the model: 1 (extra)" in line
    assert torch.equal(model[0].weight, given[0].weight) and torch.equal(model[3].weight, head)


def test_what_does_not_fit_or_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            take_weights(network(), path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is missing" in refusal(tmp_path / "lost.pt")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "(1) none fits" in refusal(tmp_path / "other.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "must hold a dictionary of weights" in refusal(tmp_path / "empty.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    assert "must be a complete safetensors file" in refusal(tmp_path / "cut.safetensors")


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('executed')",)


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        take_weights(network(), tmp_path / "evil.pt")
    torch.save({"0.weight": Evil()}, tmp_path / "evil2.pt")
    with pytest.raises(UserError):
        take_weights(network(), tmp_path / "evil2.pt")


def test_a_task_begins_with_them_and_tells_it(tmp_path: Path) -> None:
    train = write_folders(tmp_path / "train", {"red": 2, "blue": 2})
    valid = write_folders(tmp_path / "val", {"red": 1, "blue": 1})
    settings: dict[str, Any] = {"model": "timm/test_byobnet", "image_size": 32}
    torch.manual_seed(1)
    options = ImageClassificationOptions(train_dir=train, val_dir=valid, **settings)
    given = options.build(None).build_model()
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    options = ImageClassificationOptions(
        train_dir=train, val_dir=valid, weights=tmp_path / "weights.pth", **settings
    )
    task = options.build(None)
    model = task.build_model()
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), given.parameters(), strict=True)
    )
    (line,) = task.look_over(task.open_split("train"), task.open_split("valid"), single(torch.device("cpu")))
    assert line.startswith("weights: ")
    task.save_assets(tmp_path)
    (tmp_path / "weights.pth").unlink()
    options.build(tmp_path).build_model()  # a model folder has weights of its own
    with pytest.raises(UserError, match="without `pretrained`"):
        ImageClassificationOptions(train_dir=train, val_dir=valid, weights=Path("x"), pretrained=True).check()
