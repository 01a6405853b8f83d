"""The settings that follow from other settings and from the method table, for DVC, whose templates cannot look them up.

Each training and each certification depends on the settings that decide its result and on no others. DVC watches one
hash of these settings. `dvc params diff` shows the settings themselves, since they are in params.yaml as well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rrcm.methods import (
    BLOCKS,
    CASCADE,
    DENOISER,
    JOINT,
    MATCHED_PRETRAINING,
    METHODS,
    MULTI_SCALE_FILE,
    PER_OBJECTIVE,
    REFERENCE,
    SOFT_LABELS,
    THRESHOLDS,
    TRAINING_VOTES,
    continued_method,
    denoising_classifier,
    expert_of,
    model_name,
)

# The settings that others are derived from.
SECTIONS = ["methods", "sigmas", "model", "pretrain", "finetune", "soft_labels", "denoiser", "denoised", "certify"]
SECTIONS += ["cascade", "student"]
NOTHING = "data/shards"  # stands for an input that a training does not have: all trainings watch it anyway
STARTS = {"objectives", "initial_weights", "timm"}  # settings of `finetune` that only some methods need
SHARES = {"pretrain_cost_shared_by", "ensemble_members", "time_condition", "joint_interval"}  # likewise
PASSING = ("pass_votes", "pass_share", "pass_bias")  # likewise, for methods that can pass
NO_RESULT = {"checkpoint_every"}  # settings that decide no result
CONDITIONED = ("vit", "cnn")  # values of model.architecture for encoders that are conditioned on the noise level
# Settings of `model` for a ViT alone, with the values that they have for a CNN.
ONLY_VIT = {"stem": "patches", "init": "torch", "freeze_patch_embed": False, "grad_checkpointing": False}
TRUNK = ("architecture", "pixel_mean", "pixel_std")  # settings of `model` for a network other than our encoders
PROJECTOR = ("projector_hidden_dim", "projection_dim")  # settings of `model` for pre-training alone
COST = ("epochs", "batch_size", "steps_per_batch", "num_noise")  # settings that decide the encoder passes of an epoch


def derived_settings(settings: Mapping) -> dict:
    """The derived settings that follow from `settings`, a mapping with the keys SECTIONS.

    `finetune`, `certify`, `cascade`, `denoiser`, `soft_labels` and `training_votes` list the items of the stages with
    these names, each with its inputs. A joint method has one fine-tuning, whose `sigma` is "joint", and a certification
    for each sigma. `settings` has the hashes of the settings that decide each pre-training, each fine-tuning, each
    certification and each cascade. The fine-tunings include the classifiers inside denoising methods.
    """
    methods, sigmas, denoised = settings["methods"], settings["sigmas"], settings["denoised"]
    finetune, pretrain, model = settings["finetune"], settings["pretrain"], settings["model"]
    certified = [(method, sigma) for method in methods for sigma in sigmas]
    runs = list(dict.fromkeys((method, training_noise(method, sigma)) for method, sigma in certified))
    parts = {denoising_classifier(method, denoised) for method in methods} - {None}
    runs += sorted(parts - set(runs))
    voters = list(dict.fromkeys(continued_method(method) for method in methods if METHODS[method].can_pass))
    runs += [(method, JOINT) for method in voters if (method, JOINT) not in runs]
    denoise = any(METHODS[method].denoises for method in methods)
    source = settings["denoiser"]["public"]
    voter = {name: settings["soft_labels"][name] for name in ("method", "sigma")}
    needs_voter = any(METHODS[method].needs_soft_labels for method in methods)
    cascaded = [method for method in settings["cascade"]["methods"] if method in methods]  # validation reports others
    by_method: dict[str, dict] = {}
    for method, sigma in runs:
        by_method.setdefault(method, {})[_sigma_key(sigma)] = hash_of(finetuning_settings(method, sigma, settings))
    return {
        "finetune": {
            f"{method}-{sigma}": {
                "method": method,
                "sigma": sigma,
                "folder": _folder(sigma),
                "settings": f"{method}.{_sigma_key(sigma)}",
                "initial_weights": watched_weights(method, finetune, denoised) or NOTHING,
                "other_input": _other_input(method, sigma, settings["student"]) or NOTHING,
            }
            for method, sigma in runs
        },
        "certify": {
            f"{method}-{sigma}": {"method": method, "sigma": sigma, "folder": model_name(method, sigma)}
            for method, sigma in certified
        },
        "cascade": {method: _cascade_stage(method, settings["cascade"]) for method in cascaded},
        "denoiser": {("trained" if source is None else "public"): _source_path(source) or NOTHING} if denoise else {},
        "soft_labels": {"{method}-{sigma}".format(**voter): voter} if needs_voter else {},
        "training_votes": {method: {"method": method} for method in voters},
        "settings": {
            "pretrain": {name: hash_of(pretraining_settings(name, model, pretrain)) for name in pretrain["objectives"]},
            "finetune": by_method,
            "certify": {
                method: hash_of(certification_settings(method, settings["certify"], denoised)) for method in methods
            },
            "cascade": {method: hash_of(cascade_settings(method, settings)) for method in cascaded},
        },
    }


def hash_of(settings: object) -> str:
    """A hash of JSON-able settings, in which 1 and 1.0 are the same. Its prefix keeps YAML from reading a number."""
    return "sha256:" + hashlib.sha256(json.dumps(_normalized(settings), sort_keys=True).encode()).hexdigest()[:16]


def _normalized(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _normalized(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(item) for item in value]
    return float(value) if type(value) is int else value


def training_noise(method: str, sigma: float) -> float | str:
    """The noise of the training that a method needs for pixel noise `sigma`: `sigma` itself, or JOINT."""
    return sigma if METHODS[method].joint is None else JOINT


def _folder(noise: float | str) -> str:
    """The name of the model folder of a training, below models/METHOD/."""
    return JOINT if noise == JOINT else f"sigma_{float(noise)}"


def _sigma_key(noise: float | str) -> str:
    """The noise of a training as a key that DVC can look up. It has no point, which would end the key."""
    return _folder(noise).replace(".", "_")


def pretraining_settings(objective: str, model: Mapping, pretrain: Mapping) -> dict:
    """The settings that decide a pre-training, apart from seed, threads and data."""
    blocks = {name for name, value in pretrain.items() if isinstance(value, Mapping)} - {*PER_OBJECTIVE, "views"}
    needed = set(BLOCKS.get(objective, [objective])) | ({MATCHED_PRETRAINING} if pretrain["equal_passes"] else set())
    values = _without(pretrain, (blocks - needed) | {"objectives"} | NO_RESULT)
    own = choose_values({name: pretrain[name] for name in PER_OBJECTIVE}, (objective, "default"))
    return {"pretrain": values | own, "model": _encoder_settings(model)}


def model_settings(method: str, model: Mapping, student: Mapping) -> dict:
    """The section `model` for a method. For a student, the sizes that section `student` sets take precedence.

    `model` and `student` are the sections of the settings with these names.
    """
    if not METHODS[method].is_student:
        return dict(model)
    own = {name: value for name, value in student.items() if name in model and value is not None}
    return {**model, **(ONLY_VIT if own.get("architecture") == "cnn" else {}), **own}


def _encoder_settings(model: Mapping) -> dict:
    """The settings of our encoder. A ViT has an entry `stem` only if it does not consist of patches."""
    if model["architecture"] == "cnn":
        return {name: model[name] for name in ("architecture", "patch_size", "embed_dim", *PROJECTOR)}
    return _without(model, TRUNK + (("stem",) if model["stem"] == "patches" else ()))


def finetuning_settings(method: str, sigma: float | str, settings: Mapping) -> dict:
    """The settings that decide one fine-tuning, apart from seed, threads and data. `sigma` may be JOINT."""
    if sigma == JOINT:
        return _joint_settings(method, settings)
    row, pretrain, finetune = METHODS[method], settings["pretrain"], settings["finetune"]
    model = model_settings(method, settings["model"], settings["student"])
    decisive: dict[str, object] = {"method": row.identity}
    if row.denoises:
        decisive["denoised"] = {name: settings["denoised"].get(name) for name in ("model", row.classifier)}
    if row.objective is None:
        return decisive | {"shared_by": finetune["pretrain_cost_shared_by"]}
    decisive["finetune"] = chosen_settings(method, sigma, finetune)
    if not row.denoises:
        own = model["architecture"] in CONDITIONED
        decisive["model"] = (
            _without(_encoder_settings(model), PROJECTOR) if own else {name: model[name] for name in TRUNK}
        )
    if row.pretrained_here:
        decisive["start"] = finetune["initial_weights"]
        grid = ("max_levels", "t_min", "t_max", "rho") if finetune["time_condition"] == "nearest_level" else ("t_min",)
        decisive["levels"] = [finetune["time_condition"], {name: pretrain[name] for name in grid}]
    if row.initial_weights == "timm":
        decisive["start"] = finetune["timm"]
    if row.is_ensemble:
        decisive["members"] = finetune["ensemble_members"]
    if row.pretrained_here or row.denoises or row.needs_soft_labels or row.matched:
        decisive["shared_by"] = finetune["pretrain_cost_shared_by"]
    if row.matched or finetune["equal_passes"]:
        decisive["reference"] = _cost(REFERENCE, sigma, finetune)
    if row.matched:
        needed = {name: pretrain.get(name) for name in ("steps", "batch_size", MATCHED_PRETRAINING)}
        decisive["pretraining"] = {"objective": MATCHED_PRETRAINING, **needed}
    if row.needs_soft_labels:
        voter = settings["soft_labels"]
        decisive["soft_labels"] = [voter["n"], _cost(voter["method"], voter["sigma"], finetune)]
    if row.is_student and has_teacher(settings["student"]):
        teacher = settings["student"]["teacher"]
        decisive["teacher"] = finetuning_settings(teacher, training_noise(teacher, sigma), settings)
    return decisive


def has_teacher(student: Mapping) -> bool:
    """Whether the section `student` names a method that is no student itself. Validation reports others."""
    return student["teacher"] in METHODS and not METHODS[student["teacher"]].is_student


def teacher_folder(sigma: float | str, student: Mapping) -> str:
    """The model folder, below models/, of the teacher of a student that is trained at `sigma`, which may be JOINT."""
    return f"{student['teacher']}/{_folder(training_noise(student['teacher'], sigma))}"


def _joint_settings(method: str, settings: Mapping) -> dict:
    """The settings that decide a joint fine-tuning: the experts' settings and their cost at each sigma."""
    sigmas, finetune = sorted(settings["sigmas"]), settings["finetune"]
    passing = {name: finetune[name] for name in PASSING} if METHODS[method].can_pass else {}
    return passing | {
        "sigmas": sigmas,
        "interval": finetune["joint_interval"],
        "at_each": [finetuning_settings(method, sigma, settings) for sigma in sigmas],
        "experts": [_cost(expert_of(method), sigma, finetune) for sigma in sigmas],
    }


def certification_settings(method: str, certify: Mapping, denoised: Mapping) -> dict:
    """The settings that decide the certificates of a method, apart from seed, threads and data.

    There is an entry `runtime` only if it is not torch.
    """
    certify = {name: value for name, value in certify.items() if (name, value) != ("runtime", "torch")}
    return {"certify": certify, "max_images": (denoised.get("max_images") or {}).get(method)}


def cascade_settings(method: str, settings: Mapping) -> dict:
    """The settings that decide the certificates of a method's cascade, apart from seed, threads and data."""
    cascade, decisive = settings["cascade"], certification_settings(method, settings["certify"], settings["denoised"])
    decisive |= {name: cascade[name] for name in ("thresholds", "multi_scale")}
    decisive["sigmas"] = cascade_sigmas(cascade["sigmas"], settings["sigmas"])
    if cascade["thresholds"] == "chosen":
        weights = cascade["choose_by"]
        if isinstance(weights, Mapping):  # numbers are text in JSON
            weights = sorted([float(radius), weight] for radius, weight in weights.items())
        decisive["choose"] = [weights, cascade["choose_n"]]
    return decisive


def cascade_sigmas(chosen: Sequence[float] | None, sigmas: Sequence[float]) -> list[float]:
    """The sigmas of cascades, increasing: `chosen`, or all `sigmas`. The sections of the settings have both."""
    return sorted(sigmas if chosen is None else chosen)


def _cascade_stage(method: str, cascade: Mapping) -> dict[str, str]:
    """The inputs and outputs of the stage that certifies a cascade.

    DVC's templates cannot leave an output out. If the stage does not write the thresholds' votes or the certificates by
    the published rule, `thresholds` or `multi_scale` repeats the name of the cascade's own file, which is always an
    output.
    """
    return {
        "method": method,
        "models": f"{method}/{JOINT}" if METHODS[method].joint is not None else method,
        "thresholds": THRESHOLDS if cascade["thresholds"] == "chosen" else CASCADE,
        "multi_scale": MULTI_SCALE_FILE if cascade["multi_scale"] else CASCADE,
    }


def finetuning_keys(method: str, sigma: float) -> list[str]:
    """The keys by which a setting may have a value for one fine-tuning, in order of precedence."""
    row = METHODS[method]
    keys = [JOINT] if row.joint is not None else []
    keys += [row.objective] if row.objective is not None else []
    keys += ["scratch"] if row.initial_weights is None else []
    return [*keys, f"sigma_{float(sigma)}", "default"]


def choose_values(settings: Mapping, keys: Sequence[str]) -> dict:
    """The value that each setting has for one training.

    If a setting is a mapping, its value is the entry for the first of `keys` that the mapping has. A mapping with none
    of them stays as it is, and config.py refuses it.
    """

    def choose(setting: object) -> object:
        if not isinstance(setting, Mapping):
            return setting
        return next((setting[key] for key in keys if key in setting), setting)

    return {name: choose(setting) for name, setting in settings.items()}


def chosen_settings(method: str, sigma: float, finetune: Mapping) -> dict:
    """The settings of one fine-tuning: the common ones, overridden by the settings of its own objective."""
    keys = finetuning_keys(method, sigma)
    common = choose_values(_without(finetune, STARTS | SHARES | NO_RESULT | {*PASSING}), keys)
    own = choose_values(finetune["objectives"].get(METHODS[method].objective) or {}, keys)
    return common | {name: value for name, value in own.items() if value is not None}


def _cost(method: str, sigma: float, finetune: Mapping) -> dict:
    """The settings that decide how many encoder passes a method's own epochs take."""
    objective = METHODS[method].objective
    own = finetune["objectives"].get(objective) or {}
    values = chosen_settings(method, sigma, finetune)
    return {"objective": objective} | {name: values.get(name) for name in (*COST, *own)}


def _without(settings: Mapping, names: Sequence[str] | set[str]) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def initial_weights(method: str, finetune: Mapping, denoised: Mapping) -> str:
    """The initial weights of a method: `scratch`, a model folder, a file, or the name of a model at timm or on a hub.

    `finetune` and `denoised` are the sections of the settings with these names.
    """
    row = METHODS[method]
    if row.denoises:
        part = denoising_classifier(method, denoised)
        return denoised["model"] if part is None else "models/{}/sigma_{}".format(*part)
    if row.can_pass:
        return f"models/{continued_method(method)}/{JOINT}"
    if row.pretrained_here:
        return finetune["initial_weights"] or f"models/pretrain/{row.initial_weights}"
    return finetune["timm"]["model"] if row.initial_weights == "timm" else "scratch"


def watched_weights(method: str, finetune: Mapping, denoised: Mapping) -> str | None:
    """The file or folder of the initial weights, for DVC to watch. None for random weights and for names."""
    row = METHODS[method]
    if row.can_pass:
        return initial_weights(method, finetune, denoised)
    if row.initial_weights is None:
        return None
    if row.initial_weights == "timm" and finetune["timm"]["weights"]:
        return _expand(finetune["timm"]["weights"])
    weights = initial_weights(method, finetune, denoised)
    is_path = row.pretrained_here or (row.denoises and denoised["model"] is None)
    return _expand(weights) if is_path else _source_path(weights)


def _source_path(source: str | None) -> str | None:
    """The file or folder that `source` names, or None if it is a name, which needs no watching."""
    path = _expand((source or "").removeprefix("local-dir:"))
    return path if path and Path(path).exists() else None


def _other_input(method: str, sigma: float | str, student: Mapping) -> str | None:
    """The inputs of a training at `sigma`, which may be JOINT, other than images and initial weights."""
    if METHODS[method].is_student:
        return f"models/{teacher_folder(sigma, student)}" if has_teacher(student) else None
    if METHODS[method].denoises:
        return DENOISER
    if METHODS[method].can_pass:
        return f"{TRAINING_VOTES}/{continued_method(method)}.safetensors"
    return SOFT_LABELS if METHODS[method].needs_soft_labels else None


def _expand(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") else path  # DVC takes a ~ literally
