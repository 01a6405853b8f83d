"""Methods that denoise first: a denoiser and a classifier are combined, and the classifier is fine-tuned if needed."""

import os
import shutil
import time
from pathlib import Path

from rrcm.data.shards import ShardedDataset
from rrcm.methods import METHODS
from rrcm.models.denoised import write_denoised
from rrcm.models.denoiser import load_denoiser
from rrcm.models.folders import part_of
from rrcm.models.kinds import LoadedClassifier, load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.vit import parameter_count
from rrcm.training.finetune import finetune
from rrcm.training.plan import Training
from rrcm.utils.distributed import DistEnv, init_distributed
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, claimed, read_json, sha256_folder, write_csv, write_json
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors


def finetune_denoised(training: Training) -> None:
    """Write the model folder (config.json, history.csv, and a classifier that is trained here) and the timing.

    The parts are other model folders, beside the output. If the method has an objective, the classifier is trained
    further on denoised images. Raises `RRCMError` for parts that are missing or do not fit.
    """
    with init_distributed(training.device) as env:
        run_state = _run_state(training)
        if env.is_main:
            run_state.lock()
    trained = None
    if METHODS[training.method].objective is not None:
        trained = run_state.folder / "classifier"
        record = trained.with_suffix(".json")  # written last
        if not record.exists():
            finetune(training.writing_to(trained, record))
    if env.is_main:
        _publish(training, trained, env)
        run_state.finish()


def _run_state(training: Training) -> RunState:
    parts = {name: path for name, path in vars(training.parts).items() if path is not None}
    inputs = {name: sha256_folder(path) for name, path in parts.items()}
    inputs["shards"] = ShardedDataset(training.files.shards, "train").fingerprint
    settings = training.identity | {"denoised": training.denoised.model_dump(mode="json")}
    return RunState(f"denoised-{training.name}", fingerprint(settings, inputs, __name__))


def _publish(training: Training, trained: Path | None, env: DistEnv) -> None:
    """Write the model folder and the timing. The classifier is the one in `trained`, or else the one in the parts."""
    start, parts, output, timing = time.monotonic(), training.parts, training.files.output, training.files.timing
    kind = METHODS[training.method].classifier
    classes = ShardedDataset(training.files.shards, "train").classes
    folder_of_classifier = trained or parts.classifier
    if folder_of_classifier is None:
        loaded = load_base_classifier(training.denoised.model)
    else:
        loaded = load_model_folder(folder_of_classifier)
    facts = _facts(training, loaded, trained)
    record = {"seconds": 0.0, "images_per_second": None, "processes": env.world_size}
    with claimed(output, timing, wait=True):  # another run of this stage must not write in between
        with atomic_directory(output) as folder:
            if trained is None:
                write_csv(folder / "history.csv", [{"epoch": 0, "loss": None, "val_accuracy": None, "lr": None}])
            else:
                shutil.copytree(trained, folder / "classifier")
                shutil.copy(trained / "history.csv", folder)
                record = read_json(trained.with_suffix(".json"))
            classifier = folder / "classifier" if trained else parts.classifier
            named = {"denoiser": part_of(folder, os.path.relpath(parts.denoiser, folder))}
            if classifier is None:
                model_hash = sha256_tensors(loaded.classifier.state_dict())
                named["classifier"] = {"model": training.denoised.model, "sha256": model_hash}
            else:
                named["classifier"] = part_of(folder, os.path.relpath(classifier, folder))
            write_denoised(folder, kind, named, classes, **facts)
        record |= {"seconds": record["seconds"] + time.monotonic() - start}
        write_json(timing, record | {"environment": describe_environment(env.device)})


def _facts(training: Training, loaded: LoadedClassifier, trained: Path | None) -> dict[str, object]:
    """What config.json says about the model. Raises `RRCMError` for a denoiser of images of another size."""
    parts, denoiser = training.parts, load_denoiser(training.parts.denoiser)
    if (denoiser.image_size, denoiser.channels) != (training.data.image_size, training.data.channels):
        raise RRCMError(
            f"{parts.denoiser}: is for images of {denoiser.channels} x {denoiser.image_size} pixels, the settings have "
            f"{training.data.channels} x {training.data.image_size}; change data.image_size or the denoiser"
        )
    settings = getattr(training.denoised, METHODS[training.method].classifier, None)
    compute = {"finetune": 0.0, "pretrain_share": _shared_compute(training), "soft_label_share": 0.0}
    facts = {
        "sigma": training.sigma,
        "settings": {} if settings is None else settings.model_dump(),
        "method": training.method,
        "seed": training.seed,
        "parameters": parameter_count(denoiser) + parameter_count(loaded.classifier),
        "initial_weights": training.initial_weights,
        "training": {"profile": training.profile, "epochs": 0},
        "selected": {"epoch": 0, "val_accuracy": None},
        "compute": compute,
    }
    if trained is not None:
        own = read_json(trained / "config.json")
        facts |= {name: own[name] for name in ("training", "selected")}
        compute["finetune"] = own["compute"]["finetune"]
    return facts


def _shared_compute(training: Training) -> float:
    """The model's share of the passes that its parts have taken. Those of parts from elsewhere are not known."""
    parts = training.parts
    compute = read_json(parts.denoiser / "config.json")["compute"]
    if parts.classifier is not None:
        compute += sum(read_json(parts.classifier / "config.json")["compute"].values())
    return compute / training.common.pretrain_cost_shared_by
