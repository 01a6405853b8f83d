"""The page of `rrcm compare`: curves of certified accuracy, the table, and differences to a reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from rrcm.evaluation.metrics import average_certified_radius
from rrcm.report.accuracy_figures import draw_comparison
from rrcm.report.html import render_page
from rrcm.report.html_figures import make_figure
from rrcm.report.html_tables import table_of
from rrcm.utils.errors import printable
from rrcm.utils.files import sha256_file


def render_comparison_page(
    certificates: Mapping[str, pd.DataFrame],
    paths: Mapping[str, str],
    tables: Sequence[pd.DataFrame],
    reference: str | None,
    notes: Sequence[str],
) -> str:
    """The text of the page.

    The keys of `certificates` and of the `paths` of their files are the names that the user gives. `tables` are the
    table of certified accuracies and, with a `reference`, the table of differences. `notes` are about the images.
    """
    acr = {name: average_certified_radius(frame) for name, frame in certificates.items()}
    description = f"Exact curves of certified accuracy against L2 radius of {', '.join(map(printable, certificates))}."
    figure = make_figure(draw_comparison(certificates), "accuracy", "Certified accuracy", description)
    return render_page(
        "comparison.html.jinja",
        figures={"accuracy": figure},
        names=list(certificates),
        best=max(acr, key=acr.get),
        acr=max(acr.values()),
        images=len(next(iter(certificates.values()))),
        tables=[table_of(table.rename(columns={"": "file"})) for table in tables],
        reference=reference,
        notes=notes,
        hashes=[f"{sha256_file(Path(path))}  {printable(path)}" for path in paths.values()],
    )
