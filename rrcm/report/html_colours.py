"""The colours that figures have on a dark page."""

import colorsys
from collections.abc import Sequence

DARK_PAPER, DARK_INK = (20, 23, 27), (230, 232, 235)  # as in templates/page.css
LEAST_CONTRAST = 4.5


def dark_colour(colour: str) -> str:
    """The counterpart of a colour "#rrggbb" on dark paper.

    Greys from black to white become shades from ink to paper. Other colours keep their hue, and become lighter until
    their contrast with the paper is at least LEAST_CONTRAST.
    """
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    if len(set(rgb)) == 1:
        share = rgb[0] / 255
        return _hex([round(ink + share * (paper - ink)) for ink, paper in zip(DARK_INK, DARK_PAPER, strict=True)])
    hue, lightness, saturation = colorsys.rgb_to_hls(*(each / 255 for each in rgb))
    while contrast(rgb, DARK_PAPER) < LEAST_CONTRAST and lightness < 1:
        lightness += 0.01
        rgb = [round(255 * each) for each in colorsys.hls_to_rgb(hue, min(lightness, 1), saturation)]
    return _hex(rgb)


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """The contrast ratio of two colours (r, g, b) in 0 to 255, as WCAG 2 defines it."""
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(rgb: Sequence[int]) -> float:
    parts = [each / 255 for each in rgb]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(rgb: Sequence[int]) -> str:
    return "#" + "".join(f"{each:02x}" for each in rgb)
