"""Make the SVG of a figure small: lines without more vertices than a screen shows, written in few characters."""

import re
import xml.etree.ElementTree as ET
from itertools import groupby

import numpy as np
from matplotlib.path import Path

from rrcm.report.panels import OTHERS

MOST_PATHS = 90_000  # characters of all paths of a figure; then its lines are thinned out
TOLERANCES = (0.2, 0.5, 1.0, 2.0)  # points by which a thinned line may be off, smallest first
LONG = 40  # vertices of a line that can be thinned out
TENTHS = 10  # lines are written in tenths of a point
DRAWN = {"path", "use"}  # elements that can share their looks with their neighbours
OWN = {"d", "x", "y", "href", "id", "opacity"}  # attributes that they do not share; a group's opacity blends it as one


def limit_size(root: ET.Element) -> None:
    """Thin out the lines of a figure that is too large for a page. If that is not enough, leave out the grey lines.

    Curves of 10,000 radii have more steps than a screen can show.
    """

    def is_too_large() -> bool:
        return sum(len(path.get("d")) for path in root.iter("path")) > MOST_PATHS

    for tolerance in TOLERANCES:
        if is_too_large():
            for path in root.iter("path"):
                path.set("d", _thin(path.get("d"), tolerance))
    if is_too_large():
        grey = f"s-{OTHERS['color'][1:]}"
        for parent in root.iter():
            for child in [each for each in parent if each.get("data-series")]:
                if any(path.get("class") == grey for path in child.iter("path")):
                    parent.remove(child)


def _thin(path: str, tolerance: float) -> str:
    """A path of one straight line after another, off by about `tolerance` points, with fewer vertices."""
    commands = re.findall("[A-Za-z]", path)
    if len(commands) < LONG or not {"L"} <= set(commands) <= {"M", "L", "z"} or commands.count("M") > 1:
        return path
    line = Path(np.array(re.findall(r"-?[\d.]+", path), float).reshape(-1, 2))
    line.should_simplify, line.simplify_threshold = True, tolerance
    simple = line.cleaned(simplify=True)
    vertices = simple.vertices[simple.codes != Path.STOP].tolist()
    return f"M {' L '.join(f'{x:.1f} {y:.1f}' for x, y in vertices)}{' z' if commands[-1] == 'z' else ''}"


def shorten(root: ET.Element) -> None:
    """Write the same drawing in fewer characters, in place: relative lines, and no group without attributes.

    Neighbours that look the same become a group, which says once how they look.
    """
    for path in root.iter("path"):
        path.set("d", relative(path.get("d")))
    _inline_groups(root)
    for parent in [each for each in root.iter() if each.tag != "defs"]:
        _group_neighbours(parent)


def _inline_groups(parent: ET.Element) -> None:
    """Move the contents of groups without attributes to their parents."""
    children = []
    for child in parent:
        _inline_groups(child)
        children += child if child.tag == "g" and not child.attrib else [child]
    parent[:] = children


def _group_neighbours(parent: ET.Element) -> None:
    """Put neighbouring lines or marks that look the same into a group, which has the common attributes."""
    children: list[ET.Element] = []
    for (looks, can_share), neighbours in groupby(parent, lambda child: (_looks(child), _can_share(child))):
        each = list(neighbours)
        if can_share and looks and len(each) > 1:
            group = ET.Element("g", dict(looks))
            for child in each:
                for key, _ in looks:
                    del child.attrib[key]
            group.extend(each)
            children.append(group)
        else:
            children += each
    parent[:] = children


def _can_share(element: ET.Element) -> bool:
    """Whether a group can have the looks of an element. A clip path moves with an element's transformation."""
    return element.tag in DRAWN and "transform" not in element.attrib


def _looks(element: ET.Element) -> tuple[tuple[str, str], ...]:
    """The attributes of an element, except for its shape and position."""
    return tuple((key, value) for key, value in element.items() if key not in OWN)


def relative(path: str) -> str:
    """A path of straight lines, with the steps from vertex to vertex in the place of coordinates.

    Coordinates are rounded to tenths of a point, and errors do not add up. Other paths are returned unchanged.

    >>> relative("M 10 5.04 L 20 5 L 20 7.5 L 21.5 9 z")
    'M10 5h10v2.5l1.5 1.5z'
    """
    commands = re.findall(r"([A-Za-z])([^A-Za-z]*)", path)
    if not {letter for letter, _ in commands} <= {"M", "L", "z"}:
        return path
    here = start = before = None
    written = []
    for letter, numbers in commands:
        if letter == "z":
            here, name, values = start, "z", ()
        else:
            place = tuple(round(TENTHS * float(number)) for number in numbers.split())
            name, values = ("M", place) if letter == "M" else _step(here, place)
            here, start = place, place if letter == "M" else start
        if any(values) or name in "Mz" or len(commands) == 2:
            text = " ".join(f"{value / TENTHS:g}" for value in values)
            written.append(f" {text}" if name == before != "M" else f"{name}{text}")
            before = name
    return re.sub(r"(?<!\d)0\.", ".", "".join(written)).replace(" -", "-")


def _step(here: tuple[int, ...], there: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The command of SVG for a line from one place to another, and its numbers."""
    across, down = (end - start for start, end in zip(here, there, strict=True))
    if across == 0 or down == 0:
        return ("h", (across,)) if down == 0 else ("v", (down,))
    return "l", (across, down)
