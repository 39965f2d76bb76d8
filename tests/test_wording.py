"""Numbers in what users read: one is one, and several are several."""

import ast
import re
from pathlib import Path

import nmt
from nmt.errors import by_number, counted
from nmt.task_extras import Words

# What is counted in messages, and may well be one.
_COUNTED = (
    *("lines", "pairs", "sentences", "translations", "tokens", "pieces", "updates", "examples", "images"),
    *("sequences", "parameters", "tensors", "ties", "others", "numbers"),
)
_BEGINS_WITH_SEVERAL = re.compile(rf" (?:[a-z]+ )?(?:{'|'.join(_COUNTED)})\b")


def _slips(path: Path) -> list[str]:
    """Return the f-strings that have a number, with its thousands parted, before the word for several."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        for number, text in zip(node.values, node.values[1:], strict=False):
            if not isinstance(number, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            has_thousands = number.format_spec is not None and ast.unparse(number.format_spec) == "f','"
            if has_thousands and _BEGINS_WITH_SEVERAL.match(str(text.value)):
                found.append(f"{path.name}, line {number.lineno}: {ast.unparse(node)}")
    return found


def test_the_word_goes_with_the_number() -> None:
    assert [counted(count, "line") for count in (0, 1, 2, 1000)] == [
        *("0 lines", "1 line", "2 lines", "1,000 lines")
    ]
    assert counted(2, "query", "queries") == "2 queries" and counted(1, "query", "queries") == "1 query"
    assert [by_number(count, "is", "are") for count in (0, 1, 2)] == ["are", "is", "are"]
    assert Words(examples="pairs").example == "pair"


def test_no_message_has_a_word_for_several_whatever_the_number() -> None:
    assert [slip for path in Path(nmt.__file__).parent.rglob("*.py") for slip in _slips(path)] == []


def test_a_slip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('print(f"{count:,} longer pairs are", f"{count} pairs", f"of {count:,}: pairs")')
    (slip,) = _slips(path)
    assert "longer pairs" in slip
