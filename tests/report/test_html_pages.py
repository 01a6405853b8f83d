"""HTML pages: what their policy allows, names of any kind, what they find, and how large they get."""

import re
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from matplotlib.figure import Figure
from test_deployment import frame_of as deployed_frame
from test_deployment import record_of
from test_names import HOSTILE

from rrcm.evaluation.metrics import acr_difference, average_certified_radius, certified_accuracy, wilson_interval
from rrcm.report import svg_size
from rrcm.report.accuracy_figures import draw_certified_accuracy
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.certified_page import image_table, shorten
from rrcm.report.comparison_page import render_comparison_page
from rrcm.report.figures import save_all, series_id
from rrcm.report.findings import _ahead, find
from rrcm.report.html import csp_hash
from rrcm.report.html_colours import DARK_INK, DARK_PAPER, LEAST_CONTRAST, contrast, dark_colour
from rrcm.report.html_figures import make_figure
from rrcm.report.html_tables import make_table, table_of
from rrcm.report.inputs import read_inputs
from rrcm.report.page import compared_methods
from rrcm.report.prose import NamedTable, Paragraph, Picture, read_sections
from rrcm.report.report_page import arrange
from rrcm.report.svg_size import relative
from rrcm.report.thumbnails import make_answer, make_card
from rrcm.utils.errors import UNPRINTABLE, printable

MOST_BYTES = 2_000_000


class Reader(HTMLParser):
    """The elements and the text of a page, as a browser without script sees them."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def frame(*radii: float) -> pd.DataFrame:
    """Certificates with these radii; a negative one belongs to a wrong class."""
    return deployed_frame(list(radii))


def page_of(invented_report) -> str:
    return (invented_report[1] / "reports/digits/index.html").read_text(encoding="utf-8")


def test_the_policy_allows_the_inline_style_and_script_and_nothing_else(invented_report):
    page = page_of(invented_report)
    policy = unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1])
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script"))
    assert policy.split("; ")[:4] == [
        "default-src 'none'",
        f"style-src '{csp_hash(style)}'",
        f"script-src '{csp_hash(script)}'",
        "img-src data:",
    ]
    elements = Reader(page).elements
    assert len(page.encode()) < MOST_BYTES and len(elements) > 1000
    for tag, attributes in elements:
        assert not attributes.keys() & {"style", "onclick", "onload"}, tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = {attributes["href"][1:] for _, attributes in elements if (attributes.get("href") or "").startswith("#")}
    assert links <= set(ids)


def test_the_page_has_all_that_report_md_has(invented_report):
    _, root = invented_report
    markdown = (root / "reports/digits/report.md").read_text(encoding="utf-8").split("\n## Provenance\n")[0]
    text = " ".join("".join(Reader(page_of(invented_report)).text).split())
    for section in read_sections(markdown):
        for block in section.blocks:
            if isinstance(block, Paragraph):
                assert " ".join("".join(part for _, part in block.spans).split()) in text
            elif isinstance(block, NamedTable):
                assert all(cell.text in text for row in block.table.rows for cell in row)
            elif isinstance(block, Picture) and block.name != "gallery":
                assert f'id="figure-{block.name}"' in page_of(invented_report)
    assert "0" * 40 in text and "cpu: a CPU" in text and "certificates/rrcm/sigma_0.25.tsv" in text


def test_what_is_new_in_report_md_needs_no_further_code():
    markdown = "# run\n\nA \\*new\\* *word* and `code`.\n\n## Figures\n\n![new](new.png)\n\nWhat it shows.\n\n"
    markdown += "### More\n\n| a | b |\n|---|---|\n| x \\| y | 1.0 (2) |\n\n"
    markdown += "<details>\n<summary>Table</summary>\n\n| a |\n|---|\n| \\<b\\> |\n\n</details>\n"
    first, second = read_sections(markdown)
    assert first.blocks == [Paragraph([("", "A *new* "), ("em", "word"), ("", " and "), ("code", "code"), ("", ".")])]
    picture, _, one, other = second.blocks
    assert picture == Picture("new", [[("", "What it shows.")]])
    assert (one.label, other.label) == ("More", "More, table 2")
    assert one.table == make_table(["a", "b"], [["x | y", "1.0 (2)"]]) and other.table.rows[0][0].text == "<b>"
    assert [cell.is_number for cell in one.table.head] == [False, True]


def test_one_deployment_comes_first_with_its_figure():
    text = "# run\n\na\n\n## One deployment\n\nb\n\n## Figures\n\n![deployment](deployment.png)\n\nc\n\n![e](e.png)\n"
    sections = arrange(read_sections(text))
    assert [section.title for section in sections] == ["One deployment", "Certified accuracy", "Figures"]
    assert sections[0].blocks[0] == Picture("deployment", [[("", "c")]]) and len(sections[2].blocks) == 1


def test_the_findings_follow_from_the_certificates(invented_report):
    config, root = invented_report
    inputs = read_inputs(config, root)
    alone = find(config, inputs, compared_methods(config, inputs))
    best = max(inputs.certificates, key=lambda run: average_certified_radius(inputs.certificates[run]))
    frames = inputs.certificates
    assert (alone.deployed.sigma, alone.deployed.acr) == (best[1], average_certified_radius(frames[best]))
    for at in alone.deployed.at:
        assert at.accuracy == 100 * certified_accuracy(frames[best], [at.radius])[0] <= at.best
    seconds = np.median(inputs.latency["methods"]["rrcm"]["seconds_per_sample"])
    assert alone.cost.seconds == pytest.approx(seconds * (config.latency.n[0] + config.certify.n0))
    ahead, methods = alone.ahead, {"rRCM": "rrcm", "Consistency": "consistency"}
    first, second = (frames[methods[label], ahead.sigma] for label in (ahead.first, ahead.second))
    assert ahead.difference == acr_difference(first, second) and ahead.difference.value > 0
    assert ahead.group == "equal fine-tuning budget" and ahead.is_significant == (ahead.difference.low > 0)

    method = config.methods[0]
    record = record_of(sigmas=config.sigmas, thresholds=[0.0])
    largest = frames[method, config.sigmas[-1]].assign(accepting_sigma=config.sigmas[-1])
    cascaded = inputs._replace(cascades={method: Cascade(record, largest, None, {"certification": 1.0}, {})})
    deployed = find(config, cascaded, {}).deployed
    assert deployed.sigma is None and deployed.shortfall.deployments == "two"
    assert deployed.at[0].accuracy == 100 * certified_accuracy(largest, [deployed.at[0].radius])[0]
    assert deployed.ratio == largest["samples"].mean() / frames[method, config.sigmas[0]]["samples"].mean()


def test_a_joint_network_is_not_ahead_of_its_own_experts():
    frames = {("rrcm_joint", 0.5): frame(0.9, 0.9), ("rrcm", 0.5): frame(0.8, 0.8), ("gaussian", 0.5): frame(0.1, 0.3)}
    ahead = _ahead("any cost", ["rrcm", "rrcm_joint", "gaussian"], frames)
    assert (ahead.first, ahead.second, ahead.sigma) == ("rRCM, joint", "Gaussian", 0.5) and ahead.is_significant
    assert ahead.difference.value == pytest.approx(0.7)


def test_a_figure_has_the_values_of_its_curves_with_intervals():
    frames = {("rrcm", 0.5): frame(0.2, 0.4, -1), ("gaussian", 0.5): frame(0.1, 0.3, 0.7)}
    figure = draw_certified_accuracy(frames, {})
    before = [each.get_position().bounds for each in figure.axes], len(figure.legends)
    made = make_figure(figure, "accuracy", "A & B", "What it <shows>")
    assert len(figure.legends) == before[1] == 1 and [entry.label for entry in made.legend] == ["rRCM", "Gaussian"]
    (panel,) = made.panels
    assert panel.title == "σ = 0.5" and panel.keys == ["rrcm", "gaussian"] and panel.table.head[1].text == "rRCM"
    for row, place in zip(panel.table.rows, panel.rows, strict=True):
        radius, texts = float(row[0].text), [cell.text for cell in row[1:]]
        for text, each in zip(texts, frames.values(), strict=True):
            share = certified_accuracy(each, [radius])[0]
            low, high = (100 * float(bound) for bound in wilson_interval(share, 3))
            assert text == f"{100 * share:.1f} ({max(low, 0):.1f} to {high:.1f})"
        assert panel.box[0] <= place.x <= panel.box[0] + panel.box[2]
    drawn = ET.fromstring(made.svg)
    assert drawn.find("title").text == "A & B" and drawn.find("desc").text == "What it <shows>"
    assert "style=" not in made.svg and {f"#{i}" for i in ("0072b2",)} <= set(made.colours)
    assert made == make_figure(draw_certified_accuracy(frames, {}), "accuracy", "A & B", "What it <shows>")


def test_a_figure_has_no_space_for_the_legend_that_was_taken_away(tmp_path: Path):
    figure = draw_certified_accuracy({("rrcm", 0.5): frame(0.2), ("gaussian", 0.5): frame(0.1)}, {})
    save_all({"accuracy": figure}, tmp_path)  # which keeps the layout from changing later
    drawn = ET.fromstring(make_figure(figure, "accuracy", "A", "B").svg)
    height = float(drawn.get("viewBox").split()[3])
    assert height - 8 < max(float(text.get("y")) for text in drawn.iter("text")) < height


def test_a_line_without_points_is_left_out_of_the_data():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([], [], label="none", gid=series_id("none"))
    assert make_figure(figure, "empty", "Empty", "").panels == []
    axes.plot([0, 1], [2, 3], label="some", gid=series_id("some"))
    (panel,) = make_figure(figure, "empty", "Empty", "").panels
    assert [cell.text for cell in panel.table.head][1:] == ["some"]


def vertices(path: str) -> np.ndarray:
    """The places that a path of M, L, h, v, l and z visits, in points (V, 2)."""
    number, places, first = re.compile(r"-?(?:\d+\.?\d*|\.\d+)"), [], np.zeros(2)
    for letter, text in re.findall("([MLhvlz])([^a-zA-Z]*)", path):
        numbers = iter(map(float, number.findall(text)))
        if letter in "ML":
            places += [np.array(pair) for pair in zip(numbers, numbers, strict=True)]
            first = places[-1] if letter == "M" else first
        elif letter == "z":
            places.append(first)
        elif letter == "l":
            places += [places[-1] + step for step in np.cumsum(list(zip(numbers, numbers, strict=True)), axis=0)]
        else:
            across = np.array([letter == "h", letter == "v"], float)
            places += [places[-1] + step * across for step in np.cumsum(list(numbers))]
    return np.array(places)


@pytest.mark.parametrize("steps", [False, True])
def test_a_relative_path_visits_the_same_places(steps):
    rng = np.random.default_rng(0)
    places = np.cumsum(rng.choice([-1, 1], (300, 2)) * rng.uniform(1, 9, (300, 2)).round(2), axis=0)
    if steps:
        places = np.column_stack([np.repeat(places[:, 0], 2)[1:], np.repeat(places[:, 1], 2)[:-1]])
    path = " ".join(f"{'L' if i % 100 else 'M'} {x:g} {y:g}" for i, (x, y) in enumerate(places.tolist())) + " z"
    assert np.abs(vertices(relative(path)) - vertices(path)).max() <= 0.05 + 1e-9
    assert len(relative(path)) < (0.55 if steps else 0.75) * len(path)


def test_curves_and_dots_keep_their_form():
    assert relative("M 0 2.25 C 0.6 2.25 1.17 2.01 1.59 1.59 z") == "M 0 2.25 C 0.6 2.25 1.17 2.01 1.59 1.59 z"
    assert relative("M 3 4 L 3 4") == "M3 4h0"
    assert relative("M 0 0.5 L 0.25 0.5 M 7 1 L 7 0.26 L 7 0.26") == "M0 .5h.2M7 1v-.7"


def test_what_neighbours_have_in_common_is_said_once():
    marks = "".join(f'<use x="{i}" class="a" stroke="b" href="#m" />' for i in range(3))
    root = ET.fromstring(f'<svg><g><g data-series="k"><g clip="c">{marks}</g></g><text /></g></svg>')
    svg_size.shorten(root)
    uses = "".join(f'<use x="{i}" href="#m" />' for i in range(3))
    drawn = f'<g clip="c"><g class="a" stroke="b">{uses}</g></g>'
    expected = ET.fromstring(f'<svg><g data-series="k">{drawn}</g><text /></svg>')
    assert ET.canonicalize(ET.tostring(root)) == ET.canonicalize(ET.tostring(expected))


@pytest.mark.parametrize("kept", ['opacity="0.2"', 'clip-path="url(#c)" transform="scale(2)"'])
def test_what_a_group_would_draw_otherwise_stays_where_it_is(kept):
    """A group's opacity blends its children as one, and a clip path moves with the transformation of its element."""
    root = ET.fromstring(f'<svg><use {kept} href="#m" /><use {kept} href="#m" /></svg>')
    before = ET.canonicalize(ET.tostring(root))
    svg_size.shorten(root)
    assert ET.canonicalize(ET.tostring(root)) == before


def test_a_large_figure_is_thinned_out(monkeypatch):
    radii = np.linspace(0, 2, 2000)
    monkeypatch.setattr(svg_size, "MOST_PATHS", 10**6)
    whole = make_figure(draw_certified_accuracy({("rrcm", 0.5): frame(*radii)}, {}), "a", "A", "B")
    monkeypatch.setattr(svg_size, "MOST_PATHS", 20_000)
    thin = make_figure(draw_certified_accuracy({("rrcm", 0.5): frame(*radii)}, {}), "a", "A", "B")
    first, second = (ET.fromstring(each.svg) for each in (whole, thin))
    paths = list(zip(first.iter("path"), second.iter("path"), strict=True))
    line, short = max(paths, key=lambda pair: len(pair[0].get("d")))
    assert len(line.get("d")) > 10_000 > 2 * len(short.get("d"))
    assert np.abs(vertices(line.get("d"))[[0, -1]] - vertices(short.get("d"))[[0, -1]]).max() < 0.3
    assert whole.panels == thin.panels


def test_names_of_any_kind_are_shown_literally(tmp_path: Path):
    path = tmp_path / "one.tsv"
    path.write_text("a file")
    certificates = {name: frame(0.2, 0.4) for name in HOSTILE}
    table = pd.DataFrame({"": [printable(name) for name in HOSTILE], "r = 0": "1.0"})
    page = render_comparison_page(certificates, {HOSTILE[0]: str(path)}, [table], None, [])
    reader = Reader(page)
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert not any(UNPRINTABLE.search(line.expandtabs()) for line in page.split("\n"))
    cells = ["".join(Reader(row).text) for row in re.findall(r'<th scope="row">(.*?)<td', page)]
    assert cells[-len(HOSTILE) :] == [printable(name) for name in HOSTILE]
    hebrew = re.search(r"<bdi>(.*?)</bdi>", page)[1]
    assert hebrew == HOSTILE[4].split("\u200f")[0]


def test_every_colour_can_be_read():
    style = (REPOSITORY / "rrcm/report/templates/page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )

    def rgb(colour: str) -> list[int]:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * sign for sign in colour[1:])
        return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]

    assert rgb(dark["paper"]) == list(DARK_PAPER) and rgb(dark["ink"]) == list(DARK_INK)
    for colours in (light, dark):
        for paper in ("paper", "raised"):
            for ink in ("ink", "muted", "accent", "good", "bad"):
                assert contrast(rgb(colours[ink]), rgb(colours[paper])) >= LEAST_CONTRAST, (ink, paper)
    for colour in ("#0072b2", "#00224e", "#117733"):
        assert contrast(rgb(dark_colour(colour)), DARK_PAPER) >= LEAST_CONTRAST
    assert rgb(dark_colour("#000000")) == list(DARK_INK) and rgb(dark_colour("#ffffff")) == list(DARK_PAPER)


def test_tables_are_shortened_where_a_page_would_be_too_large():
    files = [f"{i:05}{'x' * 90}.png" for i in range(10_000)]
    columns = {"file": files, "predict": 0, "label": -1, "radius": 0.1239, "samples": 1000, "class": "a"}
    columns["stop_reason"] = "whole grid"
    table = table_of(image_table(pd.DataFrame(columns), ["a"]))
    shorter = shorten(table)
    assert 3000 < len(shorter.rows) < 6000
    assert shorter.rows[0] == table.rows[0] and [cell.text for cell in shorter.rows[0][1:]] == ["a", "0.123", "1,000"]
    assert shorten(table._replace(rows=table.rows[:100])).rows == table.rows[:100]


def test_an_image_whose_likeliest_class_is_wrong_has_no_radius():
    """Sampling has stopped before anything was certified. An image that was certified as another class has one."""
    columns = {"file": ["a/1.png", "a/2.png"], "predict": 1, "label": 0, "radius": [0.0, 0.25], "samples": 100}
    columns |= {"class": "b", "stop_reason": ["wrong class", "futile"]}
    rows = image_table(pd.DataFrame(columns), ["a", "b"])
    assert rows["radius"].tolist() == ["", "0.250"] and rows["answer"].tolist() == ["wrong", "wrong"]


@pytest.mark.parametrize(("shape", "kind"), [((8, 8), "png"), ((32, 32, 3), "png"), ((300, 200, 3), "jpeg")])
def test_thumbnails_are_small(shape: tuple[int, ...], kind: str):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    card = make_card(pixels, "a", "one.png", [make_answer("wrong", "b", 0.0), make_answer("certified", "c", 0.2599)])
    assert card.source.startswith(f"data:image/{kind};base64,") and len(card.source) < 5000
    assert [(answer.text, answer.radius) for answer in card.answers] == [("✗ b", ""), ("c", "0.259")]
