"""Adapt the SVG that matplotlib writes to an HTML page whose policy forbids styles in elements.

Styles become attributes, colours become classes, and ids are unique to a figure.
"""

import re
import xml.etree.ElementTree as ET

from markupsafe import Markup

from rrcm.report.figures import parse_series_id
from rrcm.utils.errors import UNPRINTABLE

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
KEPT = {"fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "stroke-linejoin"}
KEPT |= {"opacity", "fill-opacity", "stroke-opacity", "text-anchor", "image-rendering"}
PLACES = {"d", "x", "y", "width", "height", "transform"}


def clean(root: ET.Element, name: str) -> set[str]:
    """Adapt the SVG to a page, in place, and return its colours.

    Styles become attributes, colours become classes, and ids become unique to the figure. Parts without use on a page
    are left out: metadata, backgrounds, namespaces, and the ids of groups. Groups of series get the attribute
    data-series.
    """
    for key in ("width", "height", "version"):
        del root.attrib[key]
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style") or _is_background(parent, child):
                parent.remove(child)
    colours: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        element.text = element.text if element.text and element.text.strip() else None
        colours |= _use_attributes(element)
        identifier = element.attrib.pop("id", None)
        if series := parse_series_id(identifier):
            element.set("data-series", series.key)
        elif identifier and element.tag != "g":
            element.set("id", f"{name}-{identifier}")
        if link := element.attrib.pop(LINK, None):
            element.set("href", link.replace("#", f"#{name}-") if link.startswith("#") else link)
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("#", f"#{name}-"))
        for key in PLACES & element.attrib.keys():
            element.set(key, _short(element.get(key)))
        if element.get("transform", "").startswith("rotate(0 "):
            del element.attrib["transform"]
    return colours


def _is_background(parent: ET.Element, child: ET.Element) -> bool:
    """Whether a group is the background of the figure or of a panel: the first patch in it."""
    return (
        re.fullmatch(r"(figure|axes)_\d+", parent.get("id", "")) is not None
        and re.fullmatch(r"patch_\d+", child.get("id", "")) is not None
        and child is parent[0]
    )


def _use_attributes(element: ET.Element) -> set[str]:
    """Turn the style of an element into attributes and classes; returns its colours. A font becomes its size."""
    colours: set[str] = set()
    for part in element.attrib.pop("style", "").split(";"):
        key, _, value = (each.strip() for each in part.partition(":"))
        if key in ("fill", "stroke") and value.startswith("#"):
            colours.add(value)
            element.set("class", f"{element.get('class', '')} {key[0]}-{value[1:]}".strip())
        elif key in ("font", "font-size") and (size := re.search(r"([\d.]+)px", value)):
            element.set("font-size", size[1])
        elif key in KEPT:
            element.set(key, value)
    return colours


def _short(places: str) -> str:
    """Coordinates with two decimals, which is a hundredth of a point."""
    short = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), places)
    return re.sub(r"(^|[ (])-0(?=[ ,)]|$)", r"\g<1>0", " ".join(short.split()))


def make_swatch(group: ET.Element) -> Markup:
    """A short piece of a line with one of its markers, or one point, as an SVG for the legend."""
    root = ET.Element("svg", {"class": "swatch", "viewBox": "0 0 30 12", "aria-hidden": "true"})
    line, marker = group.find("path"), group.find(".//use")
    if line is not None:
        looks = {key: value for key, value in line.attrib.items() if key not in ("d", "clip-path")}
        ET.SubElement(root, "path", {"d": "M1 6H29", **looks})
    if marker is not None:
        looks = {key: value for key, value in marker.attrib.items() if key not in ("x", "y")}
        ET.SubElement(root, "use", {**looks, "x": "15", "y": "6"})
    return Markup(ET.tostring(root, encoding="unicode"))


def describe(root: ET.Element, name: str, title: str, description: str, width: float, height: float) -> None:
    """Give the SVG its title and description, and its place in the accessibility tree."""
    for i, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = UNPRINTABLE.sub(" ", text)
        root.insert(i, element)
    root.set("role", "group")
    root.set("aria-labelledby", f"{name}-title")
    root.set("aria-describedby", f"{name}-desc")
    root.set("viewBox", f"0 0 {width:g} {height:g}")
