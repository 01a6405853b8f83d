"""Speed of certification: Cohen's and the authors' procedure, our engine, a second library, and the bare network.

All variants run in one process on the same weights and test images. The sequential variants certify all images at once,
as they would be used. The others alternate on blocks of images, so that drifting machine speed affects all of them
equally; compare medians over blocks. OUTPUT is written after each block, and a killed run continues from it.

    python benchmarks/certify.py models/rrcm/sigma_0.5 data/shards --output digits_0.5.json
    python benchmarks/certify.py --show digits_0.25.json digits_0.5.json digits_1.0.json

A joint network needs `--sigma`. With `--student FOLDER` a smaller network is certified as well, and its ACR is compared
with the first network's on the same images.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple
from unittest import mock

from rrcm.models.kinds import load_model_folder
from rrcm.report.figures import OKABE_ITO, figure_style, save  # first: with it matplotlib takes any MPLBACKEND

# isort: split
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from scipy.special import ndtri
from tabulate import tabulate
from torch import nn

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import clopper_pearson_lower
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.metrics import acr_difference, average_certified_radius, certified_accuracy
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.vit import Block
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment

N0, ALPHA, THEIR_BATCH = 100, 0.001, 500  # as in the authors' script
RADII = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
LABELS = {
    "plain": "(a) one image at a time, float32, all n",
    "fixed_fp32": "(b) rrcm, fixed, float32",
    "fixed_bf16": "(c) rrcm, fixed, bfloat16",
    "sequential_fp32": "    rrcm, sequential, float32",
    "sequential_bf16": "(d) rrcm, sequential, bfloat16",
    "sequential_bf16_compiled": "    the same, compiled",
    "student_fp32": "    a student, sequential, float32",
    "student_bf16": "    a student, sequential, bfloat16",
    "art": "(e) adversarial-robustness-toolbox, float32",
    "limit_fp32": "bare forward pass, float32",
    "limit_bf16": "bare forward pass, bfloat16",
}

AT_ONCE = ("sequential", "student")  # variants that certify all images together
CLOCKS = {"wall clock": time.perf_counter, "CPU time": time.process_time}

Answers = list[tuple[int, float, int]]  # class or -1, radius, samples


class WholeBlocks(nn.Module):
    """The same network, but it computes all tokens of the last block, as the authors' code does."""

    def __init__(self, classifier: NoiseConditionedClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(Block, "forward_cls", lambda block, tokens: block(tokens)[:, 0]):
            return self.classifier(pixels)


def plain(model: nn.Module, images: torch.Tensor, sigma: float, n: int) -> Answers:
    """CERTIFY as in Cohen's and the authors' code: one image at a time, noise from the global stream, all n samples."""

    @torch.no_grad()
    def votes(image: torch.Tensor, count: int) -> np.ndarray:
        counts = np.zeros(10, int)
        for start in range(0, count, THEIR_BATCH):
            batch = image.repeat(min(THEIR_BATCH, count - start), 1, 1, 1)
            classes = model(batch + sigma * torch.randn_like(batch)).argmax(1)
            counts += np.bincount(classes.numpy(), minlength=10)
        return counts

    answers = []
    for image in images:
        top = int(votes(image, N0).argmax())
        bound = clopper_pearson_lower(int(votes(image, n)[top]), n, ALPHA)
        answers.append((top, sigma * float(ndtri(bound)), N0 + n) if bound >= 0.5 else (-1, 0.0, N0 + n))
    return answers


def reference(path: Path) -> Callable[..., Answers]:
    """The same procedure by `Smooth` from core.py in a checkout of the authors' code, on the CPU."""
    spec = importlib.util.spec_from_file_location("reference_core", path / "core.py")
    if spec is None or not (path / "core.py").is_file():
        raise RRCMError(f"{path}: has no core.py; give a checkout of the authors' repository")
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)

    def certify(model: nn.Module, images: torch.Tensor, sigma: float, n: int) -> Answers:
        class Network(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:  # it scales to [-1, 1] and makes grey images RGB
                return model((x[:, : images.shape[1]] + 1) / 2)

        smooth = core.Smooth(Network(), 10, sigma)
        answers = [smooth.certify(image, N0, n, ALPHA, THEIR_BATCH) for image in images]
        return [(predict, float(radius), N0 + n) for predict, radius in answers]

    return certify


def ours(model: nn.Module, stopping: str, precision: str, radius_step: float, **options: object):
    smoothed: dict[float, SmoothedClassifier] = {}

    def certify(labels: list[int], images: torch.Tensor, sigma: float, n: int, indices: list[int]) -> Answers:
        if sigma not in smoothed:
            smoothed[sigma] = SmoothedClassifier(model, sigma, 10, precision=precision, **options)
            smoothed[sigma].certify(images[:1], n=2048, stopping="fixed")  # warm-up, compilation
        settings = {"stopping": stopping, "n0": N0, "n": n, "alpha": ALPHA, "radius_step": radius_step}
        outcomes = smoothed[sigma].certify(images, labels, indices=indices, **settings)
        return [(answer.prediction, answer.radius, answer.samples) for answer in outcomes]

    return certify


def art(model: nn.Module, images: torch.Tensor, sigma: float, n: int) -> Answers:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    theirs = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        sample_size=N0,
        scale=sigma,
        alpha=ALPHA,
        device_type="cpu",
    )
    classes, radii = theirs.certify(images.numpy(), n=n, batch_size=THEIR_BATCH)
    return [(int(c), float(r), N0 + n) for c, r in zip(classes, radii, strict=True)]


@torch.no_grad()
def bare_forward(model: nn.Module, image: torch.Tensor, size: int, samples: int, clock: Callable[[], float]) -> float:
    """Samples per second of forward passes alone, all on one batch."""
    batch = image + torch.randn(size, *image.shape)
    model(batch)
    start, passes = clock(), max(1, samples // size)
    for _ in range(passes):
        model(batch)
    return passes * size / (clock() - start)


def measure(
    models: Annotated[
        list[Path] | None, typer.Argument(help="folder of a classifier, then the folder of shards")
    ] = None,
    output: Path = Path("certify.json"),
    n: int = 100_000,
    every: int = 3,
    images: int = 120,
    block: int = 12,
    variants: str = "plain,fixed_fp32,fixed_bf16,sequential_bf16,art,limit_fp32,limit_bf16",
    sampled: Annotated[int, typer.Option(help="images per block for the variants that run on blocks; 0: all")] = 0,
    sampled_n: Annotated[int, typer.Option(help="their n, with `sampled`")] = 5000,
    batch_size: int | None = None,
    radius_step: Annotated[float, typer.Option(help="of the sequential variants, in pixel units")] = 0.25,
    sigma: Annotated[float | None, typer.Option(help="pixel noise, for a joint network")] = None,
    student: Annotated[Path | None, typer.Option(help="folder of a smaller classifier")] = None,
    cpu_time: Annotated[bool, typer.Option(help="measure CPU time, on a machine that is busy; use one thread")] = False,
    plain_allocator: Annotated[bool, typer.Option(help="keep the default memory allocator")] = False,
    reference_code: Annotated[Path | None, typer.Option("--reference", help="checkout of the authors' code")] = None,
    show: bool = False,
    figure: Annotated[Path | None, typer.Option(help="with --show: draw the times for whole tables")] = None,
) -> None:
    """Measure one classifier and write the figures to OUTPUT, or `--show` the figures of earlier runs."""
    if show:
        records = [read_json(path) for path in models or []]
        for record in records:
            print(summary(record), end="\n\n")
        if figure:
            save(draw(records), figure)
        return
    if models is None or len(models) != 2:
        raise RRCMError("give the folder of a classifier and the folder of its shards")
    names = variants.split(",")
    if unknown := [name for name in names if name not in LABELS]:
        raise RRCMError(f"variants {unknown[0]}: unknown; they are {', '.join(LABELS)}")
    if student is None and any(name.startswith("student") for name in names):
        raise RRCMError("the student variants need a second network: give its folder with --student")
    if not plain_allocator:
        keep_freed_memory()
    classifier = load_model_folder(models[0], sigma=sigma).classifier
    size = classifier.encoder.patch_embed.img_size[0]
    pixels, labels, indices = read_split(ShardedDataset(models[1], "test"), size, every, images)
    inputs = Inputs(pixels.float() / 255, labels.tolist(), indices, classifier.sigma)
    batches = {
        precision: SmoothedClassifier(
            classifier, classifier.sigma, classifier.num_classes, precision=precision, batch_size=batch_size
        ).find_batch_size(inputs.pixels[0])
        for precision in ("fp32", "bf16")
    }
    description = {
        "model": str(models[0]),
        "student": None if student is None else str(student),
        "sigma": classifier.sigma,
        "n": n,
        "images": len(pixels),
        "sampled": [sampled, sampled_n] if sampled else None,
        "batch_size": batches | {"theirs": THEIR_BATCH},
        "radius_step": radius_step,
        "freed_memory_kept": not plain_allocator,
        "clock": "CPU time" if cpu_time else "wall clock",
        "reference": "the authors' core.py" if reference_code else "our own lines",
    }
    record = description | {"environment": describe_environment("cpu"), "whole": {}, "blocks": []}
    if output.is_file() and {key: read_json(output)[key] for key in description} == json.loads(json.dumps(description)):
        record = read_json(output)
    options = {"radius_step": radius_step, "batch_size": batch_size}
    engines = make_engines(classifier, reference(reference_code) if reference_code else plain, options)
    if student is not None:
        smaller = load_model_folder(student, sigma=classifier.sigma).classifier
        engines |= {f"student_{p}": ours(smaller, "sequential", p, **options) for p in ("fp32", "bf16")}
    networks = {precision: bare_network(classifier, precision) for precision in ("fp32", "bf16")}
    measure_whole(record, engines, names, inputs, n, output)
    measure_blocks(record, engines, names, inputs, networks, block, output)
    print(summary(record))


class Inputs(NamedTuple):
    """Test images of a classifier."""

    pixels: torch.Tensor  # (N, C, H, W), in [0, 1]
    labels: list[int]
    indices: list[int]
    sigma: float


def make_engines(classifier: NoiseConditionedClassifier, theirs: Callable, options: dict) -> dict:
    """The variants by name, each a function of (labels, images, sigma, n, indices)."""
    whole = WholeBlocks(classifier)
    return {
        "plain": lambda labels, images, sigma, n, indices: theirs(whole, images, sigma, n),
        "art": lambda labels, images, sigma, n, indices: art(whole, images, sigma, n),
        "fixed_fp32": ours(classifier, "fixed", "fp32", **options),
        "fixed_bf16": ours(classifier, "fixed", "bf16", **options),
        "sequential_fp32": ours(classifier, "sequential", "fp32", **options),
        "sequential_bf16": ours(classifier, "sequential", "bf16", **options),
        "sequential_bf16_compiled": ours(classifier, "sequential", "bf16", compile=True, **options),
    }


def bare_network(classifier: NoiseConditionedClassifier, precision: str) -> nn.Module:
    """The network whose bare forward pass is the speed limit for a precision."""
    smoothed = SmoothedClassifier(classifier, classifier.sigma, classifier.num_classes, precision=precision)
    return WholeBlocks(smoothed.network)


def timed(engine: Callable[..., Answers], inputs: Inputs, part: slice, n: int, clock: Callable[[], float]) -> dict:
    """Certify a part of the images; returns the seconds, the samples per second and the answers."""
    start = clock()
    answers = engine(inputs.labels[part], inputs.pixels[part], inputs.sigma, n, inputs.indices[part])
    seconds = clock() - start
    rate = sum(answer[2] for answer in answers) / seconds
    return {"n": n, "seconds": seconds, "samples_per_second": rate, "answers": answers}


def measure_whole(record: dict, engines: dict, names: list[str], inputs: Inputs, n: int, output: Path) -> None:
    """Time the sequential variants on all images at once, as they would be used."""
    clock = CLOCKS[record["clock"]]
    for name in names:
        if name.startswith(AT_ONCE) and name not in record["whole"]:
            timed(engines[name], inputs, slice(0, 1), 100, clock)  # warm-up, compilation
            record["whole"][name] = timed(engines[name], inputs, slice(None), n, clock)
            write_json(output, record)


def measure_blocks(
    record: dict, engines: dict, names: list[str], inputs: Inputs, networks: dict, block: int, output: Path
) -> None:
    """Time the other variants alternately on blocks of images."""
    sampled, sampled_n = record["sampled"] or (block, record["n"])
    count, clock = len(inputs.pixels) // block, CLOCKS[record["clock"]]
    with Progress(count, f"benchmark {record['model']}", "blocks", done=len(record["blocks"])) as progress:
        for first in range(len(record["blocks"]) * block, count * block, block):
            measured: dict[str, object] = {"labels": inputs.labels[first : first + block]}
            for name in names:
                if name.startswith("limit"):
                    precision = name.removeprefix("limit_")
                    size = record["batch_size"][precision]
                    rate = bare_forward(networks[precision], inputs.pixels[first], size, 20 * size, clock)
                    measured[name] = {"samples_per_second": rate}
                elif not name.startswith(AT_ONCE):
                    measured[name] = timed(engines[name], inputs, slice(first, first + sampled), sampled_n, clock)
            record["blocks"].append(measured)
            write_json(output, record)
            progress.update(1)


def summary(record: dict) -> str:
    """Two tables: rates (median and range over blocks) with times for the whole table, and the certified accuracy."""
    blocks, whole, n = record["blocks"], record["whole"], record["n"]
    images = sum(len(block["labels"]) for block in blocks)
    rows, table = [], []
    for name, label in LABELS.items():
        runs = [whole[name]] if name in whole else [block[name] for block in blocks if name in block]
        if not runs:
            continue
        rates = [run["samples_per_second"] for run in runs]
        spread = f" ({min(rates):,.0f} - {max(rates):,.0f})" if len(rates) > 1 else ""
        row = {"variant": label, "samples/s": f"{median(rates):,.0f}{spread}"}
        limit = f"limit_{'bf16' if 'bf16' in name else 'fp32'}"
        if not name.startswith("limit"):
            if limits := [block[limit]["samples_per_second"] for block in blocks if limit in block]:
                row["of the limit"] = f"{median(rates) / median(limits):.2f}"
            seconds = _seconds(runs, n, images)
            row["mean samples"] = f"{_mean_samples(runs, n):,.0f}"
            row["s an image"], row[f"s for {images}"] = f"{seconds / images:.3g}", f"{seconds:,.0f}"
            if plain_runs := [block["plain"] for block in blocks if "plain" in block]:
                row["faster than (a)"] = f"{_seconds(plain_runs, n, images) / seconds:.1f}x"
            answers = [answer for run in runs if run["n"] == n for answer in run["answers"]]
            if len(answers) == images:
                table.append({"certified accuracy (%)": label.strip()} | _shares(answers, blocks))
        rows.append(row)
    where = record["environment"]["hardware"]
    title = (
        f"{record['model']}, sigma {record['sigma']:g}, n {n:,}, {images} images; {where['cpu']}, {where['threads']} "
        f"threads, batches {record['batch_size']}, freed memory {'' if record['freed_memory_kept'] else 'not '}kept; "
        f"(a) is {record['reference']}; {record['clock']}"
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = tabulate([[row.get(key, "") for key in columns] for row in rows], columns, tablefmt="github")
    shares = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n\n".join([title, text, shares, *_losses(record)])


def _losses(record: dict) -> list[str]:
    """A sentence for each precision in which a student was certified beside the network that taught it."""
    labels = [label for block in record["blocks"] for label in block["labels"]]
    sentences = []
    for precision in ("fp32", "bf16"):
        names = f"student_{precision}", f"sequential_{precision}"
        if all(name in record["whole"] and len(record["whole"][name]["answers"]) == len(labels) for name in names):
            student, teacher = (_certified(record["whole"][name]["answers"], labels) for name in names)
            loss = acr_difference(student, teacher)
            sentences.append(
                f"{precision}: the student's ACR is {average_certified_radius(student):.4f}, the first network's "
                f"{average_certified_radius(teacher):.4f}; the difference is {loss.value:.4f} ({loss.low:.4f} to "
                f"{loss.high:.4f}, paired over the images)"
            )
    return sentences


@figure_style()
def draw(records: list[dict]) -> Figure:
    """The time that each variant takes for a whole table, on a logarithmic axis, with one panel per record."""
    figure = Figure(figsize=(7.2, 0.5 + 1.9 * len(records)))
    for axes, record in zip(figure.subplots(len(records), squeeze=False).flat, records, strict=True):
        images = sum(len(block["labels"]) for block in record["blocks"])
        bars = []
        for name, label in LABELS.items():
            runs = [record["whole"].get(name)] if name in record["whole"] else [b.get(name) for b in record["blocks"]]
            if None not in runs and not name.startswith("limit"):
                drawn = sum(len(run["answers"]) for run in runs) == images and runs[0]["n"] == record["n"]
                bars.append((label.strip(), _seconds(runs, record["n"], images) / 60, drawn))
        names, minutes, real = zip(*bars, strict=True)
        hatches = ["" if measured else "///" for measured in real]
        shown = axes.barh(names, minutes, color=OKABE_ITO[0], height=0.62, edgecolor="white", hatch=hatches)
        texts = [f"{m:,.3g}{'' if measured else ' (from its rate)'}" for m, measured in zip(minutes, real, strict=True)]
        axes.bar_label(shown, texts, padding=4, fontsize=8)
        axes.set(xscale="log", xlim=(min(minutes) / 3, 8 * max(minutes)), xlabel="minutes for the whole table")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(
            f"{Path(record['model']).parent.name}, σ = {record['sigma']:g}, {images} images, n = {record['n']:,}",
            loc="left",
        )
    return figure


def _seconds(runs: list[dict], n: int, images: int) -> float:
    """Seconds for all images: measured, or computed from the median rate if fewer samples were drawn."""
    if sum(len(run["answers"]) for run in runs) == images and all(run["n"] == n for run in runs):
        return sum(run["seconds"] for run in runs)
    return images * (N0 + n) / median(run["samples_per_second"] for run in runs)


def _mean_samples(runs: list[dict], n: int) -> float:
    return float(np.mean([answer[2] if run["n"] == n else N0 + n for run in runs for answer in run["answers"]]))


def _certified(answers: Answers, labels: list[int]) -> pd.DataFrame:
    correct = [int(answer[0] == label) for answer, label in zip(answers, labels, strict=True)]
    return pd.DataFrame({"correct": correct, "radius": [answer[1] for answer in answers]})


def _shares(answers: Answers, blocks: list[dict]) -> dict[str, str]:
    """Certified accuracy in percent."""
    frame = _certified(answers, [label for block in blocks for label in block["labels"]])
    return {f"r = {r:g}": f"{100 * s:.1f}" for r, s in zip(RADII, certified_accuracy(frame, RADII), strict=True)}


if __name__ == "__main__":
    app = make_app()  # rrcm.utils.app.run_command would keep freed memory
    app.command()(exit_on_error(measure))
    app()
