"""Convert arguments of library functions to plain Python numbers before they are used, printed or hashed."""

import operator

from rrcm.utils.errors import RRCMError, printable

MOST_BITS = 256  # bits of the largest whole number that is accepted; Python does not print very long ones


def whole_number(name: str, value: object) -> int:
    """Convert an integer of Python, numpy or torch to int. Raises `RRCMError` for others, such as 7.0, "7" and True."""
    try:
        if not _is_bool(value) and (number := operator.index(value)).bit_length() <= MOST_BITS:
            return number
    except (TypeError, ValueError, RuntimeError):  # raised by numpy and torch for arrays and for tensors without values
        pass
    raise RRCMError(f"{name} = {shown(value)}: must be a whole number")


def real_number(name: str, value: object) -> float:
    """Convert a number of Python, numpy or torch to float. Raises `RRCMError` for others, such as "0.5" and True."""
    try:
        if not (_is_bool(value) or isinstance(value, str | bytes) or getattr(value, "ndim", 0)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise RRCMError(f"{name} = {shown(value)}: must be a number")


def shown(value: object) -> str:
    """The repr of a value in one line, shortened to 60 characters."""
    try:
        text = printable(repr(value))
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_bool(value: object) -> bool:
    return "bool" in str(getattr(value, "dtype", type(value)))
