"""Trained networks on disk: a folder with model.safetensors and config.json; the authors' released format; timm's."""

from collections.abc import Mapping
from pathlib import Path

from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import Classifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json
from rrcm.utils.tensors import load_tensors, load_weights, save_tensors

ARCHITECTURE = ("image_size", "channels", "patch_size", "embed_dim", "depth", "num_heads")
DETAILS = ("mlp_dim", "qkv_bias", "norm_eps")  # files from before there was a choice lack them: the paper's


def architecture(encoder: NoiseConditionedViT) -> dict[str, int | float | bool]:
    """What must be known to build the encoder again, as keyword arguments of `NoiseConditionedViT`."""
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
    folder: Path | str, model: NoiseConditionedViT | Classifier, class_names=None, dtype="fp32", **facts: object
) -> None:
    """Write `model` into `folder`: weights (float32) and config.json with its architecture and `facts` (JSON-able)."""
    folder = Path(folder)
    encoder = model.encoder if isinstance(model, Classifier) else model
    described = {"format": 1, "architecture": architecture(encoder)}
    if isinstance(model, Classifier):
        described |= {"classes": model.head.out_features, "t": model.t}
    tensors = model.state_dict()
    if dtype == "bf16":
        tensors = {name: t.bfloat16() for name, t in tensors.items()}
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", described | facts)


def load_encoder(path: Path | str, expected: Mapping[str, int] | None = None) -> NoiseConditionedViT:
    """Load the encoder of a folder of ours or of a file of the authors, with or without a head or projector on it.

    With `expected`, which has ARCHITECTURE, other sizes are refused, and the authors' heads are as many as it says.
    """
    path = Path(path)
    if path.is_file():
        num_heads = None if expected is None else expected["num_heads"]
        encoder = load_authors_checkpoint(path, num_heads=num_heads, sigma=1.0).encoder  # any sigma: it is for the head
        _check_sizes(architecture(encoder), expected, path)
        return encoder
    described = _read_config(path)
    _check_sizes(described["architecture"], expected, path)
    if "classes" in described:
        return load_classifier(path).train().encoder
    return load_weights(
        NoiseConditionedViT(**described["architecture"]), load_tensors(path / "model.safetensors"), path
    )


def load_classifier(folder: Path | str) -> Classifier:
    """Load a fine-tuned classifier, in eval mode."""
    folder = Path(folder)
    described = _read_config(folder)
    if "classes" not in described:
        raise RRCMError(f"{folder}/config.json: this is an encoder without a head; fine-tune it first")
    model = Classifier(NoiseConditionedViT(**described["architecture"]), described["classes"], described["t"])
    return load_weights(model, load_tensors(folder / "model.safetensors"), folder).eval()


def _read_config(folder: Path) -> dict:
    described = read_json(folder / "config.json")
    found = described.get("architecture")
    if not isinstance(found, dict) or not set(ARCHITECTURE) <= set(found) <= {*ARCHITECTURE, *DETAILS}:
        raise RRCMError(f"{folder}/config.json: does not describe a network of rrcm; it must have `architecture`")
    return described


def _check_sizes(found: Mapping, expected: Mapping | None, origin: Path) -> None:
    for name in ARCHITECTURE if expected is not None else ():
        if found[name] != expected[name]:
            raise RRCMError(
                f"{origin}: checkpoint of another architecture: {name} is {found[name]}, "
                f"the settings want {expected[name]}; pre-train again or change the settings"
            )
