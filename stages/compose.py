"""Compose conf/ into params.yaml, as `dvc exp run -S ...` does, and check it."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml
from dvc.exceptions import DvcException
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from rrcm.config import parse_config
from rrcm.methods import check_methods
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import write_text

PACKAGE = "# @package _global_"  # tells Hydra that the settings of a file belong to the top level


def compose(
    overrides: Annotated[list[str] | None, typer.Argument()] = None, output: Path = Path("params.yaml")
) -> None:
    """Write OUTPUT from conf/config.yaml and OVERRIDES such as profile=cifar10, preset=all or certify.n=2000."""
    text = compose_text(overrides or [])
    config = parse_config(yaml.safe_load(text), "conf")
    write_text(output, text)
    print(f"{output}: profile {config.profile}", file=sys.stderr)


def compose_text(overrides: list[str]) -> str:
    """The content that params.yaml should have. Raises `RRCMError` for bad files of conf/ and bad `overrides`."""
    conf = Path(__file__).resolve().parent.parent / "conf"
    check_encoding(conf)
    check_packages(conf)
    check_methods()
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "params.yaml"
        try:
            compose_and_dump(draft, str(conf), None, "config", str(conf / "plugins"), overrides)
        except MissingConfigException as error:
            group = (error.missing_cfg_file or "").split("/")[0]
            known = ", ".join(sorted(file.stem for file in (conf / group).glob("*.yaml")))
            raise RRCMError(f"{str(error).splitlines()[0]}; conf/{group} has {known}") from None
        except InterpolationKeyError as error:
            raise RRCMError(
                f"{str(error).splitlines()[0]}; correct it, or let the profile name others in `defaults`, as in "
                "rrcm/data/README.md"
            ) from None
        except (DvcException, HydraException, OmegaConfBaseException) as error:
            ours = next((each for each in causes(error) if isinstance(each, RRCMError)), None)  # of a resolver
            raise ours or RRCMError(one_line(error)) from None
        return draft.read_text(encoding="utf-8")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and the exceptions that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # OmegaConf hides it


def check_encoding(conf: Path) -> None:
    """Raise `RRCMError` for a file that is not UTF-8, or has a byte order mark, which Hydra would read as text."""
    for path in sorted(conf.rglob("*.yaml")):
        with contextlib.suppress(UnicodeDecodeError):
            if not path.read_text(encoding="utf-8").startswith("\ufeff"):
                continue
        raise RRCMError(f"{path}: must be UTF-8 without a byte order mark; save it as that")


def check_packages(conf: Path) -> None:
    """Raise `RRCMError` for a profile or a preset whose settings Hydra would nest below the name of its folder."""
    for path in sorted([*conf.glob("profile/*.yaml"), *conf.glob("preset/*.yaml")]):
        if not path.read_text(encoding="utf-8").startswith(PACKAGE):
            raise RRCMError(f"{path}: the first line must be `{PACKAGE}`; add it")


if __name__ == "__main__":
    run_command(compose)
