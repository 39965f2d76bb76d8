"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something that a user can cause and put right.

    The commands show it as one line, without a traceback, and exit with code 2. Its text says what is
    wrong, where, and what to do: "`name` must be <rule>, but is <value>. <What to do>."
    """
