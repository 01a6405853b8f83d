"""How often a vote flips when the network rounds differently, measured with the same noise (agreement.py).

The rate is measured where certificates are published, against the computations of other machines: another precision,
batch size or number of threads, and the instructions of older CPUs. An audit measures it again, so that nobody can
publish a rate that hides forged votes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rrcm.certification.agreement import closeness
from rrcm.certification.record import Flips, read_record, record_path
from rrcm.certification.results import read_certificates
from rrcm.certification.revote import Inputs, Settings, load_inputs, smooth_again, vote_singly
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.data.shards import evenly_spaced
from rrcm.utils.errors import RRCMError

SAMPLES_PER_IMAGE = 200  # to measure flips; more images say more than more samples of one image
MOST_SAMPLES, LEAST_SAMPLES = 20_000, 1_000  # votes of one measurement, depending on how long they take
SECONDS = 2.0  # duration of the certified computation; bfloat16 with AVX2 takes ten times as long
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # compute as a CPU without AVX-512


def count_flips(first: np.ndarray, second: np.ndarray, against: str) -> Flips:
    """The flips between two computations of the classes of the same samples, both (images, samples) int64."""
    images, samples = first.shape
    tops = np.array([np.bincount(row).max() for row in first])
    close, flips = closeness(tops, samples), (first != second).sum(1)
    expected = flips.sum() * close / close.sum()
    dispersion = ((flips - expected) ** 2).sum() / max(expected.sum(), 1.0)
    return Flips(
        against=against,
        images=images,
        samples=first.size,
        flips=int(flips.sum()),
        closeness=float(close.mean()),
        dispersion=float(dispersion),
    )


def measure_flips(
    path: Path,
    models: Path | str | Sequence[Path | str],
    images: Path,
    *,
    samples: int | None = None,
    device: str = "auto",
) -> dict[str, list[Flips]]:
    """The entry `flips` of the record beside the certificate file `path`, by the precision in which others vote again.

    Call this on the type of machine that certified, because it repeats the certified computation. `models` and `images`
    are as for `load_inputs`. Each list has one measurement for each other way to compute, and for each sigma of a
    cascade. A measurement has about `samples` votes. If `samples` is None, it has as many as fit into SECONDS, between
    LEAST_SAMPLES and MOST_SAMPLES.
    """
    record, frame = read_record(record_path(path)), read_certificates(path, unlabelled=True)
    inputs, problems = load_inputs(path, record, frame, models, images)
    if problems:
        raise RRCMError(problems[0])
    smoothed, indices = smooth_again(record, inputs, Settings(device=device))[0], frame["idx"].tolist()
    indices = spread_indices(indices, samples or affordable_samples(smoothed, inputs, indices[0]))
    threads, size = record.environment.hardware.threads or 1, record.batch_size

    def classes(settings: Settings) -> list[np.ndarray]:
        scales = smooth_again(record, inputs, settings._replace(device=device))
        return [vote_singly(each, inputs, indices, SAMPLES_PER_IMAGE) for each in scales]

    certified, flips = classes(Settings(runtime=(record.runtime or "torch").split()[0])), {}
    for precision in ("fp32", "bf16"):
        other = Settings(precision, max(1, size // 2), 2 if threads == 1 else threads // 2)
        measured = {f"batch {other.batch_size}, {other.threads} threads": classes(other)}
        if precision != record.precision:
            measured = {precision: classes(Settings(precision))} | measured
        if smoothed.device.type == "cpu":
            measured["AVX2"] = _classes_with_avx2(path, models, images, indices, precision)
        flips[precision] = [
            count_flips(*pair, against + f", sigma {sigma:g}" * (len(record.sigmas) > 1))
            for against, each in measured.items()
            for sigma, *pair in zip(record.sigmas, certified, each, strict=True)
        ]
    smooth_again(record, inputs, Settings(device=device))  # sets the number of threads as before
    return flips


def affordable_samples(smoothed: SmoothedClassifier, inputs: Inputs, index: int) -> int:
    """How many votes take about SECONDS, between LEAST_SAMPLES and MOST_SAMPLES."""
    size = smoothed.batch_size
    vote_singly(smoothed, inputs, [index], size)  # the first batch takes longer
    start = time.monotonic()
    vote_singly(smoothed, inputs, [index], size)
    return int(np.clip(SECONDS * size / (time.monotonic() - start), LEAST_SAMPLES, MOST_SAMPLES))


def spread_indices(indices: Sequence[int], samples: int) -> list[int]:
    """Evenly spaced images, as many as give about `samples` votes with SAMPLES_PER_IMAGE each."""
    return [indices[position] for position in evenly_spaced(len(indices), max(1, samples // SAMPLES_PER_IMAGE))]


def _classes_with_avx2(
    path: Path, models: Path | str | Sequence[Path | str], images: Path, indices: Sequence[int], precision: str
) -> list[np.ndarray]:
    """The result of `vote_singly` at each sigma, in a process that uses no instructions beyond AVX2."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "classes.npy"
        models = [str(models)] if isinstance(models, Path | str) else list(map(str, models))
        arguments = json.dumps([str(path), models, str(images), list(indices), precision, str(output)])
        command = [sys.executable, "-m", "rrcm.certification.flips", arguments]
        answer = subprocess.run(command, env=os.environ | AVX2, stderr=subprocess.PIPE, text=True)
        if answer.returncode != 0:
            raise RRCMError(f"{path}: cannot be voted on with AVX2 ({answer.stderr.strip()[-200:]})")
        return list(np.load(output, allow_pickle=False))


def _write_classes(path: str, models: list[str], images: str, indices: list[int], precision: str, output: str) -> None:
    record, frame = read_record(record_path(Path(path))), read_certificates(path, unlabelled=True)
    inputs: Inputs = load_inputs(Path(path), record, frame, models, Path(images))[0]
    scales = smooth_again(record, inputs, Settings(precision, device="cpu"))
    np.save(output, [vote_singly(each, inputs, indices, SAMPLES_PER_IMAGE) for each in scales])


if __name__ == "__main__":
    _write_classes(*json.loads(sys.argv[1]))
