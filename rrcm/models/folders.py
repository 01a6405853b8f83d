"""Model folders: config.json says what a model is, beside its weights and the tables of its training.

config.json has in `files` the SHA-256 of each of these files, and in `sha256` that of its own other entries. A model
that is part of another is named there by its path and its `sha256`. So this hash covers everything that a model
consists of, damage anywhere is noticed on loading, and no model can be part of itself.
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

FORMAT = 3  # of config.json
OLD_FORMAT = 2  # without hashes
WITH_PARTS = ("ensemble", "denoised")  # kinds whose parts had hashes of another sort in OLD_FORMAT
CONFIG, WEIGHTS = "config.json", "model.safetensors"

Network = TypeVar("Network", bound=nn.Module)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,1000}$")]  # a path or a name, in one line
ClassNames = Annotated[list[str], Field(min_length=1)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]  # side in pixels
MAX_LEVELS = 12  # of a UNet: each has half the size of the one before
Depth = Annotated[int, Field(ge=1, le=1000)]  # more would take for ever to build, even before sizes are compared


class Entries(Section):
    """Entries of a config.json, typed as params.yaml is. No text and no truth value stands for a number."""

    model_config = ConfigDict(strict=True)


class Header(Entries):
    """The entries of every config.json. It has others too, those of its kind and those for the report."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    format: int
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Sha256]  # by name
    sha256: Sha256


class Part(Entries):
    """A model that is part of another: its folder, relative to that of the other, and the `sha256` of its config."""

    path: Place
    sha256: Sha256


TypedEntries = TypeVar("TypedEntries", bound=Entries)


def write_model_folder(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write config.json, and the weights if there are any. `config` (JSON-able) has at least the `kind`.

    Tables (.csv) that belong to the model are in the folder already: what is there now is what is hashed.
    """
    if tensors is not None:
        save_tensors(folder / WEIGHTS, dict(tensors))
    held = sorted([*folder.glob("*.csv"), *folder.glob(WEIGHTS)])
    config = {"kind": config["kind"], "format": FORMAT} | config | {"files": {p.name: sha256_file(p) for p in held}}
    write_json(folder / CONFIG, config | {"sha256": sha256_config(config)})


def read_model_config(folder: Path | str, sha256: str | None = None) -> dict:
    """config.json of a model folder of any kind, if it and the files beside it match their hashes.

    `sha256` is what the model must have that the folder is part of. A folder without hashes, of an older version, is
    read too, and a note says so. Raises `RRCMError` when the folder is missing, damaged, outdated or another one.
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
    """Raises `RRCMError` if a file has another hash. It may be missing: what loading needs says so itself."""
    try:
        if not path.exists() or sha256_file(path) == sha256:
            return
    except OSError as error:
        raise RRCMError(f"{path}: cannot be read ({error.strerror})") from None
    if path.name == WEIGHTS:
        load_tensors(path)  # says more of a file that is cut short, or of another format
    raise RRCMError(f"{path}: is damaged: it does not match its hash in {CONFIG}; dvc pull or train it again")


def sha256_config(config: Mapping[str, object]) -> str:
    """SHA-256 of all entries but `sha256` itself; spaces and the order of the keys do not matter."""
    entries = json.loads(json.dumps({key: value for key, value in config.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


@functools.cache
def _note_old(folder: Path) -> None:
    print(f"note: {folder}: is of an older version, without hashes, so damage would go unnoticed", file=sys.stderr)


def parse_entries(folder: Path | str, config: object, entries: type[TypedEntries]) -> TypedEntries:
    """`config`, or what is in one of its entries, typed. Raises `RRCMError` that names the key and what is allowed."""
    try:
        return entries.model_validate(config)
    except ValidationError as error:
        raise RRCMError(f"{folder}/{CONFIG}: {explain(error, entries)}; train it again or dvc pull") from None


def check_kind(folder: Path | str, config: Mapping, known: Iterable[str]) -> None:
    """Raises `RRCMError` unless the `kind` in the config of a model folder is among `known` kinds."""
    if config["kind"] in known:
        return
    if config["kind"] == "encoder":
        raise RRCMError(f"{folder}/{CONFIG}: this is an encoder without a head; fine-tune it first")
    expected, shown = " or ".join(sorted(known)), printable(repr(config["kind"]))[:50]
    raise RRCMError(f"{folder}/{CONFIG}: kind {shown} cannot be loaded here; must be {expected}")


def load_network(
    folder: Path, build: Callable[[], Network], tensors: Mapping[str, torch.Tensor] | None = None
) -> Network:
    """What `build` returns, with the weights of a model folder or the given ones, in eval mode.

    It is first built without memory, so sizes that are not those of the weights are refused before any is taken. Raises
    `RRCMError` if the network cannot be built or has other weights.
    """
    tensors = load_tensors(folder / WEIGHTS) if tensors is None else tensors
    try:
        with torch.device("meta"):
            check_weights(build().state_dict(), tensors, folder)
        return load_weights(build(), tensors, folder).eval()
    except (RRCMError, RecursionError):
        raise
    except Exception as error:  # torch, timm and diffusers each raise their own
        raise RRCMError(
            f"{folder}/{CONFIG}: describes no network ({one_line(error)}); train it again or dvc pull"
        ) from None


def part_of(folder: Path, path: str) -> dict[str, str]:
    """The model in `folder` / `path` as the entry of a model in `folder`: see `Part`. Raises `RRCMError` as above."""
    sha256 = read_model_config(folder / path).get("sha256")
    if sha256 is None:
        raise RRCMError(f"{folder / path}: is of an older version, without hashes; train it again or dvc pull")
    return {"path": path, "sha256": sha256}
