"""The settings of a published run, and how they are brought up to date when the code has other settings.

params.yaml has every setting of the code that wrote it. Later code may have settings that the file lacks, and may lack
settings that the file has. Only these may be changed, and only if they did not decide what the run computed.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import yaml

from rrcm.config import Config, parse_config, read_settings
from rrcm.derived import SECTIONS, derived_settings
from rrcm.publication.compare import NO_RESULT
from rrcm.publication.result import Result
from rrcm.sections import Section
from rrcm.utils.errors import RRCMError
from rrcm.utils.provenance import read_committed

DERIVED = "derived"


class Update(NamedTuple):
    """Settings that are up to date, and the changes that made them so."""

    values: dict
    added: dict[str, object]  # by name, such as finetune.epochs. A whole section may have been added or removed
    removed: dict[str, object]


class _Dumper(yaml.SafeDumper):
    """Writes YAML as `make params` does, so that files differ only where settings do."""


_Dumper.add_representer(  # the name n would be a truth value to other readers of YAML
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "'" if text in "ynYN" else None)
)


def settings_text(values: Mapping) -> str:
    """The content of params.yaml."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_settings(result: Result) -> Config:
    """The settings of a published result. Raises `RRCMError` if the code has others, so that it must be redrawn."""
    path = result.folder / "params.yaml"
    values = read_settings(path)
    added, removed = find_changes(values)
    changes = [f"{what} {', '.join(names)}" for what, names in (("new:", added), ("gone:", removed)) if names]
    if not changes and values[DERIVED] != derive(values):
        changes = [f"other: {DERIVED}"]
    if changes:
        raise RRCMError(
            f"{path}: the code has other settings ({'; '.join(changes)}); bring the result up to date with "
            f"`make redraw NAME={result.name}`"
        )
    return parse_config(values, str(path))


def find_changes(values: Mapping, section: type[Section] = Config, prefix: str = "") -> tuple[list[str], list[str]]:
    """The names of the settings that `values` lack, and of those that `section` does not have.

    A missing or unknown section is listed by its own name.
    """
    takes_others = section.model_config["extra"] == "allow"  # of plug-ins
    gone = [] if takes_others else [name for name in values if name not in section.model_fields]
    added, removed = [], [f"{prefix}{name}" for name in gone]
    for name, field in section.model_fields.items():
        if name not in values:
            added.append(f"{prefix}{name}")
        elif _is_section(field.annotation) and isinstance(values[name], Mapping):
            nested = find_changes(values[name], field.annotation, f"{prefix}{name}.")
            added, removed = added + nested[0], removed + nested[1]
    return added, removed


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def update_settings(values: Mapping, today: Mapping, confirmed: Sequence[str], defaults: Mapping | None) -> Update:
    """The settings `values` of a run, brought up to date with the code.

    New settings get their values in `today`. Settings that are gone are dropped. `derived` is made anew, and all others
    stay. `confirmed` names new settings whose values are known to describe what the run did. `defaults` are the
    settings of the profile when `values` were written, or None if they are unknown. Raises `RRCMError` for a change
    that might misstate what the run computed.
    """
    added, removed = (
        {name: look_up(source, name) for name in names}
        for source, names in zip((today, values), find_changes(values), strict=True)
    )
    if unknown := [name for name in confirmed if not covers(added, name)]:
        raise RRCMError(f"{unknown[0]}: is not a new setting, and only new settings need a value; leave it out")
    for name, value in removed.items():
        if defaults is None:
            raise RRCMError(
                f"{name}: is gone, and its default is unknown, as the commit that wrote this file is not here; fetch "
                "the whole history of git, or run and publish again"
            )
        if value != look_up(defaults, name):
            raise RRCMError(
                f"{name} = {value!r}: is gone, and this was not its default {look_up(defaults, name)!r}; run and "
                "publish again"
            )
    merged = merge(values, today, Config)
    merged[DERIVED] = derive(merged)
    parse_config(merged)
    if doubts := find_doubts(values, merged, (added, removed), confirmed):
        raise RRCMError(doubts)
    return Update(merged, added, removed)


def read_defaults(root: Path, revision: str | None, profile: str) -> Mapping | None:
    """The settings of a profile in conf/ at a commit, with interpolations as they are written.

    None if the checkout does not have them.
    """
    texts = [read_committed(root, str(revision), path) for path in ("conf/config.yaml", f"conf/profile/{profile}.yaml")]
    if None in texts:
        return None
    common, own = map(yaml.safe_load, texts)
    return _overridden(common, own)


def _overridden(values: Mapping, others: Mapping) -> dict:
    """`values`, with those of `others` in place of the values under the same keys of nested mappings."""
    merged = dict(values)
    for key, other in others.items():
        nested = isinstance(other, Mapping) and isinstance(values.get(key), Mapping)
        merged[key] = _overridden(values[key], other) if nested else other
    return merged


def look_up(values: Mapping, name: str) -> object:
    """The value of a setting by its name, such as finetune.epochs; None if there is none."""
    for key in name.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def covers(names: Iterable[str], setting: str) -> bool:
    """Whether `names` have a setting or the section that it is in."""
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


def merge(values: Mapping, today: Mapping, section: type[Section]) -> dict:
    """The settings of `today`, in its order, with the values of `values` where it has them, and blocks of plug-ins."""
    merged = {}
    for name, current in today.items():
        kind = section.model_fields[name].annotation
        value = values.get(name, current)
        merged[name] = merge(value, current, kind) if _is_section(kind) and isinstance(value, Mapping) else value
    if section.model_config["extra"] == "allow":
        merged |= {name: block for name, block in values.items() if name not in merged}
    return merged


def derive(values: Mapping) -> dict:
    """The derived settings. They are empty if other settings are invalid, so that validation names the reason."""
    try:
        return derived_settings({name: values[name] for name in SECTIONS})
    except (KeyError, TypeError, AttributeError):
        return {}


def find_doubts(
    values: Mapping, merged: Mapping, update: tuple[Mapping, Mapping], confirmed: Sequence[str]
) -> str | None:
    """Why `merged` might not be the settings of the run that had `values`, in one line, or None.

    The hash of the settings that decide an item (a training or a certification) must be the one that the run recorded.
    It may differ by settings that are gone, which had their defaults, and by new settings that are `confirmed`. These
    are the settings of `update`, as in `Update`. New settings of sections without such hashes must be confirmed.
    """
    added, removed = update
    known = [name for name in added if any(covers([name], each) for each in confirmed)]
    doubtful = [name for name in added if name not in known]
    for name in doubtful:
        section = name.split(".")[0]
        if section not in SECTIONS and NO_RESULT.get(section) is not True:
            new = f"{_assignments([name], added)}: is new, and nothing shows that the run did this"
            return f"{new}; {_advice([name], added)}"
    before, now, as_before = (
        _hashes(derived.get("settings", {}))
        for derived in (values.get(DERIVED, {}), merged[DERIVED], derive(_restore(merged, known, removed)))
    )
    differ = [
        item for item in sorted(before.keys() | now) if before.get(item) not in (now.get(item), as_before.get(item, ""))
    ]
    if not differ:
        return None
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    doubtful = [name for name in doubtful if name.split(".")[0] in SECTIONS]
    new = f"new are {_assignments(doubtful, added)}; " if doubtful else ""
    return f"{differ[0]}{more}: other settings decide it than when it ran; {new}{_advice(doubtful, added)}"


def _assignments(names: Sequence[str], values: Mapping) -> str:
    return ", ".join(f"{name} = {values[name]!r}" for name in names)


def _advice(names: Sequence[str], values: Mapping) -> str:
    """Advice about new settings whose values may not describe what the run did."""
    options = " ".join(f"-S {name}={json.dumps(values[name])}" for name in names)
    confirmation = f"confirm with {options} that the run did this, or " if names else ""
    return f"{confirmation}run and publish again"


def _restore(settings: Mapping, without: Sequence[str], additional: Mapping[str, object]) -> dict:
    """The settings without the ones in `without`, and with additional ones, all by names such as finetune.epochs."""
    restored = copy.deepcopy(dict(settings))
    for name in (*without, *additional):
        *parents, key = name.split(".")
        section = reduce(dict.__getitem__, parents, restored)
        if name in additional:
            section[key] = additional[name]
        else:
            del section[key]
    return restored


def _hashes(hashes: Mapping, prefix: str = "") -> dict[str, str]:
    """The hash of each item by a name such as finetune.rrcm.sigma_0_5."""
    items: dict[str, str] = {}
    for name, value in hashes.items():
        items |= _hashes(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return items
