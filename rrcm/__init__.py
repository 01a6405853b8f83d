"""rRCM: Robust Representation Consistency Model (Lei et al., ICLR 2025). Pre-training, fine-tuning, certification.

The names below are the core for use without the pipeline. Each has an example in its docstring. They are loaded on
first use, because torch takes seconds to import, and some stages only read settings or draw figures.
"""

from importlib import import_module
from importlib.metadata import version

_HOMES = {
    "BaseClassifier": "rrcm.models.base_classifiers",
    "CascadedClassifier": "rrcm.certification.cascade",
    "Certificate": "rrcm.certification.states",
    "NoiseConditionedCNN": "rrcm.models.cnn",
    "NoiseConditionedViT": "rrcm.models.vit",
    "RRCMInputs": "rrcm.objectives.rrcm",
    "RRCMLevels": "rrcm.objectives.rrcm",
    "SmoothedClassifier": "rrcm.certification.smoothing",
    "choose_thresholds": "rrcm.certification.cascade_thresholds",
    "consistency_regularizer": "rrcm.objectives.consistency",
    "info_nce": "rrcm.objectives.contrastive",
    "karras_levels": "rrcm.models.noise_levels",
    "load_authors_checkpoint": "rrcm.models.authors",
    "load_base_classifier": "rrcm.models.load",
    "num_levels": "rrcm.objectives.rrcm",
    "recompute_radii": "rrcm.certification.recompute",
    "rrcm_loss": "rrcm.objectives.rrcm",
    "teacher_decay": "rrcm.training.optim",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("rrcm")
    if name not in _HOMES:
        raise AttributeError(f"module 'rrcm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
