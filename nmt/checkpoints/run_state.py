"""The schema of a checkpoint's `state.json`."""

from nmt.config.records import Either, Flag, ListOf, MapOf, Maybe, Number, Pair, Record, Text, Whole

_UPDATE = Text(longest=16, is_right=lambda text: text.isascii() and text.isdecimal(), rule="an update")
_WINDOWS = Whole(0, 2**24)
_WINDOW_SIZE = Whole(1, 2**38)  # windows * size: places in an epoch stay within 64 bits

_METRICS = MapOf(Record({"sums": MapOf(Number(is_finite=False)), "gauges": MapOf(Number(is_finite=False))}))
_LIMITS = Record(
    {
        "max_tokens": Maybe(Whole(1)),
        "max_sentences": Maybe(Whole(1)),
        "multiple": Whole(1),
    },
    optional={"least": Whole(1), "is_packed": Flag()},
)
_TRAINER = Record(
    {
        "update": Whole(),
        "num_optimizer_tensors": Whole(),
        "plateau": Record(
            {
                "factor": Number(0.0, 1.0),
                "best": Maybe(Number(is_finite=False)),
                "num_without_better": Whole(),
            },
            is_closed=True,
        ),
        "precision": Either(
            Record({}, is_closed=True), Record({"scale": Number(1.0), "num_good": Whole(0, 2**31 - 1)})
        ),
        "lr": Number(0.0),
        "lr_scale": Number(0.0, 1.0),
        "num_cancelled_in_a_row": Whole(),
        "metrics": ListOf(_METRICS, shortest=1),
    }
)

# The part of version 1 that is needed to bring a state up to date (`nmt.checkpoints.old_formats`).
FIRST_VERSION = Record(
    {
        "trainer": Record({"metrics": ListOf(_METRICS, shortest=1)}),
        "progress": Record({}, optional={"interval_seconds": Number(0.0)}),
    },
    optional={"version": Whole()},
)
ANY_VERSION = Record({}, optional={"version": Whole()})

RUN_STATE = Record(
    {
        "trainer": _TRAINER,
        "batches": Record(
            {
                "epoch": Whole(1),
                "window": _WINDOWS,
                "cuts": ListOf(Pair(_LIMITS, Whole()), shortest=1, longest=1000),
                "examples_consumed": Whole(),
                "seed": Whole(0, 2**63 - 1),
                "window_size": _WINDOW_SIZE,
                "dataset_size": Whole(),
            }
        ),
        "split_above": Maybe(Whole(1)),
        "progress": Record(
            {
                "values": MapOf(Number(is_finite=False), names=_UPDATE),
                "num_without_better": Whole(),
                "kept": ListOf(Whole()),
            },
            optional={"measured": MapOf(MapOf(Number(is_finite=False)), names=_UPDATE)},
            is_closed=True,
        ),
        "clock": Record({"seconds_before": Number(0.0), "training_seconds": Number(0.0)}, is_closed=True),
        "records_size": Whole(),
    },
    optional={
        "surroundings": Record(
            {
                "ranks": Whole(1),
                "device": Text(longest=64),
                "precision": Text(longest=64),
                "updates_per_epoch": Whole(),
                "num_examples": Whole(),
                "train_data": Text(),
                "valid_data": Text(),
            }
        )
    },
)
