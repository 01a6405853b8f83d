"""The file that lists the entries of a board: certificates of one method, and what its authors say about them.

board.schema.json is the JSON schema of the file, for editors and for other programs. It is made from the models here:

    python -m rrcm.report.board_entries > rrcm/report/board.schema.json
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rrcm.config import explain
from rrcm.methods import CASCADE
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import open_regular, read_text

MAX_BYTES = 2**22  # of a list of entries
RADII = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0]


def _name_deployments(files: object) -> object:
    """The keys of `files` as text: YAML reads 0.25 as a number, and JSON has only texts."""
    if not isinstance(files, Mapping):
        return files
    named = {f"{key:g}" if isinstance(key, int | float) else key: path for key, path in files.items()}
    if len(named) < len(files):
        raise ValueError("has one sigma twice; give each once")
    return named


Text = Annotated[str, Field(min_length=1, max_length=200)]
Deployment = Annotated[str, Field(pattern=rf"^({CASCADE}|\d+(\.\d+)?)$")]
Link = Annotated[str, Field(pattern=r"^https?://[^\s\"<>]+$", max_length=500)]
Radius = Annotated[float, Field(ge=0, lt=math.inf)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class Entry(_Strict):
    """One method on one data set."""

    name: Annotated[Text, Field(description="Name of the method on the board, unique for its data set.")]
    data: Annotated[Text, Field(description="Data set and split. Entries of the same images share a table.")]
    threat: Literal["L2"] = Field(default="L2", description="Norm of the perturbations. Pixels lie in [0, 1].")
    files: Annotated[
        dict[Deployment, Text],
        Field(min_length=1, json_schema_extra={"additionalProperties": False}),
        BeforeValidator(_name_deployments),
    ] = Field(description="Certificate file of each deployed classifier, by its sigma or by the word cascade.")
    runs: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["."],
        description="Folders of training runs that differ only in their seed. Each has all files. They are relative to "
        "the folder of this file.",
    )
    n: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Most estimation samples per image. Default: the record's."
    )
    n0: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Selection samples per image. Without it, the samples are unknown."
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Most probability that a certificate is wrong. A record tells it as well."
    )
    bound: Literal["binary", "margin"] | None = Field(
        default=None, description="How the runner-up is bounded. Default: the record's, else binary as in all papers."
    )
    stopping: Literal["fixed", "sequential"] | None = Field(
        default=None, description="Whether each image takes n0 + n samples. Default: the record's, else fixed."
    )
    network: Text | None = Field(default=None, description="Architecture of the base classifier.")
    paper: Link | None = Field(default=None, description="Address of the paper.")
    code: Link | None = Field(default=None, description="Address of the code, or of the place of the files.")
    report: Text | None = Field(default=None, description="Path of a report, relative to the folder of this file.")


class Board(_Strict):
    """A list of entries."""

    title: Annotated[Text, Field(description="Title of the page.")]
    radii: Annotated[list[Radius], Field(min_length=1, max_length=20)] = Field(
        default=RADII, description="Radii of the tables, in pixel units."
    )
    entries: Annotated[list[Entry], Field(min_length=1)]

    @model_validator(mode="after")
    def _name_entries_once(self) -> "Board":
        seen = set()
        for entry in self.entries:
            key = entry.data, entry.threat, entry.name
            if key in seen:
                raise ValueError(f"two entries of {entry.data!r} have the name {entry.name!r}; rename one")
            seen.add(key)
        return self


def read_board(path: Path) -> Board:
    """The board that a YAML or JSON file lists. Raises `RRCMError` for a file that does not fit the schema."""
    try:
        with open_regular(path) as file:
            if len(file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        values = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; give a list of entries, such as results/board.yaml") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RRCMError(f"{path}: cannot be read as YAML or JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise RRCMError(f"{path}: must have the keys title and entries, as board.schema.json describes")
    try:
        return Board.model_validate(values)
    except ValidationError as error:
        raise RRCMError(f"{path}: {explain(error, Board)}{_entry_name(error, values)}") from None


def _entry_name(error: ValidationError, values: Mapping) -> str:
    """The entry that the first complaint is about, by its number, counted from 1, and its name."""
    location = error.errors(include_url=False)[0]["loc"]
    if len(location) < 2 or location[0] != "entries" or not isinstance(location[1], int):
        return ""
    entry = values["entries"][location[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    return f" (entry {location[1] + 1}{f', {name!r}' if name is not None else ''})"


def schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Board.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
