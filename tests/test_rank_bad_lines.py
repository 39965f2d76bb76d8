"""The measure of the flags, against its definition."""

import importlib.util
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parent.parent / "scripts" / "rank_bad_lines.py"
_spec = importlib.util.spec_from_file_location("rank_bad_lines", SCRIPT)
assert _spec is not None and _spec.loader is not None
rank_bad_lines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rank_bad_lines)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_area_is_the_share_of_pairs_in_the_right_order(lines: list[tuple[int, bool]]) -> None:
    bad = [signal for signal, is_bad in lines if is_bad]
    good = [signal for signal, is_bad in lines if not is_bad]
    if not bad or not good:
        return
    wins = sum((x > y) + (x == y) / 2 for x in bad for y in good)
    signal, is_bad = (np.array(column) for column in zip(*lines, strict=True))
    area = rank_bad_lines.area_under_curve(signal.astype(float), is_bad)
    assert abs(area - wins / (len(bad) * len(good))) < 1e-9


def test_the_worst_are_a_share_of_the_lines() -> None:
    is_bad = rank_bad_lines.worst_lines(np.array([3.0, 1.0, 2.0, 9.0]), 0.5)
    assert is_bad.tolist() == [False, True, True, False]
