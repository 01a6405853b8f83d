"""Methods that denoise first: put together from a denoiser and a classifier, and fine-tuned if the method says so."""

import os
import shutil
import time
from pathlib import Path

from rrcm.config import Config
from rrcm.data.shards import ShardedDataset
from rrcm.methods import DENOISER, METHODS, SOFT_LABELS, classifier_sigma
from rrcm.models.denoised import write_denoised
from rrcm.models.load import load_base_classifier, load_model_folder
from rrcm.models.vit import parameter_count
from rrcm.training.finetune import DenoisedParts, finetune
from rrcm.utils.distributed import DistEnv, init_distributed
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, read_json, sha256_folder, write_csv, write_json
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors


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
    models = output.parent.parent
    own = classifier_sigma(method, config.denoised.model_dump())
    classifier = models / METHODS[method].initial_weights / f"sigma_{own}"
    parts = DenoisedParts(models / Path(DENOISER).name, classifier)
    trained = None
    with init_distributed(config.device) as env:
        run_state = _run_state(config, method, sigma, shard_folder, parts)
        if env.is_main:
            run_state.lock()
    if METHODS[method].objective is not None:
        trained, record = run_state.folder / "classifier", run_state.folder / "classifier.json"  # written last
        if not record.exists():
            finetune(config, method, sigma, shard_folder, pretrained, trained, record, soft_labels, parts=parts)
    if env.is_main:
        _publish(config, method, sigma, ShardedDataset(shard_folder, "train"), parts, trained, env, output, timing)
        run_state.finish()


def _run_state(config: Config, method: str, sigma: float, shard_folder: Path | str, parts: DenoisedParts) -> RunState:
    inputs = {name: sha256_folder(path) for name, path in parts._asdict().items()}
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
    start, shared_by = time.monotonic(), config.finetune.pretrain_cost_shared_by
    compute = read_json(parts.denoiser / "config.json")["compute"]
    if config.denoised.model is None:
        compute += sum(read_json(parts.classifier / "config.json")["compute"].values())
    share = {"finetune": 0.0, "pretrain_share": compute / shared_by, "soft_label_share": 0.0}
    facts = {"sigma": sigma, "method": method, "seed": config.seed}
    facts |= {"training": {"profile": config.profile, "epochs": 0}, "selected": {"epoch": 0, "val_accuracy": None}}
    facts["initial_weights"] = config.denoised.model or f"models/{parts.classifier.parent.name}/{parts.classifier.name}"
    kind = METHODS[method].classifier
    settings = getattr(config.denoised, kind, None)
    facts["settings"] = {} if settings is None else settings.model_dump(exclude={"classifier_sigma"})
    record = {"seconds": 0.0, "images_per_second": None, "processes": env.world_size}
    with atomic_directory(output) as folder:
        if trained is None:
            write_csv(folder / "history.csv", [{"epoch": 0, "loss": None, "val_accuracy": None, "lr": None}])
        else:
            shutil.copytree(trained, folder / "classifier")
            (folder / "classifier/history.csv").rename(folder / "history.csv")
            own, record = read_json(trained / "config.json"), read_json(trained.with_suffix(".json"))
            facts |= {name: own[name] for name in ("training", "selected")}
            share["finetune"] = own["compute"]["finetune"]
        facts |= {"compute": share}
        named = _describe_parts(config, parts, folder, trained is not None)
        write_denoised(folder, kind, named, images.classes, **facts)
        loaded = load_model_folder(folder)
        if (loaded.image_size, loaded.channels) != (config.data.image_size, config.data.channels):
            raise RRCMError(
                f"{parts.denoiser}: is for images of {loaded.channels} x {loaded.image_size} pixels, the settings have "
                f"{config.data.channels} x {config.data.image_size}; change data.image_size or the denoiser"
            )
        write_denoised(folder, kind, named, images.classes, **facts, parameters=parameter_count(loaded.classifier))
    record |= {"seconds": record["seconds"] + time.monotonic() - start}
    write_json(timing, record | {"environment": describe_environment(env.device)})


def _describe_parts(config: Config, parts: DenoisedParts, folder: Path, trained: bool) -> dict[str, dict[str, str]]:
    """The parts as `write_denoised` takes them, relative to `folder`."""

    def described(path: Path) -> dict[str, str]:
        return {"path": os.path.relpath(path, folder), "sha256": sha256_folder(path)}

    if trained:
        classifier = described(folder / "classifier")
    elif config.denoised.model is None:
        classifier = described(parts.classifier)
    else:
        weights = load_base_classifier(config.denoised.model).classifier.state_dict()
        classifier = {"model": config.denoised.model, "sha256": sha256_tensors(weights)}
    return {"denoiser": described(parts.denoiser), "classifier": classifier}
