"""The arguments of a command -> values by field name. Each error is one line that names the option."""

import typing
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from nmt.config.fields import Option
from nmt.config.other_names import answer
from nmt.config.values import MismatchError, convert, shorten, suggest
from nmt.errors import UserError

CONFIG_FLAG = "--config"
_TRUE_WORDS, _FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_arguments(options: Sequence[Option], argv: Sequence[str], *, prog: str) -> dict[str, Any]:
    """Return the values of the arguments by field name. If an option is given twice, the last one counts.

    An option is `--flag value` or `--flag=value`; for true or false, `--flag` or its opposite; for a tuple, a flag
    and several values. `--` ends the flags. Underscores count as hyphens.

    Raises:
        UserError: for an unknown option, a value of another type, and a value too many or too few.
    """
    # First, or the value after an unknown flag would be taken for something else.
    _refuse_unknown_flags(options, argv, prog)
    by_flag = {option.flag: option for option in options if not option.is_positional}
    by_opposite = {option.opposite: option for option in options if option.opposite}
    values: dict[str, Any] = {}
    free: list[str] = []  # arguments without a flag
    waiting = deque(argv)
    while waiting:
        argument = waiting.popleft()
        if argument == "--":
            free += waiting
            break
        if not is_flag(argument):
            free.append(argument)
            continue
        flag, equals, text = _split(argument)
        given = [text] if equals else []
        option = by_flag.get(flag) or by_opposite.get(flag)
        if option is None:  # --config
            _take(waiting, given, 1)
            _check_number_of_values(CONFIG_FLAG, given, 1, prog)
        elif option.hint is bool:
            if not equals and waiting and waiting[0].lower() in (*_TRUE_WORDS[:-1], *_FALSE_WORDS[:-1]):
                given.append(waiting[0])
            _refuse_boolean_value(option, flag, given, prog)
            values[option.name] = flag == option.flag
        else:
            number = _number_of_values(option.hint)
            _take(waiting, given, number)
            if number is not None:
                _check_number_of_values(flag, given, number, prog)
            values[option.name] = _to_value(option, given, prog)
    return values | _assign_free(options, free, prog)


def missing_options(options: Sequence[Option], prog: str) -> UserError:
    """Say that these options must be given."""
    named = " and ".join(f"`{option.label}`" for option in options)
    be = "is" if len(options) == 1 else "are"
    return UserError(f"{named} must be given, but {be} missing. {see_help(prog)}")


def see_help(prog: str) -> str:
    """Say where all options are explained."""
    return f"See `{prog} --help`."


def is_flag(argument: str) -> bool:
    """Return whether an argument names an option: it begins with a hyphen, and is not a number such as -1."""
    if not argument.startswith("-") or argument == "-":
        return False
    try:
        float(argument)
    except ValueError:
        return True
    return False


def _split(argument: str) -> tuple[str, str, str]:
    flag, equals, text = argument.partition("=")
    return flag.replace("_", "-"), equals, text


def _take(waiting: deque[str], given: list[str], number: int | None) -> None:
    """Move at most `number` of the waiting values; if it is None, all values up to the next flag."""
    while waiting and not is_flag(waiting[0]) and (number is None or len(given) < number):
        given.append(waiting.popleft())


def _number_of_values(hint: Any) -> int | None:
    """Return how many values an option takes; None for any number."""
    if typing.get_origin(hint) is Annotated:
        return _number_of_values(typing.get_args(hint)[0])
    tuples = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is tuple]
    if not tuples:
        return 1
    kinds = typing.get_args(tuples[0])
    return None if kinds[-1] is Ellipsis else len(kinds)


def _check_number_of_values(flag: str, given: Sequence[str], number: int, prog: str) -> None:
    if len(given) < number:
        wanted = "a value" if number == 1 else f"{number} values with blanks between them"
        found = "none follows" if not given else f"only {shorten(' '.join(given))} follows"
        raise UserError(f"`{flag}` must have {wanted}, but {found}. {see_help(prog)}")


def _refuse_boolean_value(option: Option, flag: str, given: Sequence[str], prog: str) -> None:
    """Say that an option of true or false takes no value."""
    if not given:
        return
    is_on = (flag == option.flag) == (given[0].lower() in _TRUE_WORDS)
    instead = option.flag if is_on else option.opposite
    raise UserError(
        f"`{flag}` must stand without a value, but {shorten(given[0])} follows. Write {instead} alone. "
        f"{see_help(prog)}"
    )


def _to_value(option: Option, given: Sequence[str], prog: str) -> Any:
    """Convert the text of one option."""
    is_tuple = _number_of_values(option.hint) != 1
    text: Any = list(given) if is_tuple else given[0]
    if given == ["None"] and type(None) in typing.get_args(option.hint):
        return None
    if "" in given:  # usually an unset variable of the shell
        raise UserError(f"`{option.label}` must have a value, but it is empty. {see_help(prog)}")
    try:
        return convert(option.hint, text)
    except MismatchError as error:
        shown = " ".join(given) if is_tuple else text
        raise UserError(
            f"`{option.label}` must be {error}, but is {shorten(shown)}.{error.suggestion} {see_help(prog)}"
        ) from None


def _assign_free(options: Sequence[Option], free: Sequence[str], prog: str) -> dict[str, Any]:
    """Give the arguments without a flag to the positional options, in their order."""
    values: dict[str, Any] = {}
    waiting = list(free)
    positional = [option for option in options if option.is_positional]
    for option in positional:
        number = _number_of_values(option.hint)
        given, waiting = (waiting, []) if number is None else (waiting[:number], waiting[number:])
        if given:
            values[option.name] = _to_value(option, given, prog)
    if waiting:
        taken = " ".join(option.label for option in positional)
        rule = f"takes {taken} and options" if taken else "takes options alone"
        raise UserError(f"`{prog}` {rule}, but {shorten(waiting[0])} is left over. {see_help(prog)}")
    return values


def _refuse_unknown_flags(options: Sequence[Option], argv: Sequence[str], prog: str) -> None:
    known = {CONFIG_FLAG, "--help", "--version"}
    for option in options:
        known |= {option.flag, option.opposite or option.flag} if not option.is_positional else set()
    for argument in argv:
        if argument == "--":
            return
        flag = _split(argument)[0]
        if is_flag(argument) and flag not in known:
            keys = {option.key: option.label for option in options}
            raise UserError(_unknown(argument.partition("=")[0], flag, known, keys, prog))


def _unknown(written: str, flag: str, known: set[str], labels: Mapping[str, str], prog: str) -> str:
    hint = answer(prog, flag.lstrip("-"), known)
    if not hint and flag.lstrip("-") in labels:  # a positional one, written as a flag
        hint = f" Write it without a flag: {prog} {labels[flag.lstrip('-')]}."
    hint = hint or suggest(flag, sorted(known))
    return f"`{shorten(written, quote=False)}` is not a known option.{hint} {see_help(prog)}"
