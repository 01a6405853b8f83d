"""The methods that are compared, one row each. Everything that tells one method from another stands here.

A training depends on the cells of its own row that decide its result, so changing a row retrains that method alone, and
adding a row retrains nothing (derived.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

PER_OBJECTIVE = ("lr", "temperature")  # settings of pre-training that may differ by objective
REFERENCE = "rrcm"  # the method whose encoder passes others get, and with which the report compares them
MATCHED_PRETRAINING = "rrcm"  # the pre-training whose compute the methods with budget "total" get as well
SOFT_LABEL_OBJECTIVES = {"cat_rs"}  # those with `needs_soft_labels`
SOFT_LABELS = "data/soft_labels.safetensors"  # where the stage soft-labels puts them
DENOISER = "models/denoiser"  # where the stage denoiser puts it
DENOISED = ("dds", "densepure", "diffsmooth")  # base classifiers that denoise first
BUDGETS = ("finetune", "total")
FAMILIES = (
    "rRCM",
    "other pre-training",
    "noise",
    "regularization",
    "adversarial",
    "ensemble",
    "denoise, then classify",
)

TABLE = {
    "rrcm": {
        "initial_weights": "rrcm",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM",
        "colour": "#0072B2",
    },
    "consistency": {
        "initial_weights": None,
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "regularization",
        "label": "Consistency",
        "colour": "#D55E00",
    },
    "gaussian": {
        "initial_weights": None,
        "objective": "gaussian",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "noise",
        "label": "Gaussian",
        "colour": "#009E73",
    },
    "consistency_matched": {
        "initial_weights": None,
        "objective": "consistency",
        "budget": "total",
        "classifier": "classifier",
        "base": "consistency",
        "family": "regularization",
        "label": "Consistency, matched compute",
        "colour": "#D55E00",
    },
    "gaussian_matched": {
        "initial_weights": None,
        "objective": "gaussian",
        "budget": "total",
        "classifier": "classifier",
        "base": "gaussian",
        "family": "noise",
        "label": "Gaussian, matched compute",
        "colour": "#009E73",
    },
    "timm": {
        "initial_weights": "timm",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "other pre-training",
        "label": "timm ViT",
        "colour": "#CC79A7",
    },
    "stability": {
        "initial_weights": None,
        "objective": "stability",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "noise",
        "label": "Stability",
        "colour": "#999933",
    },
    "stability_matched": {
        "initial_weights": None,
        "objective": "stability",
        "budget": "total",
        "classifier": "classifier",
        "base": "stability",
        "family": "noise",
        "label": "Stability, matched compute",
        "colour": "#999933",
    },
    "macer": {
        "initial_weights": None,
        "objective": "macer",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "regularization",
        "label": "MACER",
        "colour": "#882255",
    },
    "macer_matched": {
        "initial_weights": None,
        "objective": "macer",
        "budget": "total",
        "classifier": "classifier",
        "base": "macer",
        "family": "regularization",
        "label": "MACER, matched compute",
        "colour": "#882255",
    },
    "smoothadv": {
        "initial_weights": None,
        "objective": "smoothadv",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "adversarial",
        "label": "SmoothAdv",
        "colour": "#E69F00",
    },
    "smoothadv_matched": {
        "initial_weights": None,
        "objective": "smoothadv",
        "budget": "total",
        "classifier": "classifier",
        "base": "smoothadv",
        "family": "adversarial",
        "label": "SmoothAdv, matched compute",
        "colour": "#E69F00",
    },
    "smoothmix": {
        "initial_weights": None,
        "objective": "smoothmix",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "adversarial",
        "label": "SmoothMix",
        "colour": "#56B4E9",
    },
    "smoothmix_matched": {
        "initial_weights": None,
        "objective": "smoothmix",
        "budget": "total",
        "classifier": "classifier",
        "base": "smoothmix",
        "family": "adversarial",
        "label": "SmoothMix, matched compute",
        "colour": "#56B4E9",
    },
    "rrcm_without_contrastive": {
        "initial_weights": "rrcm_without_contrastive",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM, consistency alone",
        "colour": "#44AA99",
    },
    "rrcm_without_consistency": {
        "initial_weights": "rrcm_without_consistency",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM without consistency",
        "colour": "#332288",
    },
    "rrcm_independent_noise": {
        "initial_weights": "rrcm_independent_noise",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM, independent noise",
        "colour": "#AA4499",
    },
    "rrcm_constant_levels": {
        "initial_weights": "rrcm_constant_levels",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM, constant levels",
        "colour": "#DDCC77",
    },
    "moco_v3": {
        "initial_weights": "moco_v3",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "other pre-training",
        "label": "MoCo-v3",
        "colour": "#661100",
    },
    "dmae": {
        "initial_weights": "dmae",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "other pre-training",
        "label": "DMAE",
        "colour": "#117733",
    },
    "rrcm_dmae": {
        "initial_weights": "rrcm_dmae",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "other pre-training",
        "label": "rRCM + DMAE",
        "colour": "#F0E442",
    },
    "cat_rs": {
        "initial_weights": None,
        "objective": "cat_rs",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "adversarial",
        "label": "CAT-RS",
        "colour": "#A0522D",
    },
    "rrcm_cat_rs": {
        "initial_weights": "rrcm",
        "objective": "cat_rs",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM + CAT-RS",
        "colour": "#5E3C99",
    },
    "rrcm_smoothadv": {
        "initial_weights": "rrcm",
        "objective": "smoothadv",
        "budget": "finetune",
        "classifier": "classifier",
        "base": None,
        "family": "rRCM",
        "label": "rRCM + SmoothAdv",
        "colour": "#0B8F9C",
    },
    "cat_rs_matched": {
        "initial_weights": None,
        "objective": "cat_rs",
        "budget": "total",
        "classifier": "classifier",
        "base": "cat_rs",
        "family": "adversarial",
        "label": "CAT-RS, matched compute",
        "colour": "#A0522D",
    },
    "consistency_ensemble": {
        "initial_weights": None,
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "ensemble",
        "base": None,
        "family": "ensemble",
        "label": "Consistency, ensemble",
        "colour": "#B2182B",
    },
    "rrcm_ensemble": {
        "initial_weights": "rrcm",
        "objective": "consistency",
        "budget": "finetune",
        "classifier": "ensemble",
        "base": None,
        "family": "ensemble",
        "label": "rRCM, ensemble",
        "colour": "#2166AC",
    },
    "dds": {
        "initial_weights": "gaussian",
        "objective": None,
        "budget": "finetune",
        "classifier": "dds",
        "base": None,
        "family": "denoise, then classify",
        "label": "DDS",
        "colour": "#CC6677",
    },
    "dds_finetuned": {
        "initial_weights": "gaussian",
        "objective": "gaussian",
        "budget": "finetune",
        "classifier": "dds",
        "base": None,
        "family": "denoise, then classify",
        "label": "DDS, fine-tuned",
        "colour": "#6699CC",
    },
    "densepure": {
        "initial_weights": "gaussian",
        "objective": None,
        "budget": "finetune",
        "classifier": "densepure",
        "base": None,
        "family": "denoise, then classify",
        "label": "DensePure",
        "colour": "#AA3377",
    },
    "diffsmooth": {
        "initial_weights": "gaussian",
        "objective": None,
        "budget": "finetune",
        "classifier": "diffsmooth",
        "base": None,
        "family": "denoise, then classify",
        "label": "DiffSmooth",
        "colour": "#997700",
    },
}


APPEARANCE = {"label", "colour", "base", "family"}  # columns of TABLE that decide no result


@dataclass(frozen=True)
class Method:
    """How a classifier is trained, and how it is drawn."""

    initial_weights: str | None  # a pre-training objective, "timm", a method if it denoises, or None: random weights
    objective: str | None  # of fine-tuning, a key of `rrcm.objectives.FINETUNING`; None: put together, not trained
    budget: str  # of BUDGETS; "total": also the compute of rRCM's pre-training
    classifier: str  # base classifier, a key of `rrcm.models.base_classifiers.CLASSIFIERS`, "ensemble", or in DENOISED
    base: str | None  # the method with the same training at the smaller budget
    family: str  # of FAMILIES: what tells it from the others
    label: str
    colour: str  # such as #0072B2

    @property
    def identity(self) -> dict[str, str | None]:
        """The columns that decide a result."""
        return {name: value for name, value in asdict(self).items() if name not in APPEARANCE}

    @property
    def pretrained_here(self) -> bool:
        """Whether the initial weights come from a pre-training of this pipeline."""
        return self.initial_weights not in (None, "timm") and not self.denoises

    @property
    def needs_soft_labels(self) -> bool:
        """Whether the votes of another smoothed classifier for the training images belong to its training data."""
        return self.objective in SOFT_LABEL_OBJECTIVES

    @property
    def is_ensemble(self) -> bool:
        """Whether it is several classifiers, each trained as the other columns say."""
        return self.classifier == "ensemble"

    @property
    def denoises(self) -> bool:
        """Whether its base classifier is a denoiser and a classifier."""
        return self.classifier in DENOISED

    @property
    def trained(self) -> str:
        """Kind of the classifier that one training makes: a member of an ensemble, what sees denoised images."""
        return "classifier" if self.is_ensemble or self.denoises else self.classifier


METHODS = {name: Method(**row) for name, row in TABLE.items()}


def classifier_of(method: str, denoised: Mapping) -> tuple[str, float] | None:
    """What classifies for a method that denoises: the method it is trained by, and the pixel noise it is trained with.

    None if the method does not denoise, or if `denoised`, the settings of that name, have a model from elsewhere.
    """
    kind = METHODS[method]
    if not kind.denoises or denoised["model"] is not None:
        return None
    own = denoised.get(kind.classifier) or {}
    return kind.initial_weights, float(own.get("classifier_sigma", denoised["classifier_sigma"]))


def finetuning_keys(method: str, sigma: float) -> list[str]:
    """The keys of a setting's values that apply to one training, the most special first."""
    row = METHODS[method]
    keys = [row.objective] if row.objective is not None else []
    keys += ["scratch"] if row.initial_weights is None else []
    return [*keys, f"sigma_{float(sigma)}", "default"]


def value_for_objective(setting: object, objective: str) -> object:
    """A setting of pre-training that is one value, or a mapping by objective with the key `default`."""
    return setting.get(objective, setting.get("default")) if isinstance(setting, Mapping) else setting
