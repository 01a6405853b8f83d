"""Names of any kind, of classes, files and methods, are shown literally in figures, Markdown, HTML and LaTeX."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented_run import EXTERNAL, frame_of, make_config, render, write_report
from markdown_it import MarkdownIt

from rrcm.certification.results import read_certificates
from rrcm.report import fonts, page, tables
from rrcm.report.accuracy_figures import draw_comparison
from rrcm.report.build import read_gallery
from rrcm.report.certified_images import certificate_table
from rrcm.report.figures import save
from rrcm.report.gallery import Thumbnail, draw_gallery
from rrcm.report.inputs import read_inputs
from rrcm.report.latex import latex_text
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import write_json

CLASSES = ["Ba$$in", "a|b", "<b>&amp;", "x & y", "`tick`", "_under_ *star*", "日本", r"$\frac{1}", "[link](x)", "a\nb"]


HOSTILE = [
    "<script>alert(1)</script><!--",
    "](javascript:alert(1)) ![x](y) <a@b.c>",
    "two\r\nlines\tof \x1b[31mred\x07\x9b2J",
    "\u202egnp.exe\u2066",
    "\u05e2\u05d1\u05e8\u05d9\u05ea\u200f \ufdfd",
    "\U0001f600 \U0001f3f3\ufe0f\u200d\U0001f308",
    "n" * 150 + "m" * 150,
    "null\x00 \x85\u2028",
    "~~x~~ \\$ &lt; https:",
    "\\",
]


def with_classes(root: Path, classes: list[str]) -> Path:
    """A copy of the inputs in root/../renamed, with other class names in its manifest and models.

    The last class has the images of all classes that are left over.
    """
    copy = root.parent / "renamed"
    shutil.copytree(root, copy, dirs_exist_ok=True)
    path = copy / "data/shards/manifest.json"
    manifest = json.loads(path.read_text()) | {"classes": classes, "source": "other digits"}
    for split in manifest["splits"].values():
        last = len(classes) - 1
        split["counts"] = [*split["counts"][:last], sum(split["counts"][last:])]
    write_json(path, manifest)
    for model in copy.glob("models/*/sigma_*/config.json"):
        write_json(model, json.loads(model.read_text()) | {"class_names": classes})
    return copy


def to_html(markdown: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(markdown)


def plain_text(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


@pytest.mark.thorough
@pytest.mark.parametrize("classes", [CLASSES, HOSTILE], ids=["odd", "hostile"])
def test_class_names_are_shown_literally_in_figures_and_markdown(invented_report, tmp_path: Path, classes: list[str]):
    config, root = invented_report
    renamed = with_classes(root, classes)
    inputs = read_inputs(config, renamed)
    gallery = read_gallery(config, renamed, inputs.certificates)
    save(draw_gallery(gallery.clean, gallery.noisy, "rRCM"), tmp_path / "gallery.svg")
    ET.parse(tmp_path / "gallery.svg")
    html = to_html(render(config, renamed, inputs, gallery.classes))
    names = [printable(" ".join(name.split())) for name in classes]
    frame = read_certificates(root / "certificates/rrcm/sigma_1.0.tsv")
    *first, last = [f"{name} ({(frame['label'] == label).sum()})" for label, name in enumerate(names)]
    assert f"\nImages of each class: {', '.join(first)} and {last}.\n" in plain_text(html).replace("</p>", "\n")
    sentence = plain_text(html).split("True classes, from left to right: ")[1].split(".\n")[0]
    assert set(re.split(", | and ", sentence)) <= set(names)
    assert not {"script", "a", "b", "i", "del"} & set(re.findall(r"<(\w+)", html))
    assert html.count("<img") == 6
    assert printable(html.replace("\n", "")) == html.replace("\n", "")
    table = to_html(tables.markdown_text(pd.DataFrame({"a|b": classes})))
    assert [unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", table)] == ["a|b", *names]
    latex = latex_text(tables.Table(pd.DataFrame(), pd.DataFrame({"": classes})))
    assert printable(latex.replace("\n", "")).count(r"\\") >= len(classes)


@given(st.text(st.characters(), max_size=40))
@settings(max_examples=300, deadline=None)
def test_markdown_shows_any_text_literally(text: str):
    text = f"-{text}"  # at least one visible character
    html = to_html(f"Class {tables.escape_markdown(text)}, code {page._code(text)}.\n")
    shown = printable(" ".join(text.split()))
    assert unescape(html) == f"<p>Class {shown}, code <code>{shown}</code>.</p>\n"


@pytest.mark.thorough
def test_more_classes_in_the_certificates_than_in_the_shards_raise(invented_report, tmp_path: Path):
    config, root = invented_report
    with pytest.raises(
        RRCMError, match=r"data/shards/test.index.npy: does not fit manifest.json; run shard-data again"
    ):
        write_report(config, with_classes(root, ["a", "b", "c"]), tmp_path / "out")


@pytest.mark.parametrize("classes", [CLASSES, HOSTILE], ids=["odd", "hostile"])
@pytest.mark.filterwarnings("error")
def test_class_names_fit_below_their_images(classes: list[str]):
    thumbnails = [Thumbnail(np.zeros((2, 2, 1)), name, name * 9, 0.5, "correct") for name in classes]
    figure = draw_gallery([each.pixels for each in thumbnails], {0.5: thumbnails}, "rRCM")
    fonts.set_fonts(figure)
    figure.draw_without_rendering()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert classes is HOSTILE or labels[0] == r"Ba\$\$in"
    assert all(printable(line) == line for label in labels for line in label.split("\n"))
    for axes in figure.axes:
        assert axes.xaxis.label.get_window_extent().width < axes.get_window_extent().width


def test_table_of_certify_prints_no_control_characters():
    names = [*HOSTILE, "not UTF-8 \udcff"]
    frame = pd.DataFrame({"file": names, "class": names, "predict": 0, "radius": 0.5, "samples": 100})
    lines = certificate_table(frame).split("\n")
    assert len(lines) == 2 + len(names) and all(printable(line) == line for line in lines)


@pytest.mark.filterwarnings("error")
def test_legend_fits_with_any_names(tmp_path: Path):
    names = [
        *CLASSES,
        *HOSTILE,
        "not UTF-8 \udcff",
        " ",
        "_child",
        "n" * 149 + "o" + "m" * 150,
    ]  # the last is like another when shortened
    figure = draw_comparison({name: frame_of(0.1, 0.2) for name in names})
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names)
    fonts.set_fonts(figure)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    save(figure, tmp_path / "names.svg")
    ET.parse(tmp_path / "names.svg")


@pytest.mark.filterwarnings("error")
def test_missing_letters_come_from_other_installed_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A letter that DejaVu Sans lacks is drawn in another font, which comes with matplotlib. A note names boxes."""
    letter, nowhere = "\u1d15", "\u0378"  # of DejaVu Serif, and of no font: unassigned
    assert fonts.font_families(f"a{letter}") == ["DejaVu Sans", "DejaVu Serif"]
    assert fonts.truncate(f"a{letter}{nowhere}", 70, 8) == f"a{letter}□"
    figure = draw_comparison({f"a{letter}": frame_of(0.1, 0.2)})
    save(figure, tmp_path / "with.png")
    assert figure.legends[0].get_texts()[0].get_fontfamily() == ["DejaVu Sans", "DejaVu Serif"]
    assert fonts.note_on_letters(["a", letter, "line\nbreak"]) is None
    monkeypatch.setattr(fonts, "_family_of", lambda sign: "DejaVu Sans" if sign.isascii() else None)
    note = fonts.note_on_letters(["cat", "\u732b", "\u72ac"])
    assert note == (
        "no font here has \u72ac \u732b (CJK), so figures show boxes; install one that has, such as Noto Sans CJK"
    )
    assert "(THAI)" in fonts.note_on_letters(["\u0e41"]) and "Noto Sans Thai" in fonts.note_on_letters(["\u0e41"])


@pytest.mark.thorough
def test_html_in_labels_and_paths_is_escaped(invented_report, tmp_path: Path):
    _, root = invented_report
    shutil.copytree(root, tmp_path / "root")
    path = "external/</pre>&.tsv"
    (tmp_path / "root/external/<").mkdir()
    (tmp_path / "root" / path).write_bytes((root / EXTERNAL[0]["path"]).read_bytes())
    label = "A & <i>B</i>\x1b[0m\u202e\r$x$"
    config = make_config(external=[EXTERNAL[0] | {"label": label, "path": path}])
    write_report(config, tmp_path / "root", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert text.count("<pre") == text.count("</pre>") and text.count("<details>") == text.count("</details>")
    assert "external/&lt;/pre&gt;&amp;.tsv" in text
    assert r"A \& \<i\>B\</i\>\\x1b\[0m\\u202e \$x\$ (external)" in text
    for path in (tmp_path / "out").glob("*.svg"):
        ET.parse(path)
    for path in [*(tmp_path / "out").glob("*.md"), *(tmp_path / "out").glob("*.tex")]:
        lines = path.read_text().replace("\n", "")
        assert printable(lines) == lines
