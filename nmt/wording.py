"""Numbers in sentences: "1 pair is", "2,000 pairs are"."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with what it counts; of several things `many`, or `one` with an s, is the word.

    >>> counted(1, "pair"), counted(2000, "pair"), counted(0, "query", "queries")
    ('1 pair', '2,000 pairs', '0 queries')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def by_number(count: int, one: str, many: str) -> str:
    """Return the word, such as a verb, that goes with one thing or with several."""
    return one if count == 1 else many
