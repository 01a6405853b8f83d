"""Figures, tables and the report.

Importing this package imports matplotlib, whatever the value of MPLBACKEND. The import of matplotlib alone fails when
that variable names a backend that is not installed, such as the one that notebooks set. Our figures need no backend.
"""

import contextlib
import os
import sys

if "matplotlib" not in sys.modules:
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
