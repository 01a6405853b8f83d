"""rRCM: Robust Representation Consistency Model (Lei et al., ICLR 2025), pre-trained, fine-tuned and certified.

The names below are the core for use without the pipeline; importing them starts nothing and needs no GPU. They are
loaded on first use: torch and timm take seconds to import, and stages that only read settings or draw do without.
"""

from importlib import import_module

_HOMES = {
    "Certificate": "rrcm.smoothing",
    "NoiseConditionedViT": "rrcm.model",
    "SmoothedClassifier": "rrcm.smoothing",
    "consistency_regularizer": "rrcm.losses",
    "info_nce": "rrcm.losses",
    "karras_levels": "rrcm.schedules",
    "load_authors_checkpoint": "rrcm.checkpoint",
    "num_levels": "rrcm.schedules",
    "pretraining_loss": "rrcm.losses",
    "teacher_ema": "rrcm.schedules",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rrcm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
