"""The settings that follow from others and from the table of methods, for DVC, whose templates cannot look anything up.

Each training and each certification depends on the settings that decide its result and on no others. DVC watches one
hash of these. `dvc params diff` shows the settings themselves, which are in params.yaml as well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rrcm.methods import (
    BLOCKS,
    DENOISER,
    MATCHED_PRETRAINING,
    METHODS,
    PER_OBJECTIVE,
    REFERENCE,
    SOFT_LABELS,
    denoising_classifier,
    finetuning_keys,
    value_for_objective,
)

# The settings that others are derived from: the arguments of `derived_settings`.
SECTIONS = ["methods", "sigmas", "model", "pretrain", "finetune", "soft_labels", "denoiser", "denoised", "certify"]
NOTHING = "data/shards"  # watched in the place of an input that a training does not have, as all watch it
STARTS = {"objectives", "initial_weights", "timm"}  # settings of `finetune` that single methods need
SHARES = {"pretrain_cost_shared_by", "ensemble_members", "time_condition"}  # and those that are looked up
NO_RESULT = {"checkpoint_every"}  # settings that decide no result
TRUNK = ("architecture", "pixel_mean", "pixel_std")  # settings of `model` for a network that is no ViT
PROJECTOR = ("projector_hidden_dim", "projection_dim")  # settings of `model` for pre-training alone
COST = ("epochs", "batch_size", "steps_per_batch", "num_noise")  # settings that decide how many passes epochs take


def derived_settings(
    methods: Sequence[str],
    sigmas: Sequence[float],
    model: Mapping,
    pretrain: Mapping,
    finetune: Mapping,
    soft_labels: Mapping,
    denoiser: Mapping,
    denoised: Mapping,
    certify: Mapping,
) -> dict:
    """`finetune`, `denoiser` and `soft_labels`: the stages of these kinds, by name, with what each depends on.

    `settings`: the hashes of the settings that decide each pre-training, each fine-tuning and each certification. The
    classifiers of methods that denoise are among the fine-tunings.
    """
    parts = {denoising_classifier(method, denoised) for method in methods} - {None}
    runs = [(method, sigma) for method in methods for sigma in sigmas]
    runs += sorted(parts - set(runs))
    denoise = any(METHODS[method].denoises for method in methods)
    source = denoiser["public"]["source"]
    voter = {name: soft_labels[name] for name in ("method", "sigma")}
    needed = any(METHODS[method].needs_soft_labels for method in methods)
    by_method: dict[str, dict] = {}
    for method, sigma in runs:
        decisive = finetuning_settings(method, sigma, model, pretrain, finetune, soft_labels, denoised)
        by_method.setdefault(method, {})[_place(sigma)] = hash_of(decisive)
    return {
        "finetune": {
            f"{method}-{sigma}": {
                "method": method,
                "sigma": sigma,
                "settings": f"{method}.{_place(sigma)}",
                "initial_weights": initial_weights_path(method, finetune, denoised) or NOTHING,
                "other_input": _other_input(method) or NOTHING,
            }
            for method, sigma in runs
        },
        "denoiser": {("trained" if source is None else "public"): _source_path(source) or NOTHING} if denoise else {},
        "soft_labels": {"{method}-{sigma}".format(**voter): voter} if needed else {},
        "settings": {
            "pretrain": {name: hash_of(pretraining_settings(name, model, pretrain)) for name in pretrain["objectives"]},
            "finetune": by_method,
            "certify": {method: hash_of(certification_settings(method, certify, denoised)) for method in methods},
        },
    }


def hash_of(settings: object) -> str:
    """A hash of JSON-able settings, for which 1 and 1.0 are the same. Its prefix keeps YAML from reading a number."""
    return "sha256:" + hashlib.sha256(json.dumps(_normalized(settings), sort_keys=True).encode()).hexdigest()[:16]


def _normalized(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _normalized(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(item) for item in value]
    return float(value) if type(value) is int else value


def _place(sigma: float) -> str:
    """A noise level as a key that DVC can look up: a point would end it."""
    return f"sigma_{float(sigma)}".replace(".", "_")


def pretraining_settings(objective: str, model: Mapping, pretrain: Mapping) -> dict:
    """The settings that decide a pre-training, apart from seed, threads and data."""
    blocks = {name for name, value in pretrain.items() if isinstance(value, Mapping)} - {*PER_OBJECTIVE, "views"}
    needed = set(BLOCKS.get(objective, [objective])) | ({MATCHED_PRETRAINING} if pretrain["equal_passes"] else set())
    values = _without(pretrain, (blocks - needed) | {"objectives"} | NO_RESULT)
    own = {name: value_for_objective(pretrain[name], objective) for name in PER_OBJECTIVE}
    return {"pretrain": values | own, "model": _without(model, TRUNK)}


def finetuning_settings(
    method: str,
    sigma: float,
    model: Mapping,
    pretrain: Mapping,
    finetune: Mapping,
    soft_labels: Mapping,
    denoised: Mapping,
) -> dict:
    """The settings that decide one training, apart from seed, threads and data."""
    row = METHODS[method]
    matched = row.matched
    found = {"method": row.identity}
    if row.denoises:
        found["denoised"] = {name: denoised.get(name) for name in ("model", row.classifier)}
    if row.objective is None:
        return found | {"shared_by": finetune["pretrain_cost_shared_by"]}
    found["finetune"] = chosen(finetune, method, sigma)
    if not row.denoises:
        is_vit = model["architecture"] == "vit"
        found["model"] = _without(model, TRUNK + PROJECTOR) if is_vit else {name: model[name] for name in TRUNK}
    if row.pretrained_here:
        found["start"] = finetune["initial_weights"]
        grid = ("max_levels", "t_min", "t_max", "rho") if finetune["time_condition"] == "nearest_level" else ("t_min",)
        found["levels"] = [finetune["time_condition"], {name: pretrain[name] for name in grid}]
    if row.initial_weights == "timm":
        found["start"] = finetune["timm"]
    if row.is_ensemble:
        found["members"] = finetune["ensemble_members"]
    if row.pretrained_here or row.denoises or row.needs_soft_labels or matched:
        found["shared_by"] = finetune["pretrain_cost_shared_by"]
    if matched or finetune["equal_passes"]:
        found["reference"] = _cost(REFERENCE, sigma, finetune)
    if matched:
        settings = ("steps", "batch_size", MATCHED_PRETRAINING)
        found["pretraining"] = {"objective": MATCHED_PRETRAINING, **{name: pretrain.get(name) for name in settings}}
    if row.needs_soft_labels:
        found["soft_labels"] = [soft_labels["n"], _cost(soft_labels["method"], soft_labels["sigma"], finetune)]
    return found


def certification_settings(method: str, certify: Mapping, denoised: Mapping) -> dict:
    """The settings that decide the certificates of a method, apart from seed, threads and data."""
    values = dict(certify) if METHODS[method].is_ensemble else _without(certify, {"consensus"})
    return {"certify": values, "max_images": (denoised.get("max_images") or {}).get(method)}


def chosen(finetune: Mapping, method: str, sigma: float) -> dict:
    """What one training is trained with: of each setting its value, and those of its objective's own block.

    A setting without a value for this training is None here; config.py names it.
    """
    keys = finetuning_keys(method, sigma)

    def choose(value: object) -> object:
        return next((value[key] for key in keys if key in value), None) if isinstance(value, Mapping) else value

    common = {name: choose(value) for name, value in _without(finetune, STARTS | SHARES | NO_RESULT).items()}
    own = finetune["objectives"].get(METHODS[method].objective) or {}
    own = {name: choose(value) for name, value in own.items()}
    return common | {name: value for name, value in own.items() if value is not None}


def _cost(method: str, sigma: float, finetune: Mapping) -> dict:
    """What decides how many encoder passes a method's own epochs take."""
    objective = METHODS[method].objective
    own = finetune["objectives"].get(objective) or {}
    values = chosen(finetune, method, sigma)
    return {"objective": objective} | {name: values.get(name) for name in (*COST, *own)}


def _without(settings: Mapping, names: Sequence[str] | set[str]) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def initial_weights_path(method: str, finetune: Mapping, denoised: Mapping) -> str | None:
    """The file or folder that decides a method's initial weights, for DVC to watch.

    None where there is none: random weights, or a name of timm or on a hub. `finetune` and `denoised` are the settings
    of these names.
    """
    row = METHODS[method]
    if row.denoises:
        if (part := denoising_classifier(method, denoised)) is not None:
            return "models/{}/sigma_{}".format(*part)
        return _source_path(denoised["model"])
    if row.pretrained_here:
        return _expand(finetune["initial_weights"] or f"models/pretrain/{row.initial_weights}")
    if row.initial_weights == "timm":
        weights = finetune["timm"]["weights"]
        return _expand(weights) if weights else _source_path(finetune["timm"]["model"])
    return None


def _source_path(source: str | None) -> str | None:
    """The file or folder that `source` is; None for a name, which decides itself."""
    path = _expand((source or "").removeprefix("local-dir:"))
    return path if path and Path(path).exists() else None


def _other_input(method: str) -> str | None:
    """What a method is made from besides images and initial weights."""
    if METHODS[method].denoises:
        return DENOISER
    return SOFT_LABELS if METHODS[method].needs_soft_labels else None


def _expand(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") else path  # DVC takes a ~ literally
