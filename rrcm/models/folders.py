"""Model folders: config.json describes a model. Beside it lie the weights and the tables of the training.

The entry `files` of config.json has the SHA-256 of each of these files, and `sha256` is the hash of all other entries.
A model refers to its parts by their paths and their `sha256`. The hash therefore covers everything that a model
consists of: loading notices damage anywhere, and no model can be part of itself.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import nn

from rrcm.config import Section, explain
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import read_json, sha256_file, write_json
from rrcm.utils.tensors import check_weights, load_tensors, load_weights, save_tensors

FORMAT = 3  # version of config.json
OLD_FORMAT = 2  # the version without hashes
WITH_PARTS = ("ensemble", "denoised")  # kinds whose parts had another kind of hash in OLD_FORMAT
CONFIG, WEIGHTS = "config.json", "model.safetensors"

Network = TypeVar("Network", bound=nn.Module)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,1000}$")]  # a path or a name, in one line
ClassNames = Annotated[list[str], Field(min_length=1)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]  # side in pixels
MAX_LEVELS = 12  # of a UNet, each half the size of the level before
Depth = Annotated[int, Field(ge=1, le=1000)]  # a deeper network would take very long to build, even without memory


class Entries(Section):
    """Entries of a config.json, typed like params.yaml. Strings and booleans are not converted to numbers."""

    model_config = ConfigDict(strict=True)


class Header(Entries):
    """The entries that every config.json has, besides the entries of its kind and those for the report."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    format: int
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Sha256]  # by name
    sha256: Sha256


class Part(Entries):
    """A part of a model: its folder, relative to the folder of the model, and the `sha256` of its config.json."""

    path: Place
    sha256: Sha256


TypedEntries = TypeVar("TypedEntries", bound=Entries)


def write_model_folder(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write config.json, and the weights if there are any. `config` (JSON-able) has at least the `kind`.

    Write the tables (.csv) of the model before, since config.json lists the hashes of those that are in the folder.
    """
    if tensors is not None:
        save_tensors(folder / WEIGHTS, dict(tensors))
    held = sorted([*folder.glob("*.csv"), *folder.glob(WEIGHTS)])
    config = {"kind": config["kind"], "format": FORMAT} | config | {"files": {p.name: sha256_file(p) for p in held}}
    write_json(folder / CONFIG, config | {"sha256": sha256_config(config)})


def read_model_config(folder: Path | str, sha256: str | None = None) -> dict:
    """Read config.json of a model folder of any kind, and compare it and the files beside it with their hashes.

    `sha256` is the hash that a larger model names, if this is a part of it. A folder of the previous version, which has
    no hashes, is read with a note. Raises `RRCMError` if the folder is missing, damaged, outdated or has another hash.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if isinstance(config, dict) and (isinstance(config.get("architecture"), str) or "architectures" in config):
        raise RRCMError(
            f"{path}: of timm or transformers, not of a model folder; timm models are for `rrcm certify --model` and, "
            "as finetune.timm.model, for method timm; smooth others in Python with SmoothedClassifier"
        )
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise RRCMError(f"{path}: has no `kind`, so it describes no model of this version; train it again or dvc pull")
    if config.get("format") == OLD_FORMAT and "sha256" not in config and config["kind"] not in WITH_PARTS:
        _note_old(Path(folder))
    elif config.get("format") != FORMAT:
        shown = printable(repr(config.get("format")))[:20]
        raise RRCMError(f"{path}: has format {shown}, must be {FORMAT}; train it again or dvc pull")
    else:
        header = parse_entries(folder, config, Header)
        if header.sha256 != sha256_config(config):
            raise RRCMError(f"{path}: is damaged or was edited: it does not match its hash; dvc pull or train it again")
        for name, expected in header.files.items():
            _check_file(path.with_name(name), expected)
    if sha256 is not None and config.get("sha256") != sha256:
        raise RRCMError(
            f"{folder}: is not the part that the model it belongs to names: the hashes differ; dvc pull or train again"
        )
    return config


def _check_file(path: Path, sha256: str) -> None:
    """Raise `RRCMError` if a file has another hash. It may be missing: loading reports the files that it needs."""
    try:
        if not path.exists() or sha256_file(path) == sha256:
            return
    except OSError as error:
        raise RRCMError(f"{path}: cannot be read ({error.strerror})") from None
    if path.name == WEIGHTS:
        load_tensors(path)  # gives a better message for a truncated file or another format
    raise RRCMError(f"{path}: is damaged: it does not match its hash in {CONFIG}; dvc pull or train it again")


def sha256_config(config: Mapping[str, object]) -> str:
    """SHA-256 of all entries except `sha256` itself. Spaces and the order of the keys do not matter."""
    entries = json.loads(json.dumps({key: value for key, value in config.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


@functools.cache
def _note_old(folder: Path) -> None:
    print(f"note: {folder}: is of an older version, without hashes, so damage would go unnoticed", file=sys.stderr)


def parse_entries(folder: Path | str, config: object, entries: type[TypedEntries]) -> TypedEntries:
    """Validate `config` or one of its entries. Raises `RRCMError` that names the key and the values allowed."""
    try:
        return entries.model_validate(config)
    except ValidationError as error:
        raise RRCMError(f"{folder}/{CONFIG}: {explain(error, entries)}; train it again or dvc pull") from None


def check_kind(folder: Path | str, config: Mapping, known: Iterable[str]) -> None:
    """Raise `RRCMError` unless the `kind` in the config of a model folder is one of the `known` kinds."""
    if config["kind"] in known:
        return
    if config["kind"] == "encoder":
        raise RRCMError(f"{folder}/{CONFIG}: this is an encoder without a head; fine-tune it first")
    expected, shown = " or ".join(sorted(known)), printable(repr(config["kind"]))[:50]
    raise RRCMError(f"{folder}/{CONFIG}: kind {shown} cannot be loaded here; must be {expected}")


def load_network(
    folder: Path, build: Callable[[], Network], tensors: Mapping[str, torch.Tensor] | None = None
) -> Network:
    """The network that `build` returns, with the given weights or the weights of a model folder, in eval mode.

    The network is first built without memory, so that sizes that differ from the weights are refused before memory is
    allocated. Raises `RRCMError` if the network cannot be built or has other weights.
    """
    tensors = load_tensors(folder / WEIGHTS) if tensors is None else tensors
    try:
        with torch.device("meta"):
            check_weights(build().state_dict(), tensors, folder)
        return load_weights(build(), tensors, folder).eval()
    except (RRCMError, RecursionError):
        raise
    except Exception as error:  # torch, timm and diffusers raise all kinds of exceptions
        raise RRCMError(
            f"{folder}/{CONFIG}: describes no network ({one_line(error)}); train it again or dvc pull"
        ) from None


def part_of(folder: Path, path: str) -> dict[str, str]:
    """The `Part` by which a model in `folder` refers to the model in `folder` / `path`.

    Raises `RRCMError` as `read_model_config` does, and for a part without hashes.
    """
    sha256 = read_model_config(folder / path).get("sha256")
    if sha256 is None:
        raise RRCMError(f"{folder / path}: is of an older version, without hashes; train it again or dvc pull")
    return {"path": path, "sha256": sha256}
