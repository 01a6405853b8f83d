"""The style that all figures share, and writing them as PNG, SVG and PDF files with the same bytes each time.

The colours are the palette of Okabe and Ito, which colour-blind readers can tell apart. A method has the same colour in
every figure, and its family has the same marker. Methods at equal total compute are dashed and have hollow markers.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from rrcm.methods import METHODS
from rrcm.report.fonts import FONT, set_fonts
from rrcm.utils.files import atomic_path

STYLE = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.compression": 0,  # the library that compresses differs from machine to machine; git compresses anyway
    "pdf.fonttype": 42,  # TrueType: journals refuse the default, Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "rrcm",  # without it the names of elements are random
}
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
TEXT_COLOR = "#404040"
MARKERS = {  # by family
    "rRCM": "o",
    "other pre-training": "v",
    "noise": "s",
    "regularization": "^",
    "adversarial": "D",
    "ensemble": "P",
    "distillation": ">",
    "denoise, then classify": "X",
}
FORMATS = {  # with the metadata that is left out of the files
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
ENDINGS = ".png, .svg or .pdf"


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw with `STYLE` alone: neither a matplotlibrc nor earlier settings have an effect inside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


class Series(NamedTuple):
    """What a line, its interval, or points show."""

    key: str  # the name of a method, or another name of lower-case letters, digits, "_" and "-"
    images: int | None  # of which the heights are percentages


def series_id(key: str, images: int | None = None) -> str:
    """The gid of an artist that belongs to a series. Artists of one series have the same key in all panels."""
    return f"series.{key}.{images or ''}"


def parse_series_id(gid: str | None) -> Series | None:
    """The series that a gid of `series_id` names, also after `number_series`; None for any other gid."""
    found = re.fullmatch(r"series\.([\w-]+)\.(\d*)(\.\d+)?", gid or "")
    return Series(found[1], int(found[2]) if found[2] else None) if found else None


def number_series(figure: Figure) -> None:
    """Number the gids of series, since ids in a file are unique."""
    seen = Counter()
    for artist in figure.findobj(lambda artist: parse_series_id(artist.get_gid()) is not None):
        gid = series_id(*parse_series_id(artist.get_gid()))
        seen[gid] += 1
        artist.set_gid(f"{gid}.{seen[gid]}")


@figure_style()
def encode(figure: Figure, suffix: str) -> bytes:
    """The content of a file with this suffix, which must be in `FORMATS`. It has no date and no version."""
    set_fonts(figure)
    number_series(figure)
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:], metadata=FORMATS[suffix])
    return file.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` atomically, in the format that the suffix names."""
    with atomic_path(path) as scratch:
        scratch.write_bytes(encode(figure, path.suffix))


def save_all(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure into `folder` under its name, in every format, all with the layout of the first."""
    for name, figure in drawn.items():
        for suffix in FORMATS:
            save(figure, folder / f"{name}{suffix}")
            figure.set_layout_engine("none")  # keeps what was laid out: to do it again takes as long as drawing


DASHES = {  # by whether a method is matched, its share of the passes if it is joint, and whether it can pass
    (False, None, False): "-",
    (True, None, False): (0, (4, 1.5)),
    (False, 1.0, False): (0, (1, 1)),
    (True, 1.0, False): (0, (4, 1, 1, 1)),
    (False, 1 / 3, False): (0, (1, 3)),
    (True, 1 / 3, False): (0, (4, 1, 1, 1, 1, 1)),
    (False, 1.0, True): (0, (3, 1, 1, 1)),
    (True, 1.0, True): (0, (3, 1, 1, 1, 1, 1)),
}


def line_style(method: str) -> dict:
    """Colour, line style, marker and label of a method, as arguments of `Axes.plot`."""
    row = METHODS[method]
    return {
        "color": row.colour,
        "linestyle": DASHES[row.matched, row.joint, row.can_pass],
        "marker": MARKERS[row.family],
        "markersize": 4.5,
        "markerfacecolor": "white" if row.matched else row.colour,
        "markeredgewidth": 1.2,
        "label": row.label,
        "gid": series_id(method),
    }
