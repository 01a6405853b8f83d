"""Whatever a person means by a model, as a classifier of pixels in [0, 1] that can be certified: a folder of ours, a
file of the authors', or a name of timm's."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import Classifier
from rrcm.models.checkpoints import load_classifier
from rrcm.models.timm_vit import load_timm, suggest_timm_name
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import read_json


class LoadedClassifier(NamedTuple):
    """A classifier and what must be known to ask it."""

    network: nn.Module  # (B, channels, image_size, image_size) float32, pixels in [0, 1] plus noise -> (B, K) logits
    image_size: int
    channels: int  # 1 or 3
    sigma: float | None  # pixel noise that it was trained for, where known
    names: list[str]  # of its K classes
    synsets: list[str]  # of its K classes where they are ImageNet's: what ImageNet's folders are called


class Normalized(nn.Module):
    """A network of normalised images as one of pixels in [0, 1]."""

    def __init__(self, network: nn.Module, mean: Sequence[float], deviation: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, C, H, W) -> logits (B, K)."""
        return self.network((pixels - self.mean) / self.deviation)


def load_base_classifier(
    model: str,
    *,
    sigma: float | None = None,  # pixel noise: the authors' files do not say which they were fine-tuned for
    weights: Path | None = None,  # of a timm model: safetensors, instead of a download
    final_norm: bool = True,  # False: the authors' CIFAR-10 models, which skip the last LayerNorm
    classes: Path | None = None,  # a text file, a class name a line
) -> LoadedClassifier:
    """An existing folder is one of ours, an existing file one of the authors', anything else a name of timm's.

    Raises `RRCMError` for what is none of them, cannot be read or downloaded, or does not fit the other arguments.
    """
    path = Path(model)
    if weights is not None and path.exists():
        raise RRCMError(f"{weights}: weights are for a timm model, and {model} has its own; leave them out")
    if not final_norm and not path.is_file():
        raise RRCMError(f"{model}: only a checkpoint file of the authors can skip the final norm; leave that out")
    if path.is_dir():
        subject = _of_classifier(load_classifier(path))
        subject = subject._replace(sigma=read_json(path / "config.json").get("sigma", subject.sigma))
    elif path.exists():
        subject = _of_authors(path, sigma, final_norm)
    elif complaint := suggest_timm_name(model):
        raise RRCMError(f"{model}: no such folder or file, and {complaint}")
    else:
        subject = _of_timm(model, weights)
    return subject if classes is None else subject._replace(names=_read_names(classes, len(subject.names)))


def class_folders(subject: LoadedClassifier) -> dict[str, int]:
    """The classes by what a folder of their images may be called: number, synset, or name where no other has it."""
    count = Counter(subject.names)
    numbers = {str(number): number for number in range(len(subject.names))}
    synsets = {synset: number for number, synset in enumerate(subject.synsets)}
    return numbers | synsets | {name: number for number, name in enumerate(subject.names) if count[name] == 1}


def _of_classifier(network: Classifier) -> LoadedClassifier:
    encoder, numbers = network.encoder, [str(number) for number in range(network.head.out_features)]
    return LoadedClassifier(network, encoder.patch_embed.img_size[0], encoder.in_chans, network.t / 2, numbers, [])


def _of_authors(path: Path, sigma: float | None, final_norm: bool) -> LoadedClassifier:
    if sigma is None:
        raise RRCMError(f"{path}: does not say which noise it was fine-tuned for; give sigma, in pixel units")
    network = load_authors_checkpoint(path, sigma=sigma, final_norm=final_norm)
    if not isinstance(network, Classifier):
        raise RRCMError(f"{path}: a pre-trained network has no classes; take a fine-tuned one")
    subject = _of_classifier(network)._replace(sigma=sigma)  # the network is told the nearest of their noise levels
    return _named_by_imagenet(subject, "imagenet-1k") if len(subject.names) == 1000 else subject


def _of_timm(name: str, weights: Path | None) -> LoadedClassifier:
    network = load_timm(name, weights)
    config = resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    if channels not in (1, 3) or height != width:
        raise RRCMError(f"{name}: is for images of {channels} x {height} x {width}: must be square, of 1 or 3 channels")
    numbers = [str(number) for number in range(network.num_classes)]
    normalized = Normalized(network, config["mean"], config["std"]).eval()
    subject = LoadedClassifier(normalized, height, channels, None, numbers, [])
    subset = infer_imagenet_subset(network)
    return _named_by_imagenet(subject, subset) if subset else subject


def _named_by_imagenet(subject: LoadedClassifier, subset: str) -> LoadedClassifier:
    info = ImageNetInfo(subset)
    names = [info.index_to_description(k).split(",")[0] for k in range(info.num_classes())]
    return subject._replace(names=names, synsets=info.label_names())


def _read_names(path: Path, count: int) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RRCMError(f"{path}: cannot be read as text ({one_line(error)})") from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise RRCMError(f"{path}: has {len(names)} class names, the model {count} classes; give one a line, in order")
    return names
