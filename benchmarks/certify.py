"""How fast certification is: the procedure of Cohen's and the authors' code, our engine, a second library, the limit.

All run in this process, in turn, on blocks of the same test images and the same weights, so that a machine whose speed
drifts slows them alike; the ratios of a block are compared, and their median is what counts. What has been measured is
kept in OUTPUT after each block, and a killed run goes on there.

    python benchmarks/certify.py models/rrcm/sigma_0.5 data/shards --output digits_0.5.json
    python benchmarks/certify.py --show digits_0.25.json digits_0.5.json digits_1.0.json
"""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest import mock

import numpy as np
import pandas as pd
import torch
import typer
from scipy.special import ndtri
from tabulate import tabulate
from torch import nn

from rrcm.checkpoint import load_classifier
from rrcm.environment import environment, keep_freed_memory
from rrcm.errors import RRCMError
from rrcm.files import read_json, write_json
from rrcm.model import Classifier
from rrcm.procedures import clopper_pearson_lower
from rrcm.progress import Progress
from rrcm.results import certified_accuracy
from rrcm.shards import ShardedImages, read_split
from rrcm.smoothing import SmoothedClassifier

N0, ALPHA, THEIR_BATCH = 100, 0.001, 500  # as in the authors' script
RADII = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
LABELS = {
    "plain": "(a) one image at a time, float32, all n",
    "fixed_fp32": "(b) ours, fixed, float32",
    "fixed_bf16": "(c) ours, fixed, bfloat16",
    "sequential_bf16": "(d) ours, sequential, bfloat16",
    "sequential_bf16_compiled": "    the same, compiled",
    "art": "(e) adversarial-robustness-toolbox, float32",
    "limit_fp32": "bare forward pass, float32",
    "limit_bf16": "bare forward pass, bfloat16",
}

Answers = list[tuple[int, float, int]]  # class or -1, radius, samples


class WholeBlocks(nn.Module):
    """The same network computing all tokens of the last block, as the authors' code does."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with mock.patch("rrcm.model.class_token_of_block", lambda block, tokens: block(tokens)[:, 0]):
            return self.classifier(pixels)


def plain(model: nn.Module, images: torch.Tensor, sigma: float, n: int) -> Answers:
    """CERTIFY as in Cohen's and the authors' code: one image at a time, noise from the global stream, all n samples."""

    @torch.no_grad()
    def votes(image: torch.Tensor, count: int) -> np.ndarray:
        counts = np.zeros(10, int)
        for start in range(0, count, THEIR_BATCH):
            batch = image.repeat(min(THEIR_BATCH, count - start), 1, 1, 1)
            answers = model(batch + sigma * torch.randn_like(batch)).argmax(1)
            counts += np.bincount(answers.numpy(), minlength=10)
        return counts

    found = []
    for image in images:
        top = int(votes(image, N0).argmax())
        bound = clopper_pearson_lower(int(votes(image, n)[top]), n, ALPHA)
        found.append((top, sigma * float(ndtri(bound)), N0 + n) if bound >= 0.5 else (-1, 0.0, N0 + n))
    return found


def reference(path: Path) -> Callable[..., Answers]:
    """The same with `Smooth` of a checkout of the authors' code (its core.py), on the CPU."""
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


def ours(model: nn.Module, procedure: str, precision: str, batch_size: int | None, compile: bool = False):
    smoothed: dict[float, SmoothedClassifier] = {}

    def certify(labels: list[int], images: torch.Tensor, sigma: float, n: int, indices: list[int]) -> Answers:
        if sigma not in smoothed:
            smoothed[sigma] = SmoothedClassifier(
                model, sigma, 10, batch_size=batch_size, precision=precision, compile=compile
            )
            smoothed[sigma].certify(images[:1], n=2048, procedure="fixed")  # warm-up, compilation
        found = smoothed[sigma].certify(images, labels, procedure=procedure, n0=N0, n=n, alpha=ALPHA, indices=indices)
        return [(answer.predict, answer.radius, answer.samples) for answer in found]

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
        verbose=False,
    )
    classes, radii = theirs.certify(images.numpy(), n=n, batch_size=THEIR_BATCH)
    return [(int(c), float(r), N0 + n) for c, r in zip(classes, radii, strict=True)]


@torch.no_grad()
def bare_forward(model: nn.Module, image: torch.Tensor, size: int, samples: int) -> float:
    """Samples a second of nothing but forward passes on a batch that is there already."""
    batch = image + torch.randn(size, *image.shape)
    model(batch)
    start, passes = time.perf_counter(), max(1, samples // size)
    for _ in range(passes):
        model(batch)
    return passes * size / (time.perf_counter() - start)


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
    sampled: Annotated[int, typer.Option(help="images of a block that slow variants run on; 0: all")] = 0,
    sampled_n: Annotated[int, typer.Option(help="their n, where `sampled`")] = 5000,
    batch_size: int | None = None,
    plain_allocator: Annotated[bool, typer.Option(help="leave the memory allocator as it is")] = False,
    reference_code: Annotated[Path | None, typer.Option("--reference", help="checkout of the authors' code")] = None,
    show: bool = False,
) -> None:
    """Measure one classifier and keep the figures in OUTPUT, or `--show` those of earlier runs."""
    if show:
        for path in models or []:
            print(summary(read_json(path)), end="\n\n")
        return
    if models is None or len(models) != 2:
        raise RRCMError("give the folder of a classifier and the folder of its shards")
    names = variants.split(",")
    if unknown := [name for name in names if name not in LABELS]:
        raise RRCMError(f"variants {unknown[0]}: unknown; they are {', '.join(LABELS)}")
    if not plain_allocator:
        keep_freed_memory()
    split, classifier = ShardedImages(models[1], "test"), load_classifier(models[0])
    size = classifier.encoder.patch_embed.img_size[0]
    pixels, labels, indices = read_split(split, size, every, images)
    pixels, labels, sigma = pixels.float() / 255, labels.tolist(), classifier.t / 2
    whole = WholeBlocks(classifier)
    rounded = SmoothedClassifier(classifier, sigma, 10, precision="bf16", batch_size=batch_size)
    batches = {
        "fp32": SmoothedClassifier(classifier, sigma, 10, batch_size=batch_size).find_batch_size(pixels[0]),
        "bf16": rounded.find_batch_size(pixels[0]),
    }
    theirs = reference(reference_code) if reference_code else plain
    engines = {
        "fixed_fp32": ours(classifier, "fixed", "fp32", batch_size),
        "fixed_bf16": ours(classifier, "fixed", "bf16", batch_size),
        "sequential_bf16": ours(classifier, "sequential", "bf16", batch_size),
        "sequential_bf16_compiled": ours(classifier, "sequential", "bf16", batch_size, compile=True),
    }
    described = {
        "model": str(models[0]),
        "sigma": sigma,
        "n": n,
        "images": len(pixels),
        "sampled": [sampled, sampled_n] if sampled else None,
        "batch_size": batches | {"theirs": THEIR_BATCH},
        "freed_memory_kept": not plain_allocator,
        "reference": "the authors' core.py" if reference_code else "our own lines",
    }
    record = described | {"environment": environment("cpu"), "blocks": []}
    if output.is_file() and {key: read_json(output)[key] for key in described} == json.loads(json.dumps(described)):
        record = read_json(output)
    work = len(pixels) // block
    with Progress(work, f"benchmark {models[0]}", "blocks", done=len(record["blocks"])) as progress:
        for place in range(len(record["blocks"]), work):
            some = slice(place * block, (place + 1) * block)
            found = {"labels": labels[some], "indices": indices[some]}
            for name in names:
                few = sampled > 0 and not name.startswith("sequential")
                part = slice(some.start, some.start + sampled) if few else some
                count = sampled_n if few else n
                if name.startswith("limit"):
                    precision = name.removeprefix("limit_")
                    network = whole if precision == "fp32" else WholeBlocks(rounded.model)
                    rate = bare_forward(network, pixels[some.start], batches[precision], 20 * batches[precision])
                    found[name] = {"samples_per_second": rate}
                    continue
                start = time.perf_counter()
                if name in engines:
                    answers = engines[name](labels[part], pixels[part], sigma, count, indices[part])
                else:
                    answers = (art if name == "art" else theirs)(whole, pixels[part], sigma, count)
                seconds = time.perf_counter() - start
                found[name] = {"seconds": seconds, "n": count, "answers": answers}
                found[name]["samples_per_second"] = sum(answer[2] for answer in answers) / seconds
            record["blocks"].append(found)
            write_json(output, record)
            progress.update(1)
    print(summary(record))


def summary(record: dict) -> str:
    """Rates (median over blocks, range), ratios to the first variant and to the limit block by block, and the table."""
    blocks = record["blocks"]
    names = [name for name in LABELS if all(name in found for found in blocks)]
    rows, n, images = [], record["n"], sum(len(found["labels"]) for found in blocks)
    for name in names:
        rates = [found[name]["samples_per_second"] for found in blocks]
        row = {"variant": LABELS[name], "samples/s": f"{median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f})"}
        limit = f"limit_{'bf16' if 'bf16' in name else 'fp32'}"
        if limit in names and name != limit:
            ratios = [found[name]["samples_per_second"] / found[limit]["samples_per_second"] for found in blocks]
            row["of the limit"] = f"{median(ratios):.2f}"
        if not name.startswith("limit"):
            each = [_seconds_an_image(found, name, n) for found in blocks]
            row["s an image"] = f"{median(each):.3g}"
            row[f"s for {images} images"] = f"{sum(each) * images / len(blocks):,.0f}"
            if "plain" in names:
                speedups = [_seconds_an_image(found, "plain", n) / s for found, s in zip(blocks, each, strict=True)]
                total = sum(_seconds_an_image(found, "plain", n) for found in blocks) / sum(each)
                row["faster than (a)"] = f"{total:.1f}x ({min(speedups):.1f} - {max(speedups):.1f})"
            row["mean samples"] = f"{_mean_samples(blocks, name, n):,.0f}"
        rows.append(row)
    where = record["environment"]["hardware"]
    title = (
        f"{record['model']}, sigma {record['sigma']:g}, n {n:,}, {images} images; {where['cpu']}, {where['threads']} "
        f"threads, batches {record['batch_size']}, freed memory {'' if record['freed_memory_kept'] else 'not '}kept; "
        f"(a) is {record['reference']}"
    )
    table = [row for name in names if (row := _table_row(blocks, name, n, images))]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = tabulate([[row.get(key, "") for key in columns] for row in rows], columns, tablefmt="github")
    if table:
        text += "\n\n" + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{title}\n\n{text}"


def _seconds_an_image(found: dict, name: str, n: int) -> float:
    """Measured, or where fewer samples an image were drawn, computed from the rate."""
    measured = found[name]
    if measured["n"] == n:
        return measured["seconds"] / len(measured["answers"])
    return (N0 + n) / measured["samples_per_second"]


def _mean_samples(blocks: list[dict], name: str, n: int) -> float:
    if any(found[name]["n"] != n for found in blocks):
        return N0 + n
    return float(np.mean([answer[2] for found in blocks for answer in found[name]["answers"]]))


def _table_row(blocks: list[dict], name: str, n: int, images: int) -> dict | None:
    """Certified accuracy in percent, where all images were certified with all n."""
    if name.startswith("limit") or any(found[name]["n"] != n for found in blocks):
        return None
    answers = [answer for found in blocks for answer in found[name]["answers"]]
    labels = [label for found in blocks for label in found["labels"]]
    if len(answers) != images:
        return None
    frame = pd.DataFrame(
        {
            "correct": [int(a[0] == label) for a, label in zip(answers, labels, strict=True)],
            "radius": [a[1] for a in answers],
        }
    )
    shares = certified_accuracy(frame, RADII)
    return {"certified accuracy (%)": LABELS[name].strip()} | {
        f"r = {r:g}": f"{100 * share:.1f}" for r, share in zip(RADII, shares, strict=True)
    }


if __name__ == "__main__":
    typer.run(measure)  # not rrcm.app.run, which keeps freed memory
