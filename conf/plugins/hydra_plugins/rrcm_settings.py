"""Resolvers for config.yaml that compute what depends on a method, because DVC's templates cannot look methods up."""

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


def joint_networks(methods: ListConfig, sigmas: ListConfig) -> ListConfig:
    """The methods with one network for all sigmas and all of its experts' passes. None if there is only one sigma."""
    joint = [name for name in methods if name in METHODS and METHODS[name].joint == 1.0]
    return OmegaConf.create(joint if len(sigmas) > 1 else [])


for function in (derive, joint_networks):
    OmegaConf.register_new_resolver(function.__name__, function, replace=True)
