"""What a checkpoint remembers of its run besides the weights and the optimizer's tensors: `state.json`.

The schema by which the file is read is in `nmt/checkpoints/run_state.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from nmt.run.clock import Clock
from nmt.run.validation_history import Progress

Position = Mapping[str, Any]
"""The place in the data, as `BatchIterator.load_state_dict` takes it."""


@dataclass(frozen=True)
class Surroundings:
    """What a run depends on besides its options; each checkpoint remembers it."""

    ranks: int
    device: str
    precision: str
    """The type that updates compute in, which `precision` auto leaves open."""
    updates_per_epoch: int
    num_examples: int
    """Examples of an epoch of training, without those that are left out."""
    train_data: str
    """Fingerprint of the training examples."""
    valid_data: str
    """Fingerprint of the validation examples."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run, as it is saved or loaded."""

    trainer: Mapping[str, Any]
    """What `Trainer.load_state_dict` takes, without tensors."""
    batches: Position
    split_above: int | None = None
    """See `BatchIterator.split_above`: larger batches were run in parts."""
    surroundings: Surroundings | None = None
    """None in a checkpoint of an older release, which did not remember them."""
    progress: Progress = field(default_factory=Progress)
    clock: Clock = field(default_factory=Clock)
    records_size: int = 0
    """Bytes of metrics.jsonl that were written before the checkpoint."""

    @property
    def update(self) -> int:
        """The number of updates that have been made."""
        return int(self.trainer["update"])

    def to_json(self) -> dict[str, Any]:
        """Return the state for `from_json`. JSON turns keys that are numbers into text."""
        found = asdict(self)
        if self.surroundings is None:
            del found["surroundings"]
        return found

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that a checkpoint holds, once it has been checked by the schema."""
        given = state.get("surroundings")
        known = (
            None if given is None else {option.name: given[option.name] for option in fields(Surroundings)}
        )
        return cls(
            trainer=state["trainer"],
            batches=state["batches"],
            split_above=state["split_above"],
            surroundings=None if known is None else Surroundings(**known),
            progress=Progress.from_json(state["progress"]),
            clock=Clock(**state["clock"]),
            records_size=state["records_size"],
        )
