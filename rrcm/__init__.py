"""rRCM: Robust Representation Consistency Model (Lei et al., ICLR 2025), pre-trained, fine-tuned and certified.

The names below are the core for use without the pipeline; importing them starts nothing and needs no GPU. They are
loaded on first use: torch and timm take seconds to import, and stages that only read settings or draw do without.
"""

from importlib import import_module

_HOMES = {
    "Certificate": "rrcm.certification.smoothing",
    "NoiseConditionedViT": "rrcm.models.vit",
    "SmoothedClassifier": "rrcm.certification.smoothing",
    "consistency_regularizer": "rrcm.objectives.consistency",
    "info_nce": "rrcm.objectives.contrastive",
    "karras_levels": "rrcm.models.noise_levels",
    "load_authors_checkpoint": "rrcm.models.authors",
    "num_levels": "rrcm.objectives.rrcm",
    "rrcm_loss": "rrcm.objectives.rrcm",
    "teacher_decay": "rrcm.training.optim",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rrcm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
