"""Model folders: model.safetensors with the weights and config.json with what is needed to build the network again.

`kind` in config.json is "encoder" (pre-trained), "classifier" (fine-tuned), or "network" (a classifier on another
trunk). Other kinds are loaded by load.py alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import NetworkClassifier, NoiseConditionedClassifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import expand_user, read_json, write_json
from rrcm.utils.tensors import load_tensors, load_weights, save_tensors

FORMAT = 2  # of config.json
ARCHITECTURE = ("image_size", "channels", "patch_size", "embed_dim", "depth", "num_heads")
DETAILS = ("mlp_dim", "qkv_bias", "norm_eps")


def architecture(encoder: NoiseConditionedViT) -> dict[str, int | float | bool]:
    """The keyword arguments of `NoiseConditionedViT` that build the same network: ARCHITECTURE and DETAILS."""
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
    kind: str = "classifier",  # of a classifier with our encoder, a key of `rrcm.models.load.KINDS`
    dtype: str = "fp32",  # bf16 rounds the weights in the file, which halves it; they are loaded as float32
    **metadata: object,
) -> None:
    """Write the model folder of an encoder or a classifier; `metadata` (JSON-able) goes into config.json too.

    Raises `RRCMError` when there is not one class name per class.
    """
    folder = Path(folder)
    if isinstance(model, NoiseConditionedViT):
        config = {"kind": "encoder", "format": FORMAT, "architecture": architecture(model)}
    else:
        names = [str(k) for k in range(model.num_classes)] if class_names is None else list(class_names)
        if len(names) != model.num_classes:
            raise RRCMError(f"{folder}: {len(names)} class names for {model.num_classes} classes; give one per class")
        if isinstance(model, NetworkClassifier):
            config = {"kind": "network", "format": FORMAT, "architecture": model.architecture}
        else:
            config = {"kind": kind, "format": FORMAT, "architecture": architecture(model.encoder)}
        config |= {"class_names": names, "sigma": model.sigma if sigma is None else sigma}
        config |= {"t": model.t} if isinstance(model, NoiseConditionedClassifier) else {}
    tensors = model.state_dict()
    if dtype == "bf16":
        tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config | metadata)


def read_model_config(folder: Path | str) -> dict:
    """config.json of a model folder of any kind. Raises `RRCMError` when it is missing, damaged or outdated."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if isinstance(config, dict) and (isinstance(config.get("architecture"), str) or "architectures" in config):
        raise RRCMError(
            f"{path}: of timm or transformers, not of a model folder; timm models are for `rrcm certify --model` and, "
            "as finetune.timm.model, for method timm; smooth others in Python with SmoothedClassifier"
        )
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise RRCMError(f"{path}: has no `kind`, so it describes no model of this version; train it again or dvc pull")
    if config.get("format") != FORMAT:
        raise RRCMError(f"{path}: has format {config.get('format')!r}, must be {FORMAT}; train it again or dvc pull")
    return config


def check_kind(folder: Path | str, config: Mapping, known: Iterable[str]) -> None:
    """Raises `RRCMError` unless the `kind` in the config of a model folder is among `known` kinds."""
    if config["kind"] in known:
        return
    if config["kind"] == "encoder":
        raise RRCMError(f"{folder}/config.json: this is an encoder without a head; fine-tune it first")
    expected = " or ".join(sorted(known))
    raise RRCMError(f"{folder}/config.json: kind {config['kind']!r} cannot be loaded here; must be {expected}")


def load_encoder(path: Path | str, expected: Mapping[str, int] | None = None) -> NoiseConditionedViT:
    """Load the encoder of a model folder or of an authors' checkpoint file, without its head or projector.

    `expected` has the sizes of ARCHITECTURE; the number of heads of an authors' file is taken from it. Raises
    `RRCMError` for other sizes, and for a file or folder that cannot be read.
    """
    path = expand_user(path)
    if path.is_file():
        num_heads = None if expected is None else expected["num_heads"]
        encoder = load_authors_checkpoint(path, num_heads=num_heads, sigma=1.0).encoder  # sigma matters to heads only
        _check_sizes(architecture(encoder), expected, path)
        return encoder
    config = read_model_config(path)
    check_kind(path, config, ("encoder", "classifier"))
    _check_sizes(_architecture_of(path, config), expected, path)
    if config["kind"] == "classifier":
        return classifier_of(path, config).train().encoder
    encoder = NoiseConditionedViT(**_architecture_of(path, config))
    return load_weights(encoder, load_tensors(path / "model.safetensors"), path)


def load_classifier(folder: Path | str) -> NoiseConditionedClassifier:
    """Load a fine-tuned classifier in eval mode. Raises `RRCMError` for a folder of another kind or a damaged one."""
    config = read_model_config(folder)
    check_kind(folder, config, ("classifier",))
    return classifier_of(Path(folder), config)


def classifier_of(folder: Path, config: Mapping) -> NoiseConditionedClassifier:
    """The classifier in a model folder of kind "classifier" whose config.json is `config`, in eval mode."""
    names, t, sigma = class_names_of(folder, config), config.get("t"), config.get("sigma")
    for key, value in (("t", t), ("sigma", sigma)):
        if not (isinstance(value, float | int) and value > 0):
            raise RRCMError(f"{folder}/config.json: {key} = {value!r} must be above 0; train it again or dvc pull")
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(**_architecture_of(folder, config)), len(names), t)
    classifier.sigma = sigma
    return load_weights(classifier, load_tensors(folder / "model.safetensors"), folder).eval()


def class_names_of(folder: Path, config: Mapping) -> list[str]:
    """The class names in the config.json of a classifier. Raises `RRCMError` unless they are a list of text."""
    names = config.get("class_names")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise RRCMError(f"{folder}/config.json: class_names must be a list of text; train it again or dvc pull")
    return names


def _architecture_of(folder: Path, config: Mapping) -> dict:
    found = config.get("architecture")
    if not isinstance(found, dict) or set(found) != {*ARCHITECTURE, *DETAILS}:
        names = ", ".join((*ARCHITECTURE, *DETAILS))
        raise RRCMError(f"{folder}/config.json: architecture must have {names}; train it again or dvc pull")
    return found


def _check_sizes(found: Mapping, expected: Mapping | None, source: Path) -> None:
    for name in ARCHITECTURE if expected is not None else ():
        if found[name] != expected[name]:
            raise RRCMError(
                f"{source}: checkpoint of another architecture: {name} is {found[name]}, the settings want "
                f"{expected[name]}; pre-train again or change the settings"
            )
