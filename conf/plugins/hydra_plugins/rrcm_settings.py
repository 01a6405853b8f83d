"""A resolver for config.yaml that computes what depends on a method, because DVC's templates cannot look methods up."""

import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # DVC may run in the environment of another checkout
from rrcm.derived import SECTIONS, derived_settings
from rrcm.methods import METHODS, check_methods


def derive(methods: ListConfig, *sections: ListConfig | DictConfig) -> DictConfig:
    """Apply `rrcm.derived.derived_settings` to the composed settings.

    Unknown methods are skipped here, because validation reports them.
    """
    check_methods()
    known = [name for name in methods if name in METHODS]
    values = [OmegaConf.to_container(section, resolve=True) for section in sections]
    return OmegaConf.create(derived_settings(dict(zip(SECTIONS, [known, *values], strict=True))))


OmegaConf.register_new_resolver("derive", derive, replace=True)
