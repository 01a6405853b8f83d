"""How often an audit accepts an honest certificate file, and how often it detects a forged one.

The model votes twice on all images: with the published settings, and with the given options. Run this on the type of
machine that published the file. Each try audits randomly chosen rows, either honest or forged. If the options equal the
published settings, all counts must be equal. Environment variables imitate other CPUs:

    python benchmarks/audit.py certificates/rrcm/sigma_0.5.tsv --precision fp32
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/audit.py certificates/rrcm/sigma_0.5.tsv
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import typer
from tabulate import tabulate

from rrcm.utils.app import keep_freed_memory
from rrcm.certification.audit import Audit, allow, check_file, compare_close, compare_equal, find_inputs
from rrcm.certification.record import CertificateRecord
from rrcm.certification.revote import (
    Inputs,
    RowVotes,
    Settings,
    load_inputs,
    published_votes,
    same_computation,
    smooth_again,
    vote_again,
)
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState, certificate, choose_class, decide
from rrcm.certification.stopping import StoppingRule

RAISE = 0.05  # pixel units


def count_all_looks(
    scales: Sequence[SmoothedClassifier], inputs: Inputs, rule: StoppingRule, idx: Sequence[int]
) -> list:
    """The votes for each image at every look."""
    looks = {str(m): {} for m in rule.looks}
    rows = [RowVotes(i, {"0": rule.n0}, looks) for i in idx]
    return [row for group in vote_again(scales, inputs, rows) for row in group]


def forge(
    row: RowVotes, label: int, radius: float, record: CertificateRecord, rule: StoppingRule, draw: np.random.Generator
) -> RowVotes | None:
    """A consistent row whose radius is larger by RAISE, because some votes were moved to the top class.

    The share of moved votes is the smallest that suffices, in steps of 1 %. Returns None if none suffices.
    """
    for share in np.arange(0.01, 1.0, 0.01):
        state = ImageState(row.idx, None, label, dict(row.selection), samples=rule.n0)
        choose_class(state, rule)
        before, forged = {}, {}
        for m in rule.looks:
            new = {k: count - before.get(k, 0) for k, count in row.votes[str(m)].items()}
            before = row.votes[str(m)]
            for k, count in new.items():
                moved = 0 if int(k) == state.top_class else int(draw.binomial(count, share))
                forged[k] = forged.get(k, 0) + count - moved
                forged[str(state.top_class)] = forged.get(str(state.top_class), 0) + moved
            state.counts = {k: count for k, count in forged.items() if count}
            state.num_drawn, state.samples = m, rule.n0 + m
            decide(state, rule, record.num_classes)
            if state.stop_reason:
                break
        certified = certificate(state, rule, record.num_classes)
        if certified.radius >= radius + RAISE - 1e-9:
            return RowVotes(row.idx, row.selection, state.votes)
    return None


def at_looks(published: RowVotes, everywhere: RowVotes) -> RowVotes:
    """The votes at the looks that are recorded in the published row."""
    return RowVotes(published.idx, everywhere.selection, {m: everywhere.votes[m] for m in published.votes})


def measure(
    file: Path,
    model: str | None = None,
    images: Path | None = None,
    precision: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    rows: int = 100,
    tries: int = 100,
    forgeries: int = 1000,
    false_alarm: float = 1e-3,
) -> None:
    """Audit random rows of FILE, which is no cascade's, as published and after forgeries."""
    keep_freed_memory()
    record, frame, problems = check_file(file)
    models, images = find_inputs(file, model and [model], images)
    inputs, others = load_inputs(file, record, frame, models, images)
    assert not problems + others, problems + others
    rule, idx = record.rule(), frame["idx"].tolist()
    certified = smooth_again(record, inputs)
    original = count_all_looks(certified, inputs, rule, idx)
    smoothed = smooth_again(record, inputs, Settings(precision, batch_size, threads))
    exact = same_computation(record, smoothed[0])
    again = count_all_looks(smoothed, inputs, rule, idx)
    honest = published_votes(frame, record)
    tolerance, problems, _ = allow(file, record, inputs, smoothed, honest, false_alarm)
    assert not problems, problems

    def audit(published: Sequence[RowVotes], choice: random.Random) -> Audit:
        chosen = sorted(choice.sample(range(len(idx)), min(rows, len(idx))))
        pairs = [published[i] for i in chosen], [at_looks(published[i], again[i]) for i in chosen]
        if exact:
            return compare_equal(file, record, len(idx), *pairs)
        return compare_close(file, record, len(idx), tolerance, *pairs)

    draw, columns = np.random.default_rng(0), zip(original, frame["label"], frame["radius"], strict=True)
    forged = [forge(row, label, radius, record, rule, draw) if radius > 0 else None for row, label, radius in columns]
    possible, few = [i for i, row in enumerate(forged) if row], max(1, round(0.05 * len(idx)))

    def with_some_raised(choice: random.Random) -> list[RowVotes]:
        raised = set(choice.sample(possible, min(few, len(possible))))
        return [forged[i] if i in raised else honest[i] for i in range(len(idx))]

    def count(times: int, publish: Callable[[random.Random], list[RowVotes]]) -> str:
        refused = sum(bool(audit(publish(random.Random(i)), random.Random(-1 - i)).problems) for i in range(times))
        return f"{refused} of {times}"

    table = [["honest", count(tries, lambda choice: honest)]]
    table.append([f"radii and votes raised by {RAISE} in {few} rows", count(forgeries, with_some_raised)])
    everywhere = [raised or row for raised, row in zip(forged, honest, strict=True)]
    table.append([f"radii and votes raised by {RAISE} in all rows", count(tries, lambda choice: everywhere)])
    other = count_all_looks(other_seed(record, inputs), inputs, rule, idx)
    table.append(["votes of another seed", count(tries, lambda choice: [*map(at_looks, honest, other)])])
    how = f"{smoothed[0].precision}, batch {smoothed[0].batch_size}, {'equal counts' if exact else 'other rounding'}"
    print(f"{file}, voted again in {how}: {rows} of {len(idx)} rows, false alarm {false_alarm:g}")
    moved = audit(honest, random.Random(0))
    print(
        f"{moved.moved:,} of {moved.samples:,} honest votes differ; claims to detect {moved.detectable} of forgeries\n"
    )
    print(tabulate(table, ["file", "NOT verified"], tablefmt="github"))


def other_seed(record: CertificateRecord, inputs: Inputs) -> list[SmoothedClassifier]:
    """The certified computation with different noise."""
    return smooth_again(record.model_copy(update={"seed": record.seed + 1}), inputs)


if __name__ == "__main__":
    typer.run(measure)
