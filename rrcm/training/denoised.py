"""Methods that denoise first: put together from a denoiser and a classifier, and fine-tuned if the method says so."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rrcm.config import Config
from rrcm.data.shards import ShardedDataset
from rrcm.methods import DENOISER, METHODS, SOFT_LABELS, denoising_classifier
from rrcm.models.denoised import denoise_pixels, write_denoised
from rrcm.models.denoiser import load_denoiser
from rrcm.models.folders import part_of
from rrcm.models.kinds import LoadedClassifier, load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.vit import parameter_count
from rrcm.training.finetune import Denoising, finetune, initial_weights_of
from rrcm.utils.distributed import DistEnv, init_distributed
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, claimed, read_json, sha256_folder, write_csv, write_json
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors


class DenoisedParts(NamedTuple):
    """The model folders that a method is put together from."""

    denoiser: Path
    classifier: Path | None  # None: a model from elsewhere, `denoised.model`


def finetune_denoised(
    config: Config,
    method: str,
    sigma: float,
    shard_folder: Path | str,
    pretrained: Path,
    output: Path,
    timing: Path,
    soft_labels: Path = Path(SOFT_LABELS),
) -> None:
    """Write `output` (config.json, history.csv, and a classifier that is trained here) and `timing` (JSON).

    The parts are model folders beside `output`, where the settings say. A method with an objective trains the
    classifier further, on denoised images. Raises `RRCMError` for parts that are missing or do not fit.
    """
    parts, trained = find_parts(config, method, output.parent.parent), None
    with init_distributed(config.device) as env:
        run_state = _run_state(config, method, sigma, shard_folder, parts)
        if env.is_main:
            run_state.lock()
    if METHODS[method].objective is not None:
        trained, record = run_state.folder / "classifier", run_state.folder / "classifier.json"  # written last
        if not record.exists():
            start = partial(denoising, parts, sigma)
            finetune(config, method, sigma, shard_folder, pretrained, trained, record, soft_labels, denoising=start)
    if env.is_main:
        _publish(config, method, sigma, ShardedDataset(shard_folder, "train"), parts, trained, env, output, timing)
        run_state.finish()


def find_parts(config: Config, method: str, models: Path) -> DenoisedParts:
    """Where the parts of a method are below the folder of all models. There they may be missing."""
    classifier = denoising_classifier(method, config.denoised.model_dump())
    if classifier is not None:
        classifier = models / classifier[0] / f"sigma_{classifier[1]}"
    return DenoisedParts(models / Path(DENOISER).name, classifier)


def denoising(parts: DenoisedParts, sigma: float, env: DistEnv) -> Denoising:
    """What further training for noise of pixel `sigma` starts from. The parts must be there."""
    denoiser = load_denoiser(parts.denoiser).requires_grad_(False).to(env.device)
    return Denoising(parts.classifier, partial(denoise_pixels, denoiser, sigma=sigma), sha256_folder(parts.denoiser))


def _run_state(config: Config, method: str, sigma: float, shard_folder: Path | str, parts: DenoisedParts) -> RunState:
    inputs = {name: sha256_folder(path) for name, path in parts._asdict().items() if path is not None}
    inputs["shards"] = ShardedDataset(shard_folder, "train").fingerprint
    settings = config.model_dump(mode="json", include={"seed", "data", "finetune", "denoised"})
    identity = fingerprint({"method": METHODS[method].identity, "sigma": sigma, **settings}, inputs, __name__)
    return RunState(f"denoised-{method}-{sigma}", identity)


def _publish(
    config: Config,
    method: str,
    sigma: float,
    images: ShardedDataset,
    parts: DenoisedParts,
    trained: Path | None,
    env: DistEnv,
    output: Path,
    timing: Path,
) -> None:
    """Write the model folder, with the classifier in `trained` or else that of the parts, and the timing."""
    start, kind = time.monotonic(), METHODS[method].classifier
    denoiser, folder_of_classifier = load_denoiser(parts.denoiser), trained or parts.classifier
    if (denoiser.image_size, denoiser.channels) != (config.data.image_size, config.data.channels):
        raise RRCMError(
            f"{parts.denoiser}: is for images of {denoiser.channels} x {denoiser.image_size} pixels, the settings have "
            f"{config.data.channels} x {config.data.image_size}; change data.image_size or the denoiser"
        )
    if folder_of_classifier is None:
        loaded = load_base_classifier(config.denoised.model)
    else:
        loaded = load_model_folder(folder_of_classifier)
    settings = getattr(config.denoised, kind, None)
    facts = {
        "sigma": sigma,
        "settings": {} if settings is None else settings.model_dump(),
        "method": method,
        "seed": config.seed,
        "parameters": parameter_count(denoiser) + parameter_count(loaded.classifier),
        "initial_weights": initial_weights_of(config, method),
        "training": {"profile": config.profile, "epochs": 0},
        "selected": {"epoch": 0, "val_accuracy": None},
        "compute": {"finetune": 0.0, "pretrain_share": _shared_compute(config, parts), "soft_label_share": 0.0},
    }
    record = {"seconds": 0.0, "images_per_second": None, "processes": env.world_size}
    with claimed(output, timing, wait=True):  # by another run of this stage, they are not mixed with its own
        with atomic_directory(output) as folder:
            if trained is None:
                write_csv(folder / "history.csv", [{"epoch": 0, "loss": None, "val_accuracy": None, "lr": None}])
            else:
                shutil.copytree(trained, folder / "classifier")
                shutil.copy(trained / "history.csv", folder)
                own, record = read_json(trained / "config.json"), read_json(trained.with_suffix(".json"))
                facts |= {name: own[name] for name in ("training", "selected")}
                facts["compute"]["finetune"] = own["compute"]["finetune"]
            classifier = folder / "classifier" if trained else parts.classifier
            named = {"denoiser": part_of(folder, os.path.relpath(parts.denoiser, folder))}
            if classifier is None:
                named["classifier"] = _named_elsewhere(config.denoised.model, loaded)
            else:
                named["classifier"] = part_of(folder, os.path.relpath(classifier, folder))
            write_denoised(folder, kind, named, images.classes, **facts)
        record |= {"seconds": record["seconds"] + time.monotonic() - start}
        write_json(timing, record | {"environment": describe_environment(env.device)})


def _shared_compute(config: Config, parts: DenoisedParts) -> float:
    """The model's share of the passes that its parts have taken. Those of parts from elsewhere are not known."""
    compute = read_json(parts.denoiser / "config.json")["compute"]
    if parts.classifier is not None:
        compute += sum(read_json(parts.classifier / "config.json")["compute"].values())
    return compute / config.finetune.pretrain_cost_shared_by


def _named_elsewhere(model: str, loaded: LoadedClassifier) -> dict[str, str]:
    return {"model": model, "sha256": sha256_tensors(loaded.classifier.state_dict())}
