"""The exceptions that are shown as one line."""

EXIT_RESUMABLE = 75
"""What nmt-train ends with where the same command goes on: EX_TEMPFAIL of sysexits.h, what may succeed when it is
tried again. No shell, no signal and no Python ends with it by itself."""


class UserError(ValueError):
    """Something that a user can cause and put right.

    The commands show it as one line, without a traceback, and exit with code 2. Its text says what is
    wrong, where, and what to do: "`name` must be <rule>, but is <value>. <What to do>."
    """


class UnreadableExamplesError(UserError):
    """Examples cannot be read, such as those of a damaged file; a run saves what it has learned before it ends."""


class LostRankError(UserError):
    """Another rank of the run has ended or does not answer; starting the run again takes it up.

    The commands end with `exit_code` at once, without waiting for the other ranks.
    """

    exit_code = EXIT_RESUMABLE
