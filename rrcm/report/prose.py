"""Read the text of report.md: its sections with their paragraphs, tables and figures, for the page of the report.

The prose of the report exists only in report.md. Text that is added there also appears on the page.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from rrcm.report.html_tables import PageTable, make_table

Spans = list[tuple[str, str]]  # inline text: "", "strong", "em" or "code", and a text
STYLES = {"strong_open": "strong", "em_open": "em"}


class Paragraph(NamedTuple):
    """A paragraph."""

    spans: Spans


class Heading(NamedTuple):
    """A heading within a section."""

    text: str


class NamedTable(NamedTuple):
    """A table with a name for its readers."""

    label: str
    table: PageTable


class Picture(NamedTuple):
    """A figure with its caption."""

    name: str  # of the file, without its suffix
    caption: list[Spans]  # paragraphs

    @property
    def text(self) -> str:
        """The caption as plain text."""
        return " ".join(plain_text(spans) for spans in self.caption)


Block = Paragraph | Heading | NamedTable | Picture


class Section(NamedTuple):
    """A section with its heading."""

    title: str
    blocks: list[Block]


def read_sections(markdown: str) -> list[Section]:
    """The sections of a text in Markdown, each with a heading of the first or the second level.

    The paragraphs after a picture, up to the next picture or heading, are its caption. Elements of HTML in lines of
    their own, which fold a table in Markdown, are left out: a page shows the table. Links and lists, which report.md
    does not have, are not known.
    """
    parser = MarkdownIt("commonmark").enable("table").disable(["link", "autolink", "list", "html_inline"])
    sections: list[Section] = []
    tokens = iter(parser.parse(markdown))
    for token in tokens:
        if token.type == "heading_open":
            text = plain_text(_spans(next(tokens).children))
            if token.tag in ("h1", "h2"):
                sections.append(Section(text, []))
            else:
                sections[-1].blocks.append(Heading(text))
        elif token.type == "paragraph_open":
            _add_paragraph(sections[-1].blocks, next(tokens).children)
        elif token.type == "table_open":
            table = make_table(*_read_table(tokens))
            sections[-1].blocks.append(NamedTable(_label(sections[-1]), table))
    return sections


def _add_paragraph(blocks: list[Block], children: Sequence[Token]) -> None:
    if len(children) == 1 and children[0].type == "image":
        blocks.append(Picture(str(children[0].attrs["src"]).rpartition(".")[0], []))
    elif blocks and isinstance(blocks[-1], Picture):
        blocks[-1].caption.append(_spans(children))
    else:
        blocks.append(Paragraph(_spans(children)))


def _read_table(tokens: Iterator[Token]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a table, whose first token has been read."""
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(plain_text(_spans(token.children)))
    return rows[0], rows[1:]


def _label(section: Section) -> str:
    """A name for the next table of a section: the last heading, with a number if it has several tables."""
    heading = next((block.text for block in reversed(section.blocks) if isinstance(block, Heading)), section.title)
    earlier = sum(isinstance(block, NamedTable) and block.label.startswith(heading) for block in section.blocks)
    return f"{heading}, table {earlier + 1}" if earlier else heading


def _spans(children: Sequence[Token]) -> Spans:
    """Inline tokens as texts with the innermost style of each."""
    spans, styles = [], [""]
    for token in children:
        if token.type in STYLES:
            styles.append(STYLES[token.type])
        elif token.type.endswith("_close"):
            styles.pop()
        elif token.type == "code_inline":
            spans.append(("code", token.content))
        elif token.type in ("softbreak", "hardbreak"):
            spans.append(("", " "))
        elif token.content:
            spans.append((styles[-1], token.content))
    return spans


def plain_text(spans: Spans) -> str:
    """Inline text without its styles."""
    return "".join(text for _, text in spans)
