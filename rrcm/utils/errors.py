"""The exceptions for errors that the user can fix."""

import re
import textwrap
import traceback
from pathlib import Path

# Characters that move the cursor, break a line or reverse the direction of text, and bytes of names that are not UTF-8
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

LONGEST, END = 1000, 300  # characters of a message, and how many of them are kept at its end, which says what to do


class RRCMError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do. Commands print no traceback.

    A message that quotes a long input is shortened in the middle.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            cut = f" ... ({len(message):,} characters) ... "
            message = message[: LONGEST - END - len(cut)] + cut + message[-END:]
        super().__init__(message)


class Interrupted(RRCMError):
    """The process received SIGTERM and saved its state; running it again resumes."""


def one_line(error: Exception) -> str:
    """The message of another library's error, shortened to one line of at most 300 characters."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def printable(text: object) -> str:
    """A text or path in one line. Control characters are escaped, so that it cannot disturb a terminal or a page."""
    return UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), str(text))


def failure_of(error: Exception) -> str:
    """Which exception the user's code raised, and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    ours = "importlib" in where.filename or Path(where.filename).is_relative_to(Path(__file__).parents[1])
    line = "" if ours else f", line {where.lineno} of {Path(where.filename).name}"
    return f"fails with {type(error).__name__} ({one_line(error)}{line})"
