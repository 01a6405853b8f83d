"""The one exception that means "the person running this can fix it"."""

import textwrap


class RRCMError(Exception):
    """Bad input, said in one line: what is wrong, where, and what to do. Stages print it without a traceback."""


class Interrupted(RRCMError):
    """The work was told to stop (SIGTERM), has saved its state, and goes on when started again."""


def one_line(error: Exception) -> str:
    """What another library's error says, short and in one line."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
