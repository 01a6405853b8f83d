"""What the options of `rrcm certify --cascade` mean: models, sigmas and thresholds."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrcm.certification.cascade_rules import check_scales
from rrcm.certification.record import CascadeRecord, ChosenThresholds, read_record
from rrcm.models.load import LoadedCascade
from rrcm.models.own_code import load_named_cascade
from rrcm.utils.errors import RRCMError


class CascadeOptions(NamedTuple):
    """The options of a cascade, completed by what its models and a record say."""

    models: list[str]  # as the user gave them: one for all sigmas, or one for each
    loaded: LoadedCascade
    thresholds: list[float]  # one for each sigma but the smallest, pixel units
    chosen: ChosenThresholds | None  # how the thresholds were chosen, if a record says so

    @property
    def sigmas(self) -> list[float]:
        """By increasing sigma, in pixel units."""
        return self.loaded.sigmas


def load_options(
    models: Sequence[str],
    sigmas: Sequence[float],
    thresholds: Sequence[float],
    record: Path | None,
    *,
    classes: Path | None = None,
    outside_range: bool = False,
) -> CascadeOptions:
    """Load the models of a cascade. The other arguments are passed on to `load_named_cascade`.

    `record` is the record of a cascade, from which the thresholds are taken, and the sigmas too if none are given.
    Without `record` and `thresholds`, all thresholds are 0. Raises `RRCMError` for options that do not fit together.
    """
    chosen = None
    if record is not None:
        if thresholds:
            raise RRCMError(f"{record}: has thresholds, and --threshold gives others; leave one of the two out")
        published = _read_cascade_record(record)
        if sigmas and list(sigmas) != published.sigmas:
            given = f"has thresholds for the sigmas {published.sigmas}, not for {list(sigmas)}"
            raise RRCMError(f"{record}: {given}; leave the sigmas out, or give the thresholds themselves")
        sigmas, thresholds, chosen = published.sigmas, published.thresholds, published.chosen
    if len(sigmas) == 1:
        raise RRCMError(f"sigma = {sigmas[0]:g}: a cascade has at least two sigmas; give more, or leave --cascade out")
    if sigmas:
        check_scales(sigmas, thresholds or [0.0] * (len(sigmas) - 1))  # before models are loaded
    loaded = load_named_cascade(models, sigmas, classes=classes, outside_range=outside_range)
    if len(loaded.sigmas) == 1:
        raise RRCMError(f"{models[0]}: was trained for one sigma, a cascade has at least two; give the sigmas")
    thresholds = list(thresholds) or [0.0] * (len(loaded.sigmas) - 1)
    check_scales(loaded.sigmas, thresholds)
    return CascadeOptions(list(models), loaded, thresholds, chosen)


def _read_cascade_record(path: Path) -> CascadeRecord:
    if not path.is_file():
        raise RRCMError(f"{path}: no such file with the record of a cascade; give the .json beside its certificates")
    record = read_record(path)
    if not isinstance(record, CascadeRecord):
        raise RRCMError(f"{path}: is the record of a single sigma, which has no thresholds; give a cascade's")
    return record
