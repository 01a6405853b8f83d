"""The compute and the time that each model has cost, from the records of trainings and their timing files."""

from collections.abc import Mapping

import pandas as pd

from rrcm.certification.results import sigma_name
from rrcm.config import Config
from rrcm.methods import JOINT, METHODS, continued_method, denoising_classifier, model_name

SOFT_LABEL_TIMING = "timings/soft_labels.json"
DENOISER_TIMING = "timings/denoiser.json"

Run = tuple[str, float]  # method, sigma


def preparation_passes(model: Mapping) -> float:
    """Passes before the fine-tuning: the model's share of pre-training, soft labels, denoiser and so on.

    If it continues a joint training or has a teacher, all passes of that training or of the teacher are included.
    """
    return shared_passes(model) + model["compute"].get(JOINT, 0.0) + model["compute"].get("teacher", 0.0)


def shared_passes(model: Mapping) -> float:
    """The model's share of the passes that it has in common with others."""
    return model["compute"]["pretrain_share"] + model["compute"]["soft_label_share"]


def sigmas_served(model: Mapping) -> int:
    """The number of sigmas at which a model is certified: 1 for an expert."""
    return 1 if model.get(JOINT) is None else len(model[JOINT]["sigmas"])


def budget_table(config: Config, timings: Mapping[str, Mapping], models: Mapping[Run, Mapping]) -> pd.DataFrame:
    """Compute (encoder forward passes) and time (seconds) of each model at each sigma.

    The passes and the seconds of a joint training are divided equally among its sigmas.
    """

    def seconds(*paths: str) -> float:
        return sum(timings[path]["seconds"] for path in paths)

    def preparation_seconds(method: str, sigma: float) -> float:
        shared, served = seconds(*shared_timings(config, method)), sigmas_served(models[method, sigma])
        spent = shared / config.finetune.pretrain_cost_shared_by + seconds(*own_preparation(method)) / served
        if METHODS[method].is_student:
            teacher = config.student.teacher
            spent += seconds(timing_file("finetune", teacher, sigma)) / sigmas_served(models[teacher, sigma])
            spent += preparation_seconds(teacher, sigma)
        return spent

    rows = []
    for (method, sigma), model in models.items():
        served = sigmas_served(model)
        rows.append(
            {
                "method": method,
                "sigma": sigma,
                "epochs": model["training"]["epochs"],
                "finetune_passes": _part(model["compute"]["finetune"], served),
                "preparation_passes": preparation_passes(model) / served,
                "total_passes": (model["compute"]["finetune"] + preparation_passes(model)) / served,
                "finetune_seconds": seconds(timing_file("finetune", method, sigma)) / served,
                "preparation_seconds": preparation_seconds(method, sigma),
                "certify_seconds": seconds(timing_file("certify", method, sigma)),
            }
        )
    return pd.DataFrame(rows)


def _part(passes: float, served: int) -> float:
    return passes if served == 1 else passes / served  # whole numbers of passes stay whole


def shared_timings(config: Config, method: str) -> list[str]:
    """The timing files of the preparation that a method shares with others."""
    shared = []
    if config.finetune.uses_pretraining(method):
        shared.append(pretraining_timing(METHODS[method].initial_weights))
    if METHODS[method].needs_soft_labels:
        shared += [timing_file("finetune", config.soft_labels.method, config.soft_labels.sigma), SOFT_LABEL_TIMING]
    if METHODS[method].denoises:
        shared.append(DENOISER_TIMING)
    if (part := denoising_classifier(method, config.denoised.model_dump())) is not None:
        shared.append(timing_file("finetune", *part))
    return shared


def own_preparation(method: str) -> list[str]:
    """The timing files of the joint training that a method continues, and of its votes."""
    if not METHODS[method].can_pass:
        return []
    voter = continued_method(method)
    return [f"timings/finetune/{voter}/{JOINT}.json", f"timings/training_votes/{voter}.json"]


def timing_file(stage: str, method: str, sigma: float) -> str:
    name = model_name(method, sigma) if stage == "finetune" else sigma_name(sigma)
    return f"timings/{stage}/{method}/{name}.json"


def pretraining_timing(objective: str) -> str:
    return f"timings/pretrain/{objective}.json"
