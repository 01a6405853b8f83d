"""Text in figures: the font of each letter, and labels that fit.

Letters that DejaVu Sans lacks, such as Chinese characters, are drawn in a font of the machine.
"""

import functools
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

from rrcm.utils.errors import UNPRINTABLE

FONT = "DejaVu Sans"  # comes with matplotlib, so the glyphs are the same on every machine
NO_LETTERS = "Last Resort"  # a font of boxes that comes with matplotlib
CJK = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}  # first words of the Unicode names of such characters


def set_fonts(figure: Figure) -> None:
    """Give each text of `figure` with letters that `FONT` lacks the installed fonts that have them."""
    for text in figure.findobj(Text):
        if len(families := font_families(text.get_text())) > 1:
            text.set_fontfamily(families)


def note_on_letters(names: Iterable[str]) -> str | None:
    """One line if `names` have letters that no installed font has, so that figures show boxes instead."""
    signs = {sign for name in names for sign in name if not UNPRINTABLE.match(sign) and not sign.isspace()}
    missing = sorted(sign for sign in signs if _family_of(sign) is None)
    if not missing:
        return None
    script = unicodedata.name(missing[0], "unnamed").split()[0]
    font = f"Noto Sans {'CJK' if script in CJK else script.title()}"
    shown = " ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    return f"no font here has {shown} ({script}), so figures show boxes; install one that has, such as {font}"


def font_families(text: str) -> list[str]:
    """`FONT`, and the installed fonts for those characters of `text` that it lacks."""
    return list(dict.fromkeys([FONT, *sorted(family for sign in set(text) if (family := _family_of(sign)))]))


@functools.cache
def _family_of(sign: str) -> str | None:
    """`FONT` if it has the character, else the first installed family that has, sans-serif ones first, else None."""
    if ord(sign) in _glyphs(findfont(FONT)):
        return FONT
    regular = {e.name: e.fname for e in fontManager.ttflist if (e.style, e.weight) == ("normal", 400)}
    names = sorted(regular, key=lambda name: ("Sans" not in name, name))
    return next((name for name in names if NO_LETTERS not in name and ord(sign) in _glyphs(regular[name])), None)


@functools.cache
def _glyphs(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


def truncate(text: str, width: float, size: float) -> str:
    """`text` as a label of at most `width` points at font size `size`. If necessary, its middle is cut out.

    Dollar signs are escaped, since matplotlib would take them for a formula. A box replaces each character that no
    installed font has, and each without a shape, such as a line break.
    """
    text = "".join("□" if UNPRINTABLE.match(sign) or _family_of(sign) is None else sign for sign in text)
    if text_width(text, size) > width:

        def cut(kept: int) -> str:
            return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

        text = cut(bisect_right(range(1, len(text)), width, key=lambda kept: text_width(cut(kept), size)))
    return text.replace("$", r"\$")


def text_width(text: str, size: float) -> float:
    """The width of `text`, without formulas, in points at font size `size`."""
    font = get_font([findfont(family) for family in font_families(text)])
    font.set_size(size, 7200)  # a hundred pixels per point
    font.set_text(text)
    return font.get_width_height()[0] / 6400  # in 64ths of a pixel
