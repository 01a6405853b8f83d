"""Resolvers for config.yaml that compute what depends on a method, because DVC's templates cannot look methods up."""

import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # DVC may run in the environment of another checkout
from rrcm.derived import SECTIONS, derived_settings
from rrcm.methods import METHODS, check_methods
from rrcm.plugins import plugin_path, use_plugin

NOTHING = OmegaConf.create([])


def derive(
    methods: ListConfig, sigmas: ListConfig, *sections: ListConfig | DictConfig, _root_: DictConfig
) -> DictConfig:
    """Apply `rrcm.derived.derived_settings` to the composed settings.

    Unknown methods are skipped here, because validation reports them, and so are methods and sigmas that are no lists.
    """
    known, sections = known_methods(methods, _root_), [sigmas if isinstance(sigmas, ListConfig) else NOTHING, *sections]
    values = [OmegaConf.to_container(section, resolve=True) for section in sections]
    return OmegaConf.create(derived_settings(dict(zip(SECTIONS, [known, *values], strict=True))))


def known_methods(methods: ListConfig, root: DictConfig) -> list[str]:
    """The methods that exist, with those of the plug-in. None if they are no list, which validation reports."""
    if isinstance(root.plugin, str):
        use_plugin(root.plugin)
    check_methods()
    return [name for name in methods if name in METHODS] if isinstance(methods, ListConfig) else []


def joint_networks(methods: ListConfig, sigmas: ListConfig, _root_: DictConfig) -> ListConfig:
    """The methods with one network for all sigmas and all of its experts' passes. None if there is only one sigma."""
    joint = [name for name in known_methods(methods, _root_) if METHODS[name].joint == 1.0]
    return OmegaConf.create(joint if isinstance(sigmas, ListConfig) and len(sigmas) > 1 else [])


def pretrainings(methods: ListConfig, _root_: DictConfig) -> ListConfig:
    """The pre-trainings that the methods start from."""
    starts = [METHODS[name].initial_weights for name in known_methods(methods, _root_) if METHODS[name].pretrained_here]
    return OmegaConf.create(list(dict.fromkeys(starts)))


for function in (derive, joint_networks, pretrainings, plugin_path):
    OmegaConf.register_new_resolver(function.__name__, function, replace=True)
