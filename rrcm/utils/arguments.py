"""Arguments of the library, brought to one Python type before they are computed with, printed or hashed."""

import operator

from rrcm.utils.errors import RRCMError, printable

MOST_BITS = 256  # of a whole number: Python prints no longer ones


def whole_number(name: str, value: object) -> int:
    """An integer of Python, numpy or torch as an int. Raises `RRCMError` for anything else, as 7.0, "7" and True."""
    try:
        if not _is_bool(value) and (number := operator.index(value)).bit_length() <= MOST_BITS:
            return number
    except (TypeError, ValueError, RuntimeError):  # numpy's and torch's, of arrays and of tensors without values
        pass
    raise RRCMError(f"{name} = {shown(value)}: must be a whole number")


def real_number(name: str, value: object) -> float:
    """A number of Python, numpy or torch as a float. Raises `RRCMError` for anything else, as "0.5", True and [0.5]."""
    try:
        if not (_is_bool(value) or isinstance(value, str | bytes) or getattr(value, "ndim", 0)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise RRCMError(f"{name} = {shown(value)}: must be a number")


def shown(value: object) -> str:
    """A value as in code, in one line and shortened to 60 characters."""
    try:
        text = printable(repr(value))
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_bool(value: object) -> bool:
    return "bool" in str(getattr(value, "dtype", type(value)))
