"""The exceptions for errors that the user can fix."""

import textwrap


class RRCMError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do. Commands print no traceback."""


class Interrupted(RRCMError):
    """The process received SIGTERM and saved its state; running it again resumes."""


def one_line(error: Exception) -> str:
    """The message of another library's error, shortened to one line of at most 300 characters."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def printable(text: object) -> str:
    """The text without control characters: file names may contain line ends and bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in str(text))
