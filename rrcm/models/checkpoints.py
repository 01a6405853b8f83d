"""Model folders of encoders and classifiers.

Their `kind` in config.json is "encoder" (pre-trained), "classifier" (fine-tuned), or "network" (a classifier on another
trunk). kinds.py loads all other kinds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, Literal, Self, TypeVar

from pydantic import ConfigDict, model_validator

from rrcm.config import Count, Positive, Stem
from rrcm.models import ENCODERS
from rrcm.models.base_classifiers import NetworkClassifier, NoiseConditionedClassifier
from rrcm.models.cnn import NoiseConditionedCNN
from rrcm.models.encoders import Encoder
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
from rrcm.models.joint import JointSigmas, config_at, read_joint
from rrcm.models.kinds import LoadedClassifier
from rrcm.models.vit import BlockOptions, NoiseConditionedViT
from rrcm.sections import check_cnn, check_stem, check_width
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import expand_user

ARCHITECTURE = ("image_size", "channels", "patch_size", "embed_dim", "depth", "num_heads")
IMPLIED = {"network": "vit", "stem": "patches"}  # where a config.json has no such entry
COMPARED = (*IMPLIED, *ARCHITECTURE)  # what the weights of an encoder and the settings must agree on


class ViTSizes(Entries):
    """The sizes of a `NoiseConditionedViT` (ARCHITECTURE) and its `BlockOptions`, from which `build` makes it again."""

    image_size: ImageSize
    channels: Literal[1, 3]
    patch_size: Count
    embed_dim: Count
    depth: Depth
    num_heads: Count
    mlp_dim: Count
    qkv_bias: bool
    norm_eps: Positive
    stem: Stem = "patches"

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        check_width(self.embed_dim, self.num_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        check_stem(self.stem, self.image_size, self.patch_size, self.embed_dim)
        return self

    def build(self) -> NoiseConditionedViT:
        """The network of these sizes, with random weights."""
        sizes = (getattr(self, name) for name in ARCHITECTURE)
        return NoiseConditionedViT(*sizes, BlockOptions(self.mlp_dim, self.qkv_bias, self.norm_eps), self.stem)


class CNNSizes(Entries):
    """The sizes of a `NoiseConditionedCNN`, from which `build` makes it again."""

    network: Literal["cnn"]
    image_size: ImageSize
    channels: Literal[1, 3]
    patch_size: Count
    embed_dim: Count

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        check_cnn(self.image_size, self.patch_size, self.embed_dim)
        return self

    def build(self) -> NoiseConditionedCNN:
        """The network of these sizes, with random weights."""
        return NoiseConditionedCNN(self.image_size, self.channels, self.patch_size, self.embed_dim)


Sizes = TypeVar("Sizes", ViTSizes, CNNSizes)


class EncoderEntries(Entries, Generic[Sizes]):
    """The entries of an encoder's config.json that describe the network."""

    model_config = ConfigDict(extra="ignore")

    architecture: Sizes


class ClassifierEntries(EncoderEntries[Sizes], Generic[Sizes]):
    """The entries of a classifier's config.json that describe the network."""

    class_names: ClassNames
    sigma: Positive  # pixel units
    t: Positive  # model space
    can_pass: bool = False  # it has one more output, "pass"


def sizes_of(config: Mapping) -> type[ViTSizes] | type[CNNSizes]:
    """The class of the entry `architecture` of a config.json. That of a ViT has no entry `network`."""
    entry = config.get("architecture")
    return CNNSizes if isinstance(entry, Mapping) and "network" in entry else ViTSizes


def architecture(encoder: Encoder) -> dict[str, int | float | bool | str]:
    """The `ViTSizes` or `CNNSizes` of an encoder. There is an entry `stem` only if it does not consist of patches."""
    common = {
        "image_size": encoder.image_size,
        "channels": encoder.in_chans,
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.embed_dim,
    }
    if isinstance(encoder, NoiseConditionedCNN):
        return {"network": "cnn", **common}
    block = encoder.blocks[0]
    return {
        **common,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_dim": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": block.norm1.eps,
    } | ({} if encoder.stem == "patches" else {"stem": encoder.stem})


def save_model(
    folder: Path | str,
    model: Encoder | NoiseConditionedClassifier | NetworkClassifier,
    *,
    class_names: Sequence[str] | None = None,  # of a classifier, in the order of its logits; None: 0, 1, ...
    sigma: float | JointSigmas | None = None,  # of a classifier, pixel units; None: `model.sigma`
    kind: str = "classifier",  # of a classifier with our encoder: a key of `rrcm.models.FOLDER_LOADERS`
    can_pass: bool = False,  # whether the last output of a classifier is "pass", which is no class
    dtype: str = "fp32",  # bf16 rounds the stored weights, which halves the file; they are loaded as float32
    **metadata: object,
) -> None:
    """Write the model folder of an encoder or a classifier. `metadata` (JSON-able) is added to config.json.

    Raises `RRCMError` unless there is one class name per class.
    """
    folder = Path(folder)
    if isinstance(model, Encoder):
        config = {"kind": "encoder", "architecture": architecture(model)}
    else:
        num_classes = model.num_classes - can_pass
        names = [str(k) for k in range(num_classes)] if class_names is None else list(class_names)
        if len(names) != num_classes:
            raise RRCMError(f"{folder}: {len(names)} class names for {num_classes} classes; give one per class")
        if isinstance(model, NetworkClassifier):
            config = {"kind": "network", "architecture": model.architecture}
        else:
            config = {"kind": kind, "architecture": architecture(model.encoder)}
        config |= {"class_names": names} | ({"can_pass": True} if can_pass else {})
        if isinstance(sigma, JointSigmas):
            config |= {"joint": sigma.entries}
        else:
            config |= {"sigma": model.sigma if sigma is None else sigma}
            config |= {"t": model.t} if isinstance(model, NoiseConditionedClassifier) else {}
    tensors = model.state_dict()
    if dtype == "bf16":
        tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    write_model_folder(folder, config | metadata, tensors)


def load_encoder(path: Path | str, expected: Mapping[str, int | str] | None = None) -> Encoder:
    """Load the encoder of a model folder or of an authors' checkpoint file, without its head or projector.

    `expected` has sizes of COMPARED, for a ViT including the number of heads, which an authors' file does not record.
    Raises `RRCMError` for other sizes, and for a file or folder that cannot be read.
    """
    path = expand_user(path)
    encoder = ENCODERS["file" if path.is_file() else "folder"](path, expected)
    _check_sizes(architecture(encoder), expected, path)
    return encoder


def load_encoder_folder(path: Path, expected: Mapping[str, int] | None) -> Encoder:
    """The encoder of a model folder. Raises `RRCMError` as `load_encoder` does."""
    config = read_model_config(path)
    check_kind(path, config, ("encoder", "classifier"))
    sizes = parse_entries(path, config, EncoderEntries[sizes_of(config)]).architecture
    _check_sizes(sizes.model_dump(), expected, path)  # before the weights are read
    if config["kind"] == "classifier":
        joint = read_joint(path, config)
        config = config_at(path, config, joint and joint.middle)  # the weights are the same at every sigma
        return build_from_folder(path, config).train().encoder
    return load_network(path, sizes.build).train()


def load_classifier_folder(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "classifier" in `rrcm.models.FOLDER_LOADERS`."""
    return describe_classifier(build_from_folder(folder, config), config["class_names"])


def describe_classifier(
    classifier: NoiseConditionedClassifier, class_names: list[str] | None = None
) -> LoadedClassifier:
    """Describe a classifier with our encoder, for certification. Without names, the classes are called 0, 1, ..."""
    encoder = classifier.encoder
    numbers = [str(number) for number in range(classifier.num_classes)]
    return LoadedClassifier(classifier, encoder.image_size, encoder.in_chans, class_names or numbers)


def build_from_folder(
    folder: Path, config: Mapping, kind: type[NoiseConditionedClassifier] = NoiseConditionedClassifier
) -> NoiseConditionedClassifier:
    """The classifier of class `kind` in a model folder whose config.json is `config`, in eval mode."""
    entries = parse_entries(folder, config, ClassifierEntries[sizes_of(config)])
    sizes, outputs = entries.architecture, len(entries.class_names) + entries.can_pass
    classifier = load_network(folder, lambda: kind(sizes.build(), outputs, entries.t))
    classifier.sigma = entries.sigma
    return classifier


def _check_sizes(sizes: Mapping, expected: Mapping | None, source: Path) -> None:
    if expected is None:
        return
    found = IMPLIED | sizes
    for name, wanted in (IMPLIED | expected).items():
        if found[name] != wanted:
            raise RRCMError(
                f"{source}: checkpoint of another architecture: {name} is {found[name]}, the settings want {wanted}; "
                "pre-train again or change the settings"
            )
