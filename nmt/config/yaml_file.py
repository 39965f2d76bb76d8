"""A flat YAML file of text. Errors name the line; what is written is read back exactly.

PyYAML's own types are not used, since they take `5e-4` for text and `no` for false. Every value is text, a list of
text, or None, and the caller knows the types.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from nmt.config.records import is_unicode, read_limited
from nmt.errors import UserError, shown

# Unquoted, these are None. `None` is among them because the command line spells it so.
_NONE_WORDS = ("", "~", "null", "Null", "NULL", "None")

_LARGEST_FILE = 2**20  # bytes: a file of options has a few thousand

_TEXT_TAG = "tag:yaml.org,2002:str"
_LIST_TAG = "tag:yaml.org,2002:seq"
_MAPPING_TAG = "tag:yaml.org,2002:map"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML file: hyphened keys, each with text, a list of text, or None.

    Keys may be written with underscores. None is an unquoted empty value, `null`, `~` or `None`.

    Raises:
        UserError: if it is not YAML, not flat, or has a key twice; with the line.
        OSError: if it cannot be read.
    """
    root = _parse(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _error(path, root, "must be a line `key: value`, but is not. Write one option a line.")
    mapping: dict[str, Any] = {}
    for key_node, value_node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _error(path, key_node, "the key must be one word, but is not.")
        _scalar(path, "a key", key_node)  # the same characters are allowed as in a value
        key = key_node.value.replace("_", "-")
        if key in mapping:
            raise _error(path, key_node, f"`{key}` must be given once, but is there twice. Delete one.")
        if isinstance(value_node, yaml.SequenceNode):
            mapping[key] = [_scalar(path, key, node) for node in value_node.value]
        else:
            mapping[key] = _scalar(path, key, value_node)
    return mapping


def write_flat_yaml(mapping: Mapping[str, Any], path: Path) -> None:
    """Write text, lists of text and None so that `read_yaml` gives them back.

    The file is written under a temporary name beside it and renamed.

    Raises:
        UserError: Text cannot be written, such as a path whose name is not UTF-8.
        OSError: It could not be written; the error names it.
    """
    for key, value in mapping.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_unicode(text):
                raise UserError(
                    f"`{key}` must be text in UTF-8, to be written to {path}, but is {shown(text)}. "
                    "Rename it, or name another."
                )
    items = [(_text_node(key), _value_node(value)) for key, value in mapping.items()]
    root = yaml.MappingNode(_MAPPING_TAG, items, flow_style=False)
    text = yaml.serialize(root, Dumper=yaml.BaseDumper, allow_unicode=True, width=math.inf)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        error.filename = str(path)  # an error of writing to an open file, such as a full disk, names no file
        raise


def _parse(path: Path) -> yaml.Node | None:
    data = read_limited(path, _LARGEST_FILE)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: must be UTF-8, but is not. Save the file as UTF-8.") from None
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except RecursionError:
        raise UserError(f"{path}: must be flat, but is nested too deep. Write one option a line.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context
        raise UserError(f"{path}, line {line}: must be YAML, but is not: {problem}.") from None
    except (ValueError, OverflowError):  # an escape beyond Unicode, a directive of a huge number
        raise UserError(
            f"{path}: must be YAML, but is not: it has an escape that stands for nothing."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{path}, line {line}: must be YAML, but has the character {shown(error.character)}."
        ) from None


def _scalar(path: Path, key: str, node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise _error(path, node, f"`{key}` must be one value or a list of values, but is nested deeper.")
    if not is_unicode(node.value):
        raise _error(path, node, f"`{key}` must be text, but has half of a character (a surrogate).")
    return None if node.style is None and node.value in _NONE_WORDS else str(node.value)


def _error(path: Path, node: yaml.Node, text: str) -> UserError:
    return UserError(f"{path}, line {node.start_mark.line + 1}: {text}")


def _value_node(value: Any) -> yaml.Node:
    if isinstance(value, list):
        return yaml.SequenceNode(_LIST_TAG, [_value_node(item) for item in value], flow_style=True)
    if value is None:
        return yaml.ScalarNode(_TEXT_TAG, "null")
    return _text_node(value)


def _text_node(text: str) -> yaml.Node:
    # Inside other quotes PyYAML breaks lines at U+0085, and reads that back as a blank.
    plain = text.isprintable() and text not in _NONE_WORDS
    return yaml.ScalarNode(_TEXT_TAG, text, style=None if plain else '"')
