"""The numbers of docs/guide.md agree with the code."""

import re

import pytest
from conftest import REPOSITORY
from scipy.special import ndtr

from rrcm.certification.ceiling import largest_radius
from rrcm.certification.stopping import fixed_sample, group_sequential
from rrcm.evaluation.metrics import wilson_interval
from rrcm.own_images import facts, rules

GUIDE = (REPOSITORY / "docs/guide.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """The rows of the table whose head begins with `first`, and its head."""
    lines = GUIDE[GUIDE.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_the_ceilings_are_those_of_the_closed_form():
    (_, *sigmas), *rows = table("n")
    sigmas = [float(re.search(r"[\d.]+$", sigma)[0]) for sigma in sigmas]
    for n, *radii in rows:
        ceilings = [largest_radius(sigma, int(n.replace(",", "")), 0.001) for sigma in sigmas]
        assert radii == [f"{ceiling:.2f}" for ceiling in ceilings]
    assert len(rows) == 4


@pytest.mark.parametrize("n", [9, 10, 100, 1000])
def test_no_rule_exceeds_the_ceiling(n):
    """With n votes of n, CERTIFY reaches it, and the sequential rule stays below."""
    ceiling = largest_radius(0.5, n, 0.001)
    radius = fixed_sample(0.5, n=n, n0=9, alpha=0.001).radius(n, 0) if n >= 10 else None
    assert ceiling == (pytest.approx(radius) if radius is not None else 0.0)
    if n >= 100:
        rule = group_sequential(0.5, n=n, n0=9, alpha=0.001, radius_step=0.01)
        certified = [radius for radius, count in zip(rule.radii, rule.efficacy_counts[-1], strict=True) if count <= n]
        assert 0.7 * ceiling < max(certified) <= ceiling


def test_the_distances_of_changes():
    (_, *sides), *rows = table("change of a picture in colour")
    sides = [int(side.split(" ")[0]) for side in sides]
    changed = {"every value by one of 255 levels": 1 / 255, "every value by 5 % of the range": 0.05}
    pixels = {"one pixel from black to white": 1, "a patch of 3 x 3 pixels from black to white": 9}
    for name, *distances in rows:
        for side, distance in zip(sides, distances, strict=True):
            values = changed.get(name, 1.0) ** 2 * 3 * pixels.get(name, side**2)
            assert float(distance) == pytest.approx(values**0.5, rel=5e-3)
    assert {row[0] for row in rows} == changed.keys() | pixels.keys()


def test_the_numbers_in_the_text():
    low, high = (wilson_interval(0.7, 50)[k] for k in (0, 1))
    narrow = wilson_interval(0.7, 500)
    falls = largest_radius(0.5, 10_000, 0.001), largest_radius(0.5, 10_000, 0.000001)
    said = [
        f"sigma at p = {ndtr(1):.3f}, twice sigma at p = {ndtr(2):.3f}",
        f"{100 * (high - low):.0f} points wide, with 500 it is {100 * (narrow[1] - narrow[0]):.0f}",
        f"falls from {falls[0]:.2f} to {falls[1]:.2f}",
        f"needs {facts.LEAST_IMAGES} of each class, and prints a note below {facts.FEW_IMAGES} to learn from",
        f"with {facts.UNBALANCED} times as many images",
        f"Training takes {100 * rules.TRAINING:.0f} % of `--hours`, certificates {100 * rules.CERTIFICATION:.0f} %",
        f"{rules.GOOD_STEPS:,} steps are enough to learn well from random weights",
        f"and {rules.LEAST_STEPS} are the least",
        "0.12, 0.25 and 0.5 for images of at most 16 pixels, and 0.25, 0.5 and 1 for others",
    ]
    text = " ".join(GUIDE.split())
    assert not [each for each in said if each not in text]
    assert rules.SIGMAS == {True: (0.12, 0.25, 0.5), False: (0.25, 0.5, 1.0)} and rules.SMALL_SIDE == 16


def test_the_rules_in_words_have_the_numbers_of_the_code():
    page = " ".join((REPOSITORY / "rrcm/own_images/README.md").read_text(encoding="utf-8").split())
    training, validation, thresholds, certificates = (
        f"{100 * share:.0f} %" for share in (rules.TRAINING, rules.VALIDATION, rules.THRESHOLDS, rules.CERTIFICATION)
    )
    sizes = [trunk.image_size for trunk in rules.TRUNKS]
    said = [
        f"{training} of the hours are for training, {validation} for evaluations on validation images",
        f"{thresholds} for thresholds, {certificates} for certificates",
        f"ViTs for {', '.join(map(str, sizes[1:-1]))} and {sizes[-1]} pixels, each cheaper than the one before",
        f"and for {sizes[0]} pixels with a GPU",
        f"time for {rules.GOOD_STEPS:,} steps and {rules.GOOD_PASSES} passes over the images",
        f"no time for {rules.LEAST_STEPS} steps",
        f"Below {rules.MEMORY} GiB of memory, {sizes[1]} pixels are left out",
        f"at most {rules.MOST_STEPS:,} steps, or {rules.MOST_PASSES} passes",
        f"between {rules.BATCHES[0]} and {rules.BATCHES[1]}",
        f"at most {rules.MOST_VALIDATION} images",
        f"n is {rules.SAMPLES[0]:,}, {rules.SAMPLES[1]:,} or {rules.SAMPLES[2]}: the largest that leaves time for "
        f"{rules.ENOUGH} held-out images. At most {rules.MOST_CERTIFIED}",
    ]
    assert not [each for each in said if each not in page]
    assert (rules.LEARNING_RATE, rules.STARTED_RATE, rules.NETWORK_RATE) == (1e-3, 1e-4, 5e-4) and rules.STARTED == 0.2
    assert rules.STARTED_SHARES == (1, 3 / 4, 1 / 2, 1 / 4) and "quarter of the pixels" in page
