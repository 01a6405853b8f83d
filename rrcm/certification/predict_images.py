"""Predict the classes of image files: PREDICT of Cohen et al. 2019 (section 3.2.2), and the PREDICT of a cascade.

An answer needs a hundredth of the samples of a certificate, and says nothing about other images nearby.
"""

import csv
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rrcm.certification.cascade import ONLY_0, CascadedClassifier
from rrcm.certification.cascade_rules import CascadeRule, make_cascade_rule
from rrcm.certification.cascade_states import cascade_certificate
from rrcm.certification.certify_images import check_files, find_images, read_square
from rrcm.certification.noise import PREDICT
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import ABSTAIN, binomial_test, check_prediction
from rrcm.data.images import Listing
from rrcm.data.shards import evenly_spaced
from rrcm.models.load import LoadedClassifier
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output, write_text
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress

FORMATS = (".csv", ".jsonl")
STANDARD_INPUT = "-"
COLUMNS = ["file", "class", "predict", "first", "first_share", "second", "second_share", "sigma", "samples"]


class Prediction(NamedTuple):
    """The answer to an image."""

    predict: int  # a class, or ABSTAIN
    votes: np.ndarray  # (K,) int64 at `sigma`; of a cascade, K may count "pass" as the last one
    sigma: float  # pixel units; of a cascade, the one that answers, or the smallest one asked if it abstains
    samples: int  # of all sigmas


class FilePrediction(NamedTuple):
    """The answer to an image file, with names in place of numbers."""

    file: str
    predicted: str  # a class, or "abstain"
    predict: int  # its number, or -1
    shares: dict[str, float]  # of the votes, by class, the largest first; classes without votes are left out
    sigma: float
    samples: int

    def as_json(self) -> str:
        """One line of JSON."""
        values = self._asdict()
        return json.dumps({"class" if name == "predicted" else name: values[name] for name in values})

    def as_csv(self) -> str:
        """One line with the COLUMNS."""
        likeliest = [*self.shares.items(), ("", 0.0)][:2]
        shares = [cell for name, share in likeliest for cell in (name, f"{share:.6g}")]
        return csv_line([self.file, self.predicted, self.predict, *shares, f"{self.sigma:g}", self.samples])


def csv_line(cells: Iterable[object]) -> str:
    """The cells as a line of CSV, without its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def list_files(names: Sequence[str], standard_input: Iterable[str] = ()) -> Listing:
    """The image files that `names` name: files, folders with the images in and below them, and STANDARD_INPUT.

    The latter stands for the names in the lines of `standard_input`. Paths are as the names give them, each once.
    Raises `RRCMError` for a name of nothing, for a folder without images, and if there is no image at all.
    """
    given = [line.rstrip("\r\n") for line in standard_input if line.strip()] if STANDARD_INPUT in names else []
    files, left_out = [], Counter()
    for name in chain.from_iterable(given if each == STANDARD_INPUT else [each] for each in names):
        path = Path(name)
        if path.is_dir():
            found = find_images(path)
            files += [path / file for file in found.files]
            left_out += found.left_out
        elif path.is_file():
            files.append(path)
        else:
            raise RRCMError(f"{printable(name)}: no such file or folder; give images, or folders with images")
    if not files:
        raise RRCMError("no images are given; name files or folders, or give their names on standard input with -")
    return Listing(Path(), list(dict.fromkeys(files)), left_out)


def predict_images(
    classifier: SmoothedClassifier | CascadedClassifier,
    images: torch.Tensor,  # (B, C, H, W) in [0, 1]
    indices: Sequence[int],
    *,
    n: int,
    n0: int,
    alpha: float,
) -> list[Prediction]:
    """PREDICT with the votes behind it. `classifier.predict` gives the same classes.

    Only cascades use n0. Raises `RRCMError` for impossible settings and images.
    """
    if isinstance(classifier, CascadedClassifier):
        return _predict_by_cascade(classifier, images, indices, n=n, n0=n0, alpha=alpha)
    n, alpha = check_prediction(n, alpha)
    answers = []
    for votes in classifier.count_samples(images, indices, PREDICT, n):
        runner_up, top = np.sort(votes)[-2:].tolist()
        predict = int(votes.argmax()) if binomial_test(top, top + runner_up) <= alpha else ABSTAIN
        answers.append(Prediction(predict, votes, classifier.sigma, n))
    return answers


def prediction_rule(
    classifier: SmoothedClassifier | CascadedClassifier, *, n: int, n0: int, alpha: float
) -> CascadeRule | int:
    """The stopping rule of PREDICT. A cascade stops when it is certified at radius 0. Others draw n samples.

    Raises `RRCMError` for impossible settings.
    """
    if not isinstance(classifier, CascadedClassifier):
        return check_prediction(n, alpha)[0]
    settings = {"n": n, "n0": n0, "alpha": alpha, "radius_step": ONLY_0, "bound": "margin"}
    return make_cascade_rule("sequential", classifier.sigmas, classifier.thresholds, **settings)


def _predict_by_cascade(
    cascade: CascadedClassifier, images: torch.Tensor, indices: Sequence[int], *, n: int, n0: int, alpha: float
) -> list[Prediction]:
    rule = prediction_rule(cascade, n=n, n0=n0, alpha=alpha)
    states = cascade.image_states(images, None, indices, rule)
    for _ in cascade.certify_stream(states, rule):
        pass
    answers = []
    for state in states:
        answer = cascade_certificate(state, rule, cascade.num_classes)
        asked = [k for k, samples in enumerate(answer.samples_by_sigma) if samples]
        k = cascade.sigmas.index(answer.accepting_sigma) if answer.path else asked[0]
        votes = Counter(state.selection[k]) + Counter(state.counts[k])
        counts = np.array([votes[str(c)] for c in range(cascade.scales[k].num_classes)])
        answers.append(Prediction(answer.prediction, counts, cascade.sigmas[k], answer.samples))
    return answers


def predict_files(
    listing: Listing,
    loaded: LoadedClassifier,
    classifier: SmoothedClassifier | CascadedClassifier,
    *,
    limit: int | None = None,
    skip_unreadable: bool = False,
    **settings: float,
) -> Iterator[FilePrediction]:
    """Yield the answers to the files that `list_files` found, or to `limit` of them, evenly spaced.

    `prediction_rule` checks the settings. File i of the list has the noise of index i under the seed. `loaded` is the
    base classifier. For a cascade, it may be any of the base classifiers. The `settings` are passed on to
    `predict_images`. All files are decoded before the first answer. Raises `RRCMError` for bad input, after naming all
    unreadable images unless they are skipped.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    positions = evenly_spaced(len(listing.files), limit).tolist()
    cascaded = isinstance(classifier, CascadedClassifier)
    positions = list(check_files(listing, positions, loaded, skip_unreadable))
    names = unique_names(loaded.class_names)
    scale = classifier.scales[0] if cascaded else classifier
    image = torch.zeros(loaded.channels, loaded.image_size, loaded.image_size)
    together = scale.images_per_round(image, settings["n0" if cascaded else "n"])  # so that batches are full
    with Progress(len(positions), "predict", "images", only_if_long=True) as progress:
        for first in range(0, len(positions), together):
            group = positions[first : first + together]
            pixels = np.stack([read_square(listing.folder / listing.files[i], loaded) for i in group])
            answers = predict_images(classifier, to_unit_range(torch.from_numpy(pixels)), group, **settings)
            for position, answer in zip(group, answers, strict=True):
                yield name_classes(printable(listing.files[position]), answer, names)
            progress.update(len(group))


def name_classes(file: str, answer: Prediction, names: Sequence[str]) -> FilePrediction:
    """The answer to a file, by the unique names of the classes."""
    outputs, total = [*names, "pass"], answer.votes.sum()
    voted = [k for k in np.argsort(-answer.votes, kind="stable").tolist() if answer.votes[k]]
    shares = {outputs[k]: float(answer.votes[k] / total) for k in voted}
    predicted = "abstain" if answer.predict == ABSTAIN else names[answer.predict]
    return FilePrediction(file, predicted, answer.predict, shares, answer.sigma, answer.samples)


def unique_names(names: Sequence[str]) -> list[str]:
    """The class names. A name that several classes have, such as ImageNet's "crane", gets the number of the class."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def check_format(output: Path | None) -> None:
    """Raise `RRCMError` unless the answers can be written to `output`. None is standard output."""
    if output is not None and output.suffix not in FORMATS:
        raise RRCMError(f"--output {output}: must end in {' or '.join(FORMATS)}")
    if output is not None:
        check_output(output)


def print_answers(answers: Iterable[FilePrediction], output: Path | None) -> None:
    """Write all answers to `output`, or print each as CSV as soon as it is known. Print a summary on stderr."""
    start, count, abstained, lines = time.monotonic(), 0, 0, []
    as_json = output is not None and output.suffix == ".jsonl"
    if not as_json:
        lines.append(csv_line(COLUMNS))
    for answer in answers:
        count, abstained = count + 1, abstained + (answer.predict == ABSTAIN)
        lines.append(answer.as_json() if as_json else answer.as_csv())
        if output is None:
            print(*lines, sep="\n", flush=True)
            lines.clear()
    if output is not None:
        write_text(output, "".join(f"{line}\n" for line in lines))
    answered = f"{count - abstained:,} classified, {abstained:,} abstained; {time.monotonic() - start:.1f} s"
    print(f"{answered}{'' if output is None else f'; written: {output}'}", file=sys.stderr)
