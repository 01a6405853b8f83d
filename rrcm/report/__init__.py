"""Figures, tables and the report."""

import os

try:
    import matplotlib  # noqa: F401
except ValueError:  # MPLBACKEND names a backend that is not installed here, such as a notebook's; we need none
    del os.environ["MPLBACKEND"]
