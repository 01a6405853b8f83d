"""Model folders of encoders and classifiers.

Their `kind` in config.json is "encoder" (pre-trained), "classifier" (fine-tuned), or "network" (a classifier on another
trunk). Other kinds are loaded by kinds.py alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, model_validator

from rrcm.config import Count, Positive
from rrcm.models import ENCODERS
from rrcm.models.base_classifiers import NetworkClassifier, NoiseConditionedClassifier
from rrcm.models.folders import (
    ClassNames,
    Depth,
    Entries,
    ImageSize,
    check_kind,
    load_network,
    parse_entries,
    read_model_config,
    write_model_folder,
)
from rrcm.models.kinds import LoadedClassifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.sections import check_width
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import expand_user

ARCHITECTURE = ("image_size", "channels", "patch_size", "embed_dim", "depth", "num_heads")


class ViTSizes(Entries):
    """The keyword arguments of `NoiseConditionedViT` that build the same network again: ARCHITECTURE and details."""

    image_size: ImageSize
    channels: Literal[1, 3]
    patch_size: Count
    embed_dim: Count
    depth: Depth
    num_heads: Count
    mlp_dim: Count
    qkv_bias: bool
    norm_eps: Positive

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        check_width(self.embed_dim, self.num_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        return self


class EncoderEntries(Entries):
    """Of an encoder's config.json, what builds it."""

    model_config = ConfigDict(extra="ignore")

    architecture: ViTSizes


class ClassifierEntries(EncoderEntries):
    """Of a classifier's config.json, what builds it."""

    class_names: ClassNames
    sigma: Positive  # pixel units
    t: Positive  # model space


def architecture(encoder: NoiseConditionedViT) -> dict[str, int | float | bool]:
    """The `ViTSizes` of an encoder."""
    block = encoder.blocks[0]
    return {
        "image_size": encoder.patch_embed.img_size[0],
        "channels": encoder.in_chans,
        "patch_size": encoder.patch_embed.patch_size[0],
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_dim": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": block.norm1.eps,
    }


def save_model(
    folder: Path | str,
    model: NoiseConditionedViT | NoiseConditionedClassifier | NetworkClassifier,
    *,
    class_names: Sequence[str] | None = None,  # of a classifier, in the order of its logits; None: its numbers
    sigma: float | None = None,  # of a classifier, pixel units; None: its own
    kind: str = "classifier",  # of a classifier with our encoder, a key of `rrcm.models.FOLDER_LOADERS`
    dtype: str = "fp32",  # bf16 rounds the weights in the file, which halves it; they are loaded as float32
    **metadata: object,
) -> None:
    """Write the model folder of an encoder or a classifier; `metadata` (JSON-able) goes into config.json too.

    Raises `RRCMError` when there is not one class name per class.
    """
    folder = Path(folder)
    if isinstance(model, NoiseConditionedViT):
        config = {"kind": "encoder", "architecture": architecture(model)}
    else:
        names = [str(k) for k in range(model.num_classes)] if class_names is None else list(class_names)
        if len(names) != model.num_classes:
            raise RRCMError(f"{folder}: {len(names)} class names for {model.num_classes} classes; give one per class")
        if isinstance(model, NetworkClassifier):
            config = {"kind": "network", "architecture": model.architecture}
        else:
            config = {"kind": kind, "architecture": architecture(model.encoder)}
        config |= {"class_names": names, "sigma": model.sigma if sigma is None else sigma}
        config |= {"t": model.t} if isinstance(model, NoiseConditionedClassifier) else {}
    tensors = model.state_dict()
    if dtype == "bf16":
        tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    write_model_folder(folder, config | metadata, tensors)


def load_encoder(path: Path | str, expected: Mapping[str, int] | None = None) -> NoiseConditionedViT:
    """Load the encoder of a model folder or of an authors' checkpoint file, without its head or projector.

    `expected` has the sizes of ARCHITECTURE; the number of heads of an authors' file is taken from it. Raises
    `RRCMError` for other sizes, and for a file or folder that cannot be read.
    """
    path = expand_user(path)
    encoder = ENCODERS["file" if path.is_file() else "folder"](path, expected)
    _check_sizes(architecture(encoder), expected, path)
    return encoder


def load_encoder_folder(path: Path, expected: Mapping[str, int] | None) -> NoiseConditionedViT:
    """The encoder of a model folder. Raises `RRCMError` as `load_encoder` does."""
    config = read_model_config(path)
    check_kind(path, config, ("encoder", "classifier"))
    sizes = parse_entries(path, config, EncoderEntries).architecture.model_dump()
    _check_sizes(sizes, expected, path)  # before the weights are read
    if config["kind"] == "classifier":
        return build_from_folder(path, config).train().encoder
    return load_network(path, lambda: NoiseConditionedViT(**sizes)).train()


def load_classifier(folder: Path | str) -> NoiseConditionedClassifier:
    """Load a fine-tuned classifier in eval mode. Raises `RRCMError` for a folder of another kind or a damaged one."""
    config = read_model_config(folder)
    check_kind(folder, config, ("classifier",))
    return build_from_folder(Path(folder), config)


def load_classifier_folder(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "classifier" in `rrcm.models.FOLDER_LOADERS`."""
    return describe_classifier(build_from_folder(folder, config), config["class_names"])


def describe_classifier(
    classifier: NoiseConditionedClassifier, class_names: list[str] | None = None
) -> LoadedClassifier:
    """A classifier with our encoder, and what is needed to certify with it. Without names, classes have numbers."""
    encoder = classifier.encoder
    numbers = [str(number) for number in range(classifier.num_classes)]
    return LoadedClassifier(classifier, encoder.patch_embed.img_size[0], encoder.in_chans, class_names or numbers)


def build_from_folder(folder: Path, config: Mapping) -> NoiseConditionedClassifier:
    """The classifier in a model folder of kind "classifier" whose config.json is `config`, in eval mode."""
    entries = parse_entries(folder, config, ClassifierEntries)
    sizes, num_classes = entries.architecture.model_dump(), len(entries.class_names)
    build = lambda: NoiseConditionedClassifier(NoiseConditionedViT(**sizes), num_classes, entries.t)  # noqa: E731
    classifier = load_network(folder, build)
    classifier.sigma = entries.sigma
    return classifier


def _check_sizes(found: Mapping, expected: Mapping | None, source: Path) -> None:
    for name in ARCHITECTURE if expected is not None else ():
        if found[name] != expected[name]:
            raise RRCMError(
                f"{source}: checkpoint of another architecture: {name} is {found[name]}, the settings want "
                f"{expected[name]}; pre-train again or change the settings"
            )
