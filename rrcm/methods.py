"""The table of methods: what each row trains, from which weights, for how long, and how it is drawn."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    initial_weights: str | None  # the pre-training objective whose weights it starts from, "timm", or None: random
    objective: str  # the loss of fine-tuning
    budget: Literal["finetune", "total"]  # "total": trains for rRCM's compute, pre-training included
    base: str | None  # with budget "total": the same method at budget "finetune"
    classifier: str
    label: str
    colour: str  # hex


METHODS = {
    "rrcm": Method("rrcm", "consistency", "finetune", None, "vit", "rRCM", "#0072B2"),
    "consistency": Method(None, "consistency", "finetune", None, "vit", "Consistency", "#D55E00"),
    "gaussian": Method(None, "gaussian", "finetune", None, "vit", "Gaussian", "#009E73"),
    "consistency_matched": Method(
        None, "consistency", "total", "consistency", "vit", "Consistency, matched compute", "#D55E00"
    ),
    "gaussian_matched": Method(None, "gaussian", "total", "gaussian", "vit", "Gaussian, matched compute", "#009E73"),
    "timm": Method("timm", "consistency", "finetune", None, "vit", "timm ViT", "#CC79A7"),
}
