"""Other threats that an L2 certificate covers: against the strongest attacks on linear classifiers, in closed form.

A linear classifier votes for the first class where w x > b. Smoothed with any sigma it is the same classifier, and its
certified radius at x is exactly (w x - b) / norm(w).
"""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from rrcm.evaluation.metrics import certified_accuracy
from rrcm.evaluation.threats import Threat, l1, linf, pixels, smallest_above
from rrcm.report.threats import listed_threats, threats

CHANNELS, PIXELS = 3, 16
SIZES = {"l1": (0.25, 1.0), "linf": (1, 8, 64), "pixels": (1, 2, 4)}


def make(kind: str, size: float) -> Threat:
    if kind == "l1":
        return l1(size)
    return linf(size, CHANNELS * PIXELS) if kind == "linf" else pixels(size, CHANNELS)


def strongest_attack(w: np.ndarray, x: np.ndarray, kind: str, size: float) -> float:
    """The most by which an attack within a threat lowers w x, with pixels x (P, C) kept in [0, 1]."""
    room = np.where(w > 0, x, 1 - x)  # how far each value can move against its weight
    if kind == "linf":
        return float((np.abs(w) * np.minimum(room, size / 255)).sum())
    if kind == "pixels":
        return float(np.sort((np.abs(w) * room).sum(1))[::-1][: int(size)].sum())
    lowered, left = 0.0, size
    for i in np.argsort(-np.abs(w), axis=None):
        step = min(left, room.flat[i])
        lowered, left = lowered + abs(w.flat[i]) * step, left - step
    return lowered


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind, sizes in SIZES.items() for size in sizes])
def test_no_attack_within_a_covered_threat_changes_the_class(kind, size):
    rng, threat, nearest = np.random.default_rng(0), make(kind, size), 0.0
    for _ in range(300):
        x = rng.uniform(size=(PIXELS, CHANNELS)).round() if rng.random() < 0.5 else rng.uniform(size=(PIXELS, CHANNELS))
        w = rng.standard_normal((PIXELS, CHANNELS)) * rng.uniform(size=(PIXELS, 1)) ** rng.integers(0, 20)
        margin = threat.radius * np.linalg.norm(w)  # w x - b where the radius is just enough
        lowered = strongest_attack(w, x, kind, size)
        assert lowered < margin * (1 + 1e-12)
        nearest = max(nearest, lowered / margin)
    assert nearest > 0.5  # the attacks come close


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind, sizes in SIZES.items() for size in sizes])
def test_a_smaller_radius_would_not_do(kind, size):
    """A linear classifier whose weights are where the threat is strongest is broken exactly at the radius."""
    w, x = np.zeros((PIXELS, CHANNELS)), np.ones((PIXELS, CHANNELS))
    w.flat[: {"l1": 1, "linf": w.size, "pixels": int(size) * CHANNELS}[kind]] = 1
    lowered = strongest_attack(w, x, kind, size) / np.linalg.norm(w)
    threat = make(kind, size)
    assert lowered == pytest.approx(threat.radius, rel=1e-12)
    assert Fraction(threat.radius) ** 2 > threat.squared >= Fraction(math.nextafter(threat.radius, 0)) ** 2


def test_the_boundary_itself_is_not_certified():
    assert smallest_above(Fraction(4)) == math.nextafter(2.0, 3.0)
    frame = pd.DataFrame({"radius": [0.5, 2.0, math.nextafter(2.0, 3.0)], "correct": 1})
    assert certified_accuracy(frame, [pixels(4, 1).radius]) == pytest.approx(1 / 3)
    assert certified_accuracy(frame, [l1(0.5).radius]) == pytest.approx(2 / 3)


def test_the_table_has_the_best_sigma_and_ends_with_what_nothing_certifies():
    small, large = (pd.DataFrame({"radius": radii, "correct": [1, 1, 0, 1]}) for radii in ([0.4] * 4, [1.2, 0, 9, 0.1]))
    table = threats({("rrcm", 0.25): small, ("rrcm", 1.0): large}, {}, "binary", image_size=8, channels=1)
    cells = table.text.iloc[0].to_dict()
    assert cells["L1 ≤ 0.25"] == "75.0" and cells["L1 ≤ 0.5"] == "25.0" and cells["any pixel"] == "25.0"
    assert cells["L∞ ≤ 8/255"] == "75.0" and cells["L∞ ≤ 16/255"] == "25.0"  # 0.25 and 0.5 in L2, and a bit
    assert cells["any 2 pixels"] == "0.0" and "any 4 pixels, or 2 × 2 patch" not in cells
    rows = table.numbers.set_index(["deployment", "threat", "size"])
    assert len(rows) == 2 * len(listed_threats(8, 1))
    share = rows.loc[("1", "pixels", 1)]
    assert share["low"] < share["certified_accuracy"] == 0.25 < share["high"]
