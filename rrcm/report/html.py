"""Write self-contained HTML pages: one file with its style, script and figures, which needs no network.

templates/base.html.jinja has the frame of every page, and parts.html.jinja its macros: tables, figures, galleries. The
script adds sorting, filters and the read-out of figures; without it, everything can be read. The content security
policy allows the style and the script by their hashes, images as data, and nothing else.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from rrcm.report.deployment import numeral
from rrcm.report.html_colours import dark_colour
from rrcm.report.html_figures import PageFigure
from rrcm.utils.errors import UNPRINTABLE, RRCMError, printable
from rrcm.utils.files import check_output

RIGHT_TO_LEFT = re.compile(r"([\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+)")
LINE_ENDS = {"\n", "\t"}


def render_page(template: str, *, figures: Mapping[str, PageFigure] | None = None, **context: object) -> str:
    """The text of a page from a template that extends base.html.jinja, with the variables `context`.

    `figures` are all figures of the page by name; the style needs their colours. Every value is escaped, and
    control characters in values become visible escapes. The same arguments give the same text on every machine.
    """
    figures = figures or {}
    colours = sorted({colour for figure in figures.values() for colour in figure.colours})
    palette = {colour: dark_colour(colour) for colour in colours}
    text = _environment().get_template(template).render(figures=figures, palette=palette, **context)
    return text.rstrip("\n") + "\n"


def check_page(path: Path) -> None:
    """Raise `RRCMError` if no page can be written at `path`, whose name must end in .html."""
    if path.suffix != ".html":
        raise RRCMError(f"--page {path}: must end in .html")
    check_output(path)


def new_environment(**options: object) -> jinja2.Environment:
    """Jinja2 for the templates of reports, as Markdown or HTML: it escapes all values and refuses missing ones."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("rrcm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja2 with the filters and the texts that templates of pages use."""
    environment = new_environment(finalize=_visible)
    templates = files("rrcm.report") / "templates"
    environment.globals |= {
        name: Markup((templates / file).read_text(encoding="utf-8"))
        for name, file in (("style", "page.css"), ("script", "page.js"))
    }
    environment.filters |= {"csp_hash": csp_hash, "runs": runs, "slug": slug, "numeral": numeral}
    return environment


def csp_hash(text: str) -> str:
    """The source expression that allows an inline style or script with exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def runs(text: object) -> list[tuple[str, bool]]:
    """Pieces of a text, each with whether it is written from right to left.

    A page isolates these, so that they do not reorder their neighbours.
    """
    pieces = RIGHT_TO_LEFT.split(printable(text))
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def slug(text: object) -> str:
    """A text as an id: lower-case letters and digits, joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", str(text).lower())) or "section"


def _visible(value: object) -> object:
    """`value` without characters that HTML forbids or that change the direction of what follows."""
    if not isinstance(value, str):
        return value
    text = UNPRINTABLE.sub(lambda sign: sign[0] if sign[0] in LINE_ENDS else printable(sign[0]), value)
    return Markup(text) if isinstance(value, Markup) else text
