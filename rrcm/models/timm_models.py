"""Load timm models: by timm's name, from a snapshot folder, or from a snapshot on the Hugging Face hub.

timm's `save_for_hf` and `push_to_hf_hub` write snapshots: config.json with the `architecture`, and weights. timm itself
downloads the weights of its own models. All other weights are read by `load_tensors`, which runs no code from a file.

timm is imported inside the functions, because importing it takes more than a second and most runs do not need it.
"""

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_json
from rrcm.utils.tensors import check_finite, load_tensors

HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"  # timm's prefix of a snapshot folder
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


def is_snapshot(folder: Path) -> bool:
    """Whether `folder` has the config.json of a timm snapshot."""
    path = folder / "config.json"
    return path.is_file() and _is_timm_config(read_json(path))


def _is_timm_config(config: object) -> bool:
    return isinstance(config, dict) and "kind" not in config and isinstance(config.get("architecture"), str)


def load_timm(name: str, weights: Path | str | None = None) -> nn.Module:
    """A pretrained timm model, in train mode.

    `name` is a timm name, `hf-hub:owner/name` or `hf-hub:owner/name@revision`, or a snapshot folder. The weights of a
    timm name are downloaded, or read from the file `weights`, which then decides the number of classes.

    Raises `RRCMError` for an unknown name, for weights that cannot be downloaded, and for weights of another model.
    """
    folder = expand_user(name.removeprefix(FOLDER))
    on_hub = name.startswith(HUB)
    if weights is not None and (on_hub or folder.is_dir()):
        raise RRCMError(f"{weights}: weights are for a timm name, and {name} has its own; leave them out")
    if on_hub:
        return _load_snapshot(name, *_download_snapshot(name))
    if folder.is_dir():
        return _load_snapshot(name, folder, _weights_file(folder))
    if complaint := suggest_timm_name(name):
        raise RRCMError(f"{name}: {complaint}")
    if weights is not None:
        return _load_timm_file(name, expand_user(weights))
    return _download_timm(name)


def build_timm(name: str, image_size: int, channels: int, num_classes: int) -> nn.Module:
    """The timm model of this name, with random weights. Raises `RRCMError` for an unknown name."""
    import timm

    if complaint := suggest_timm_name(name):
        raise RRCMError(f"model.architecture = {name!r}: must be vit, lenet, resnet110 or a timm name; {complaint}")
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, img_size=image_size)
    except TypeError:  # convolutional networks take any size and lack this argument
        return timm.create_model(name, num_classes=num_classes, in_chans=channels)


def suggest_timm_name(name: str) -> str | None:
    """None if timm has a model of this name, otherwise a message with similar names."""
    import timm

    if timm.is_model(name):
        return None
    if name.startswith(FOLDER):
        return "there is no such folder"
    if re.fullmatch(r"(https?://huggingface\.co/)?[\w.-]+/[\w.-]+/?", name):
        repository = re.sub(r"https?://huggingface\.co/", "", name).rstrip("/")
        return f"timm has no model of that name; on the Hugging Face hub it would be hf-hub:{repository}"
    if ":" in name:
        return f"timm has no model of that name; a prefix must be {HUB[0]} or {FOLDER}"
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists all names"
    return f"timm has no model of that name; {hint}"


def class_names(network: nn.Module, source: str) -> tuple[list[str], list[str]] | None:
    """The class names of a snapshot and, if these are descriptions, its short label names; None if it has neither.

    Raises `RRCMError` unless there is one name per class. The message calls the snapshot `source`.
    """
    labels = network.pretrained_cfg.get("label_names")
    descriptions = network.pretrained_cfg.get("label_descriptions")
    if not labels:
        return None
    if isinstance(labels, Mapping):  # class number -> name, with gaps
        known = {str(number): label for number, label in labels.items()}
        if not known.keys() <= {str(number) for number in range(network.num_classes)}:
            raise RRCMError(f"{source}: label_names has a class outside 0 ... {network.num_classes - 1}; correct it")
        labels = [known.get(str(number), str(number)) for number in range(network.num_classes)]
    if not isinstance(labels, list | tuple) or len(labels) != network.num_classes:
        count = len(labels) if isinstance(labels, list | tuple) else "no list of"
        raise RRCMError(f"{source}: has {count} label_names for {network.num_classes} classes; correct its config.json")
    labels = [str(label) for label in labels]
    if not isinstance(descriptions, Mapping) or len(set(labels)) < len(labels):
        return labels, []
    described = [str(descriptions.get(label, label)).split(",")[0] for label in labels]
    return described, labels


def _download_timm(name: str) -> nn.Module:
    import timm

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    try:
        with _weights_only():
            network = timm.create_model(name, pretrained=True)
        check_finite(network.state_dict(), name)
        return network
    except RRCMError:
        raise
    except Exception as error:  # the hub, the protocols and timm raise all kinds of exceptions
        raise RRCMError(
            f"{name}: cannot download pretrained weights ({one_line(error)}); pass a local file of them"
        ) from None


def _load_timm_file(name: str, path: Path) -> nn.Module:
    import timm

    tensors, overlay = load_tensors(path), {}
    config = timm.get_pretrained_cfg(name)
    if config:
        head = config.classifier[0] if isinstance(config.classifier, list | tuple) else config.classifier
        rows = tensors.get(f"{head}.weight")
        if rows is not None and rows.ndim and len(rows) != config.num_classes + (config.label_offset or 0):
            overlay = {"num_classes": len(rows), "label_offset": None}
    return _create(name, f"{path}: not the weights of timm's {name}", tensors, overlay)


def _load_snapshot(name: str, folder: Path, weights: Path) -> nn.Module:
    config = read_json(folder / "config.json")
    if not _is_timm_config(config):
        library = "transformers" if isinstance(config, dict) and "architectures" in config else "another library"
        raise RRCMError(f"{name}: its config.json names no `architecture` of timm; a model of {library}?")
    if complaint := suggest_timm_name(config["architecture"]):
        raise RRCMError(f"{name}: architecture {config['architecture']!r}: {complaint}; is timm too old?")
    return _create(f"{FOLDER}{folder}", f"{name}: not a complete snapshot of a timm model", load_tensors(weights), {})


def _create(name: str, complaint: str, tensors: dict[str, torch.Tensor], overlay: dict) -> nn.Module:
    import timm

    overlay = {"state_dict": tensors, "source": None, "file": None, "custom_load": False} | overlay
    classes = {"num_classes": overlay["num_classes"]} if "num_classes" in overlay else {}
    try:
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **classes)
        network.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
        expected = network.pretrained_cfg["num_classes"]
        if network.num_classes != expected:  # timm would leave the head random
            raise ValueError(f"its config.json has both {expected} and {network.num_classes} classes")
        for key, value in network.state_dict().items():
            if key in tensors and tensors[key].is_floating_point() != value.is_floating_point():
                raise ValueError(f"{key} has numbers of type {tensors[key].dtype}")
        if resized := _resized(network, tensors):
            raise ValueError(resized)
    except Exception as error:  # timm's loaders raise all kinds of exceptions
        raise RRCMError(f"{complaint} ({one_line(error)})") from None
    return network


def _resized(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A message about a weight that timm has resampled to the sizes of `network`, or None if there is none.

    A head may lose as many rows as the model's `label_offset`.
    """
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for key, value in network.state_dict().items():
        if key in tensors and tensors[key].numel() != value.numel() and key.rpartition(".")[0] not in heads:
            given, wanted = tuple(tensors[key].shape), tuple(value.shape)
            return f"{key} has shape {given}, the model {wanted}; give a snapshot folder with the sizes in model_args"
    return None


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for suffix in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{suffix}"))
    if len(files) != 1:
        has = f"several ({', '.join(path.name for path in files[:5])})" if files else "none"
        raise RRCMError(f"{folder}: needs one file of weights, best {WEIGHTS[0]}; it has {has}")
    return files[0]


def _download_snapshot(name: str) -> tuple[Path, Path]:
    """Download a snapshot. Returns the folder of config.json and the file of weights, both in the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition(":")[2].partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise RRCMError(f"{name}: must be {HUB[0]}owner/name or {HUB[0]}owner/name@revision")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    try:
        config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
        for file in WEIGHTS[:2]:
            with contextlib.suppress(EntryNotFoundError):
                return config.parent, Path(hf_hub_download(repository, file, revision=revision or None))
    except RepositoryNotFoundError:
        raise RRCMError(
            f"{name}: the hub has no such model, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise RRCMError(f"{name}: the model has no revision {revision!r} on the hub") from None
    except Exception as error:  # the hub and the protocols raise all kinds of exceptions
        raise RRCMError(f"{name}: cannot be downloaded ({one_line(error)}); pass a local snapshot folder") from None
    raise RRCMError(f"{name}: has neither {' nor '.join(WEIGHTS[:2])} on the hub, so timm cannot load it")


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Keep `torch.load` from running code in a checkpoint, whatever this version of timm requests."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
