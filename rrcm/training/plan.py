"""The plan of a fine-tuning: everything that decides it, worked out from the settings before any work starts."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rrcm.config import Config, Data, Denoised, Finetune, FinetuneSettings, Model, Pretrain
from rrcm.data.shards import read_manifest
from rrcm.derived import teacher_folder
from rrcm.methods import (
    DENOISER,
    JOINT,
    METHODS,
    SOFT_LABELS,
    TRAINING_VOTES,
    continued_method,
    denoising_classifier,
)
from rrcm.models.joint import JointSigmas
from rrcm.models.noise_levels import karras_levels, nearest_level
from rrcm.training.budget import Budget, joint_sigmas, plan_budget


@dataclass(frozen=True)
class Files:
    """The files that a training reads and writes."""

    shards: Path | str  # folder or URL of the images
    encoders: Path  # parent of the pre-trained encoders' model folders
    output: Path  # model folder
    timing: Path  # JSON
    soft_labels: Path = Path(SOFT_LABELS)
    training_votes: Path = Path(TRAINING_VOTES)  # folder of the joint models' votes for the training images


@dataclass(frozen=True)
class Parts:
    """The model folders of the two networks that a denoising method consists of. They may not exist yet."""

    denoiser: Path
    classifier: Path | None  # None: a model from elsewhere, `denoised.model`


@dataclass(frozen=True)
class Training:
    """One fine-tuning of one method, at one smoothing sigma or jointly at several."""

    method: str  # a key of METHODS
    sigma: float  # pixel units; of a joint training the middle of its range
    label: str  # its name in progress lines and live metrics
    files: Files
    profile: str
    seed: int
    device: str
    threads: int | None
    settings: FinetuneSettings  # of this method at this sigma; of a joint training those that are the same at all
    common: Finetune  # what all trainings share: precision, chunks, intervals
    data: Data
    model: Model
    denoised: Denoised
    initial_weights: str  # as recorded: `scratch`, a folder, a file, or a name at timm or on a hub
    t: float  # the noise level that the classifier is conditioned on, model space; 2 sigma if the training is joint
    clean_t: float | None  # the noise level of clean images for a linear probe; None: the classifier's own
    budget: Budget | None  # None: the method is put together from its parts and not trained
    parts: Parts | None  # of a denoising method
    joint: JointSigmas | None = None  # None: the training of an expert
    teacher: Path | None = None  # the model folder of the teacher of a student

    @property
    def name(self) -> str:
        """`METHOD-SIGMA` or `METHOD-joint`, which names the run."""
        return f"{self.method}-{self.sigma if self.joint is None else JOINT}"

    @property
    def identity(self) -> dict[str, object]:
        """What decides the result, apart from the contents of files. JSON-able."""
        own = ("sigma", "seed", "t", "clean_t")
        joint = {} if self.joint is None else {JOINT: asdict(self.joint)}
        sections = {"data": self.data, "model": self.model, "finetune": self.common}
        return {
            "method": METHODS[self.method].identity,
            "budget": self.budget and self.budget.identity,
            **{name: getattr(self, name) for name in own},
            **{name: section.model_dump(mode="json") for name, section in sections.items()},
            **joint,
        }

    @property
    def continued(self) -> Path | None:
        """The model folder of the joint training that this one continues, if the classifier can pass."""
        if not METHODS[self.method].can_pass:
            return None
        return self.files.output.parent.parent / continued_method(self.method) / JOINT

    @property
    def votes_file(self) -> Path:
        """The votes of the joint model that this training continues."""
        return self.files.training_votes / f"{continued_method(self.method)}.safetensors"

    def writing_to(self, output: Path, timing: Path) -> "Training":
        """The same training with other outputs."""
        return replace(self, files=replace(self.files, output=output, timing=timing))


def plan_training(config: Config, method: str, sigma: float | str, files: Files) -> Training:
    """The training of `method` at pixel noise `sigma`, or "joint", that the settings describe.

    Reads the manifest of the shards and the recorded compute of the pre-training, if the method starts from one.
    Raises `RRCMError` if one of them is missing, or if nothing is left to train with (`plan_budget`).
    """
    row, joint = METHODS[method], joint_sigmas(config) if sigma == JOINT else None
    models, noise = files.output.parent.parent, sigma
    label = f"finetune {method} {JOINT}" if joint else f"finetune {method} sigma {sigma:g}"
    sigma = joint.middle if joint else sigma
    num_images = sum(read_manifest(files.shards).splits["train"].counts)
    return Training(
        method=method,
        sigma=sigma,
        label=label,
        files=files,
        profile=config.profile,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        settings=config.finetune.settings(method, joint.sigmas[0] if joint else sigma),
        common=config.finetune,
        data=config.data,
        model=config.model_of(method),
        denoised=config.denoised,
        initial_weights=config.initial_weights(method),
        t=time_condition(method, sigma, config.finetune, config.pretrain),
        clean_t=config.pretrain.t_min if row.pretrained_here else None,
        budget=None
        if row.objective is None
        else plan_budget(config, method, JOINT if joint else sigma, num_images, files.encoders),
        parts=find_parts(method, config.denoised, models) if row.denoises else None,
        joint=joint,
        teacher=models / teacher_folder(noise, config.student.model_dump()) if row.is_student else None,
    )


def time_condition(method: str, sigma: float, finetune: Finetune, pretrain: Pretrain) -> float:
    """The noise level t that a classifier for pixel noise `sigma` is conditioned on.

    It is 2 sigma, or with `finetune.time_condition: nearest_level` the nearest level of the pre-training.
    """
    if not METHODS[method].pretrained_here or finetune.time_condition == "exact":
        return 2 * sigma
    levels = karras_levels(pretrain.max_levels + 1, t_min=pretrain.t_min, t_max=pretrain.t_max, rho=pretrain.rho)
    return nearest_level(levels, 2 * sigma)


def find_parts(method: str, denoised: Denoised, models: Path) -> Parts:
    """The parts of a denoising method below `models`, the folder of all models."""
    classifier = denoising_classifier(method, denoised.model_dump())
    if classifier is not None:
        classifier = models / classifier[0] / f"sigma_{classifier[1]}"
    return Parts(models / Path(DENOISER).name, classifier)
