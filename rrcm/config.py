"""Every setting of the pipeline, typed and validated before any work starts. Read from params.yaml.

Units: `sigma` is the smoothing noise in pixel units (pixels in [0, 1]). `t` is the noise level in model space (pixels
scaled to [-1, 1]), so t = 2 * sigma.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from rrcm.derived import SECTIONS, choose_values, derived_settings, finetuning_keys, initial_weights
from rrcm.methods import METHODS, PER_OBJECTIVE, REFERENCE, check_methods
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_text


def _is_method(name: str) -> str:
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"rrcm/methods.py has {', '.join(METHODS)}"
        raise ValueError(f"no such method; {hint}")
    return name


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
MethodName = Annotated[str, AfterValidator(_is_method)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]  # auto: `rrcm.utils.distributed.native_precision`
CertifiedPrecision = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """The data set and its shards."""

    source: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # a key of `rrcm.data.datasets.DATASETS`
    root: str | None  # folder of the raw files; null: the data set's default folder
    image_size: Count  # side of the square image that the network sees, pixels
    channels: Literal[1, 3]
    val_fraction: Annotated[float, Field(gt=0, le=0.5)]  # share of train held out for validation, stratified by class
    shard_size: Count  # samples per shard
    workers: Annotated[int, Field(ge=0)]  # data-loading processes (0: load in the main process); threads in shard-data


class Model(Section):
    """The network: the noise-conditioned ViT (class token, time token, patches) and its projector, or another trunk.

    The other trunks are for methods that start from scratch. They use `architecture`, `pixel_mean` and `pixel_std`; all
    other settings are of the ViT.
    """

    architecture: str  # vit, or another trunk: lenet, resnet110, or the name of a timm model
    pixel_mean: list[float] | None  # of another trunk, per channel of pixels in [0, 1]; null: not normalized
    pixel_std: list[Positive] | None
    patch_size: Count
    embed_dim: Count
    depth: Count
    num_heads: Count
    projector_hidden_dim: Count
    projection_dim: Count
    init: Literal["torch", "moco_v3"]
    freeze_patch_embed: bool
    grad_checkpointing: bool  # recompute each block in the backward pass: less memory, a third more time

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise ValueError("pixel_mean and pixel_std must both be given, or both be null")
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be even and a multiple of num_heads {self.num_heads}")
        return self


class Views(Section):
    """MoCo-v3's two asymmetric augmentation recipes. Pairs are (view 1, view 2)."""

    min_crop_area: Annotated[float, Field(gt=0, le=1)]  # share of the image area, random resized crop
    flip_prob: Probability
    color_jitter_prob: Probability  # strengths .4/.4/.2/.1
    grayscale_prob: Probability
    blur_prob: tuple[Probability, Probability]
    blur_sigma: tuple[Positive, Positive]  # pixels, smallest and largest
    solarize_prob: tuple[Probability, Probability]


class DMAESettings(Section):
    """Denoising masked autoencoders (Wu et al. 2023)."""

    mask_ratio: Rate  # share of the patches that the encoder does not see; it sees at least one
    sigma: NonNegative  # pixel units
    decoder_embed_dim: Count
    decoder_depth: Count
    decoder_num_heads: Count

    @model_validator(mode="after")
    def heads_divide(self) -> Self:
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim {self.decoder_embed_dim} must be a multiple of decoder_num_heads "
                f"{self.decoder_num_heads}"
            )
        return self


class RRCMDMAESettings(DMAESettings):
    """rRCM and DMAE on one encoder."""

    dmae_weight: NonNegative  # of the second loss


def _one_or_each(validate: Callable[[object], object], check_key: Callable[[str], None], setting: object) -> object:
    """A setting that is one value, or a mapping of values by what they are for. Each value is validated alike."""
    if not isinstance(setting, Mapping):
        return validate(setting)
    errors = []
    for key, value in setting.items():
        try:
            check_key(str(key))
            validate(value)
        except ValidationError as error:
            errors += [{**each, "loc": (str(key), *each["loc"])} for each in error.errors(include_url=False)]
        except ValueError as error:
            errors.append({"type": "value_error", "loc": (str(key),), "input": setting, "ctx": {"error": error}})
    if errors:
        raise ValidationError.from_exception_data("setting", errors)
    return {key: validate(setting[key]) for key in sorted(setting)}


def _varying_type(kind: Any, check_key: Callable[[str], None]) -> Any:
    """The type of a setting of type `kind` that may be a mapping as `_one_or_each` takes it."""
    validate = TypeAdapter(kind, config=Section.model_config).validate_python
    return Annotated[Any, PlainValidator(partial(_one_or_each, validate, check_key))]


PerObjective = _varying_type(Positive, lambda key: None)  # rrcm.training.checks knows the names of objectives


class Pretrain(Section):
    """Pre-training: losses, curriculum and schedules (Lei et al. 2025, section 4).

    A `PerObjective` is one value, or a mapping by objective with the key `default`: {default: 1e-3, dmae: 5e-4}.
    """

    objectives: list[str]  # keys of `rrcm.objectives.PRETRAINING`, one encoder each
    batch_size: Annotated[int, Field(ge=2)]  # images per step, over all processes
    steps: Count
    equal_passes: bool  # every objective takes as many steps as cost what rRCM's steps cost
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: PerObjective
    weight_decay: NonNegative
    grad_clip_norm: Positive  # after warm-up only
    temperature: PerObjective
    min_levels: Annotated[int, Field(ge=2)]  # s0
    max_levels: Annotated[int, Field(ge=2)]  # s1
    t_min: Positive
    t_max: Positive
    rho: Positive
    teacher_decay_start: Rate  # m0
    teacher_decay_end: Rate  # m1
    teacher_decay_steepness: Positive  # A
    ema_decay: Rate  # of the average of the student that is kept
    views: Views
    dmae: DMAESettings
    rrcm_dmae: RRCMDMAESettings
    precision: Precision
    num_chunks: Count  # chunks per batch (GradCache): less memory, the same gradient
    compile: bool  # torch.compile
    log_every: Count  # steps
    evaluate_every: Count  # steps between evaluations of the representations on the validation split
    evaluate_sigmas: Annotated[list[Positive], Field(min_length=1)]  # noise of these evaluations, pixel units
    evaluate_images: Annotated[
        int, Field(ge=2)
    ]  # at most, from the validation split and (as neighbours) from the training split
    checkpoint_every: Count  # steps

    @model_validator(mode="after")
    def schedules_fit(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.max_levels < self.min_levels:
            raise ValueError(f"max_levels {self.max_levels} must be at least min_levels {self.min_levels}")
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min {self.t_min} must be below t_max {self.t_max}")
        if self.teacher_decay_start >= self.teacher_decay_end:
            raise ValueError(
                f"teacher_decay_start {self.teacher_decay_start} must be below "
                f"teacher_decay_end {self.teacher_decay_end}"
            )
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives {self.objectives} must not repeat an entry")
        for name in PER_OBJECTIVE:
            if isinstance(value := getattr(self, name), Mapping) and "default" not in value:
                raise ValueError(f"{name} {value} must have a value for default")
        return self

    def settings(self, objective: str) -> Self:
        """These settings with the values of one objective."""
        own = choose_values({name: getattr(self, name) for name in PER_OBJECTIVE}, (objective, "default"))
        return self.model_copy(update=own)


class GaussianSettings(Section):
    """Gaussian augmentation (Cohen et al. 2019)."""

    num_noise: Count | None  # m; null: the common one


class StabilitySettings(Section):
    """Stability training (Li et al. 2019)."""

    num_noise: Count | None  # m; null: the common one
    stability_weight: NonNegative  # lambda


class ConsistencySettings(Section):
    """Consistency regularization (Jeong & Shin 2020)."""

    consistency_weight: NonNegative  # lambda
    entropy_weight: NonNegative  # eta


class MACERSettings(Section):
    """MACER (Zhai et al. 2020)."""

    num_noise: Annotated[int, Field(ge=2)]  # k, in place of the common one
    radius_weight: NonNegative  # lambda
    beta: Positive  # inverse temperature of the soft votes
    gamma: Positive  # of the hinge
    deferred_epochs: NonNegative  # epochs before the radius loss begins


class SmoothAdvSettings(Section):
    """SmoothAdv (Salman et al. 2019)."""

    num_noise: Count | None  # m; null: the common one
    attack_radius: NonNegative  # epsilon, L2, pixel units
    attack_steps: Count  # T
    attack_warmup_epochs: NonNegative  # over which epsilon grows


class SmoothMixSettings(Section):
    """SmoothMix (Jeong et al. 2021)."""

    num_noise: Count | None  # m; null: the common one
    mix_weight: NonNegative  # eta
    attack_step: Positive  # alpha, L2, pixel units
    attack_steps: Count  # T
    one_step_clean_end: bool  # mix from the adversary after one step instead of the clean image
    mix_warmup_epochs: NonNegative  # over which eta and the clean end's distance grow


class CATRSSettings(Section):
    """CAT-RS (Jeong et al. 2023)."""

    num_noise: Count  # m, in place of the common one
    worst_case_weight: NonNegative  # lambda
    attack_radius: NonNegative  # epsilon, L2 distance of noises, pixel units
    attack_steps: Count  # T
    confidence: Literal["predictions", "soft_label"] | None  # which of them says how many copies count; null if m is 1

    @model_validator(mode="after")
    def one_copy_always_counts(self) -> Self:
        if (self.num_noise == 1) != (self.confidence is None):
            needed = "null, as its one copy always counts" if self.num_noise == 1 else "predictions or soft_label"
            raise ValueError(f"confidence {self.confidence} with num_noise {self.num_noise} must be {needed}")
        return self


class ObjectiveSettings(Section):
    """Settings of the fine-tuning objectives, a block for each that has any."""

    gaussian: GaussianSettings
    stability: StabilitySettings
    consistency: ConsistencySettings
    macer: MACERSettings
    smoothadv: SmoothAdvSettings
    smoothmix: SmoothMixSettings
    cat_rs: CATRSSettings


class FinetuneSettings(Section):
    """Fine-tuning of one classifier."""

    epochs: Count
    warmup_epochs: NonNegative
    batch_size: Count  # images, over all processes
    steps_per_batch: Literal[1, "num_noise"]  # optimizer steps; num_noise: one on each of m equal parts
    lr: Positive  # per 256 images of a batch
    layer_decay: Annotated[float, Field(gt=0, le=1)]  # learning-rate factor from one layer to the layer below it
    weight_decay: NonNegative
    optimizer: Literal["adamw", "sgd"]
    momentum: Rate  # of sgd
    lr_schedule: Literal["cosine", "step"]  # after warm-up: to zero, or a tenth after every lr_step_epochs
    lr_step_epochs: Positive
    num_noise: Count  # m, noisy copies of each image
    augmentation: Literal["none", "flip", "pad_crop_flip", "crop_flip", "randaugment"]
    mixup: NonNegative
    cutmix: NonNegative
    mixup_switch_prob: Probability
    label_smoothing: Rate
    linear_probe_epochs: Annotated[int, Field(ge=0)]  # epochs on the head alone, on clean images, before fine-tuning
    objectives: ObjectiveSettings

    def of_objective(self, name: str) -> dict[str, object]:
        """What one objective is trained with: the common settings, and before them those of its own block."""
        common = self.model_dump(exclude={"objectives"})
        own = self.objectives.model_dump().get(name, {})
        return common | {key: value for key, value in own.items() if value is not None}

    def check_objective(self, name: str) -> None:
        """Raises ValueError when these settings do not fit an objective."""
        values = self.of_objective(name)
        if self.steps_per_batch == "num_noise" and self.batch_size % (copies := values["num_noise"]):
            raise ValueError(
                f"finetune.batch_size {self.batch_size} must be a multiple of num_noise {copies} of {name}, as "
                "finetune.steps_per_batch is num_noise"
            )
        for setting in ("warmup_epochs", "deferred_epochs"):  # what comes after them would never come
            if values.get(setting, 0) >= self.epochs:
                raise ValueError(
                    f"finetune: {setting} {values[setting]:g} of {name} must be below epochs {self.epochs}"
                )
        for setting in ("attack_warmup_epochs", "mix_warmup_epochs"):
            if values.get(setting, 0) > self.epochs:
                raise ValueError(
                    f"finetune: {setting} {values[setting]:g} of {name} must be at most epochs {self.epochs}"
                )


def _check_key(key: str) -> None:
    """Raises ValueError unless `key` is an objective, `default`, `scratch`, or noise as in file names: `sigma_0.5`."""
    names = ["default", "scratch", *ObjectiveSettings.model_fields]
    if key in names:
        return
    try:
        sigma = float(key.removeprefix("sigma_"))
    except ValueError:
        close = difflib.get_close_matches(key, names, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(names)}, and noise such as sigma_0.5"
        )
        raise ValueError(f"unknown key; {hint}") from None
    if key != f"sigma_{sigma}":
        raise ValueError(f"unknown key; did you mean sigma_{sigma}?")


def _varying(section: type[Section]) -> type[Section]:
    """`section` with settings, also those of nested sections, that may be mappings as `_one_or_each` takes them."""
    fields = {}
    for name, kind in get_type_hints(section, include_extras=True).items():
        if name in section.model_fields:
            if isinstance(kind, type) and issubclass(kind, Section):
                fields[name] = (_varying(kind), ...)
            else:
                fields[name] = (_varying_type(kind, _check_key), ...)
    return create_model(section.__name__, __base__=Section, **fields)


def _choose(settings: Mapping, keys: Sequence[str], path: str) -> dict:
    """`choose_values` of the section at `path`. Raises ValueError for a setting that has no value for any of `keys`."""
    chosen = choose_values(settings, keys)
    for name, value in chosen.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{path}.{name}: has no value for {keys[-2]}; add {keys[-2]} or default")
    return chosen


class TimmViT(Section):
    """The ViT from timm that method `timm` starts from."""

    model: str | None  # timm's name of it, a snapshot folder or hf-hub:owner/name; null if no method starts from timm
    weights: str | None  # a file, for a timm name; null: timm downloads the weights


class Finetune(_varying(FinetuneSettings)):
    """Fine-tuning: its initial weights, and the settings of all trainings.

    A setting of `FinetuneSettings` is one value, or a mapping with the keys `smoothadv` (for that objective), `scratch`
    (for methods with random initial weights), `sigma_0.5` (for that noise) and `default`. The first of these that it
    has, in this order, is used.
    """

    equal_passes: bool  # every method gets the encoder passes that rRCM's epochs cost, instead of equal epochs
    initial_weights: str | None  # model folder or authors' file that replaces models/pretrain/<objective>
    ensemble_members: Annotated[int, Field(ge=2)]  # k, of the methods that are ensembles
    time_condition: Literal["exact", "nearest_level"]  # t = 2 sigma, or the nearest level of pre-training to it
    timm: TimmViT
    pretrain_cost_shared_by: Count  # number of fine-tuned models that share the compute of one pre-training
    precision: Precision
    weights_dtype: Literal["bf16", "fp32"]  # of the weights that are selected, saved and certified
    num_chunks: Count  # as in pre-training
    compile: bool  # torch.compile
    evaluate_every: Count  # epochs between evaluations on the validation split
    checkpoint_every: Count  # epochs

    def settings(self, method: str, sigma: float) -> FinetuneSettings:
        """The settings of one training. Raises ValueError if one has no value for it, or if they do not fit."""
        keys, objective = finetuning_keys(method, sigma), METHODS[method].objective
        common = {name: getattr(self, name) for name in FinetuneSettings.model_fields if name != "objectives"}
        own = {
            name: _choose(block, keys, f"finetune.objectives.{name}")
            for name, block in self.objectives.model_dump().items()
        }
        settings = FinetuneSettings.model_validate(_choose(common, keys, "finetune") | {"objectives": own})
        if objective is not None:
            settings.check_objective(objective)
        return settings

    def uses_pretraining(self, method: str) -> bool:
        """Whether a method starts from models/pretrain/, so that the compute of its pre-training counts."""
        return METHODS[method].pretrained_here and self.initial_weights is None


class UNetSettings(Section):
    """The UNet of Ho et al. 2020, in the package diffusers."""

    base_channels: Count
    channel_mults: Annotated[list[Count], Field(min_length=1)]  # one level each, every level at half the size
    layers_per_block: Count
    attention_levels: list[Annotated[int, Field(ge=0)]]  # 0 is the full size


class DenoiserSettings(Section):
    """The denoiser D(x; t) of the methods that denoise first: its network, and its training (Karras et al. 2022)."""

    public: str | None  # a folder that diffusers has saved, or hf-hub:owner/name; null: train one
    network: Literal["vit", "unet"]
    unet: UNetSettings
    patch_size: Count
    embed_dim: Count
    depth: Count
    num_heads: Count
    batch_size: Annotated[int, Field(ge=1)]  # images per step, over all processes
    steps: Count
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: Positive
    weight_decay: NonNegative
    grad_clip_norm: Positive
    ema_decay: Rate  # of the average of the weights, which is kept
    noise_mean: float  # P_mean and P_std: ln t is normal
    noise_std: Positive
    augmentation: Literal["none", "flip"]
    precision: Precision
    num_chunks: Count  # as in pre-training
    compile: bool  # torch.compile
    log_every: Count  # steps
    evaluate_every: Count  # steps between errors on the validation split
    checkpoint_every: Count  # steps

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be even and a multiple of num_heads {self.num_heads}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class DensePureSettings(Section):
    """DensePure (Xiao et al. 2023)."""

    runs: Count  # K, reverse processes per noisy image
    steps: Count  # b, of each


class DiffSmoothSettings(Section):
    """DiffSmooth (Zhang et al. 2023)."""

    num_noise: Count  # m, local noises per denoised image
    local_sigma: NonNegative  # sigma', pixel units
    classifier_sigma: Positive  # noise that its classifier is trained with, pixel units


class Denoised(Section):
    """Classifiers that denoise first. What classifies is method gaussian at so little noise that images look clean."""

    model: str | None  # a timm model or a model folder that classifies denoised images, in place of one trained here
    classifier_sigma: Positive  # pixel units; 0.001 is a quarter of a grey level
    densepure: DensePureSettings
    diffsmooth: DiffSmoothSettings
    max_images: dict[MethodName, Count | None]  # of methods that certify fewer images than the others; null: as many


class SoftLabels(Section):
    """The smoothed classifier whose votes for the training images are soft labels, for objectives that need them."""

    method: MethodName
    sigma: Positive  # pixel units
    n: Count  # noisy copies of each training image


class Certify(Section):
    """Randomized smoothing: CERTIFY of Cohen et al. 2019, with a fixed or a group-sequential number of samples."""

    stopping: Literal["sequential", "fixed"]
    bound: Literal["binary", "margin"]  # p_B = 1 - p_A, as in all papers; or from the votes of every class
    n0: Count  # samples that select the class
    n: Count  # samples that bound its probability; `sequential` stops earlier where it can
    alpha: Annotated[float, Field(gt=0, le=0.5)]
    radius_step: Positive  # `sequential` certifies multiples of this radius, L2, pixel units
    batch_size: Count | None  # noisy samples per forward pass; null: chosen within memory_gib
    memory_gib: Positive | None  # null: 1/16 on a CPU (its caches), half the free memory of a GPU
    every: Count  # certify every k-th test image
    max_images: Count | None  # at most, evenly spaced
    precision: CertifiedPrecision
    compile: bool  # torch.compile, with CUDA graphs on a GPU

    @property
    def rule(self) -> dict[str, object]:
        """The settings that `make_stopping_rule` and `SmoothedClassifier.certify` take."""
        return self.model_dump(include={"stopping", "bound", "n0", "n", "alpha", "radius_step"})


class Latency(Section):
    """Time to certify one image. All methods are timed in turn, round after round."""

    n: list[Count]  # samples per image, to which the measured time is extrapolated; the first is drawn. []: not shown
    rounds: Count
    seconds: Positive  # to measure each method in each round, at least one batch
    precision: CertifiedPrecision


class Attack(Section):
    """PGD on the smoothed classifier (Salman et al. 2019)."""

    methods: list[MethodName]  # the methods to attack; []: none
    steps: Count
    num_noise: Count  # noisy copies per gradient
    n: Count  # samples of PREDICT on the attacked image
    alpha: Annotated[float, Field(gt=0, le=0.5)]  # of PREDICT
    max_images: Count | None  # of the certified images, evenly spaced
    batch_size: Count  # images per batch; each has num_noise copies


class ExternalResult(Section):
    """Certificates of another group in the format of Cohen et al., at one smoothing noise."""

    label: Annotated[str, Field(pattern=r"^[^|\n]+$")]  # it becomes a cell of Markdown tables
    sigma: Positive  # pixel units
    path: str

    @field_validator("label")
    @classmethod
    def label_is_free(cls, label: str) -> str:
        if label in {method.label for method in METHODS.values()}:
            raise ValueError("is the label of a built-in method; choose another")
        return label

    @field_validator("path")
    @classmethod
    def dvc_sees_it(cls, path: str) -> str:
        folder, *rest = PurePosixPath(path).parts or [""]
        if folder != "external" or not rest or ".." in rest:
            raise ValueError("must be a file below external/, the folder that DVC watches for the report")
        return path


class Report(Section):
    """Contents of the tables and figures, and where they are written."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # of the folder below reports/
    radii: Annotated[list[NonNegative], Field(min_length=1)]  # L2, pixel units
    gallery_images: Count
    external_results: list[ExternalResult]  # drawn and listed beside the methods

    @field_validator("external_results")
    @classmethod
    def external_results_differ(cls, results: list[ExternalResult]) -> list[ExternalResult]:
        keys = [(result.label, result.sigma) for result in results]
        for label, sigma in keys:
            if keys.count((label, sigma)) > 1:
                raise ValueError(f"{label!r} at sigma {sigma} appears twice; give each its own label")
        return results


class Config(Section):
    """params.yaml."""

    profile: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    threads: Count | None  # CPU threads per process; null: as many as there are cores
    launcher: str  # starts a training stage: `python`, or `torchrun --nproc-per-node 8`
    sigmas: Annotated[list[Positive], Field(min_length=1)]
    methods: Annotated[list[MethodName], Field(min_length=1)]
    data: Data
    model: Model
    pretrain: Pretrain
    finetune: Finetune
    soft_labels: SoftLabels
    denoiser: DenoiserSettings
    denoised: Denoised
    certify: Certify
    latency: Latency
    attack: Attack
    report: Report
    derived: dict[str, Any]  # `rrcm.derived.derived_settings` of the others, for DVC

    @field_validator("sigmas", mode="before")
    @classmethod
    def sigmas_are_floats(cls, values: object) -> object:
        if isinstance(values, list) and any(isinstance(value, int) for value in values):
            raise ValueError("write whole numbers as 1.0; the text names files and stages")
        return values

    @model_validator(mode="after")
    def another_trunk_starts_from_scratch(self) -> Self:
        name = self.model.architecture
        if name == "vit":
            return self
        for method in self.methods:
            if METHODS[method].initial_weights is not None or METHODS[method].matched:
                raise ValueError(f"methods: {method} needs model.architecture vit, not {name}; leave it out")
            for sigma in self.sigmas:
                if self.finetune.settings(method, sigma).layer_decay != 1:
                    raise ValueError(f"finetune.layer_decay must be 1 with model.architecture {name}")
        if self.pretrain.objectives:
            raise ValueError(f"pretrain.objectives must be [] with model.architecture {name}, which is not pre-trained")
        if self.finetune.num_chunks != 1:
            raise ValueError(f"finetune.num_chunks must be 1 with model.architecture {name}")
        for key in ("pixel_mean", "pixel_std"):
            values = getattr(self.model, key)
            if values is not None and len(values) != self.data.channels:
                raise ValueError(f"model.{key} {values} must have data.channels {self.data.channels} values")
        return self

    @model_validator(mode="after")
    def methods_fit(self) -> Self:
        for name in ("sigmas", "methods"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must not repeat an entry")
        if self.finetune.timm.model is None:
            for name in self.methods:
                if METHODS[name].initial_weights == "timm":
                    raise ValueError(
                        f"finetune.timm.model null must be the name of a ViT in timm, or methods without {name}"
                    )
        for name in self.methods:
            if self.finetune.uses_pretraining(name) and METHODS[name].initial_weights not in self.pretrain.objectives:
                raise ValueError(
                    f"methods: {name} starts from models/pretrain/{METHODS[name].initial_weights}; add "
                    f"{METHODS[name].initial_weights} to pretrain.objectives {self.pretrain.objectives}"
                )
        attacked = self.attack.methods
        if len(set(attacked)) != len(attacked) or not set(attacked) <= set(self.methods):
            raise ValueError(f"attack.methods {attacked} must be among methods {self.methods}, each at most once")
        return self

    def initial_weights(self, method: str) -> str:
        """The initial weights of a method, as `rrcm.derived.initial_weights` names them."""
        return initial_weights(method, self.finetune.model_dump(), self.denoised.model_dump())

    @property
    def trains_denoiser(self) -> bool:
        """Whether a method needs a denoiser, and it is to be trained here."""
        return self.denoiser.public is None and any(METHODS[name].denoises for name in self.methods)

    @model_validator(mode="after")
    def denoised_fit(self) -> Self:
        for name in self.methods:
            if not METHODS[name].denoises:
                continue
            if self.finetune.equal_passes and METHODS[name].objective is not None:
                raise ValueError(
                    f"finetune.equal_passes true has no meaning for {name}; leave it out, or set it to false"
                )
            if METHODS[name].objective is not None and self.denoised.model is not None:
                raise ValueError(
                    f"denoised.model {self.denoised.model}: {name} fine-tunes a classifier that is trained here; leave "
                    "it out, or set denoised.model to null"
                )
        for name in self.denoised.max_images:
            if not METHODS[name].denoises:
                raise ValueError(f"denoised.max_images.{name}: does not denoise; set certify.max_images for all")
        for name in self.attack.methods:
            if METHODS[name].classifier == "densepure":
                raise ValueError(f"attack.methods: {name} votes, which has no gradient to follow; leave it out")
        return self

    @model_validator(mode="after")
    def soft_labels_fit(self) -> Self:
        source = self.soft_labels
        for name in self.methods:
            if METHODS[name].needs_soft_labels and not (source.method in self.methods and source.sigma in self.sigmas):
                raise ValueError(
                    f"soft_labels: {name} needs the votes of {source.method} at sigma {source.sigma}; add these to "
                    f"methods and sigmas, or change soft_labels"
                )
        if METHODS[source.method].needs_soft_labels:
            raise ValueError(f"soft_labels.method {source.method} needs soft labels itself; choose another")
        return self

    @model_validator(mode="after")
    def every_training_has_settings(self) -> Self:
        by_passes = self.finetune.equal_passes or any(METHODS[name].matched for name in self.methods)
        for method in [*self.methods, *([REFERENCE] if by_passes else [])]:
            for sigma in self.sigmas:
                self.finetune.settings(method, sigma)
        return self

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        if self.model.architecture == "vit" and self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of model.patch_size {self.model.patch_size}"
            )
        if self.trains_denoiser and self.denoiser.network == "vit" and self.data.image_size % self.denoiser.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of denoiser.patch_size "
                f"{self.denoiser.patch_size}"
            )
        step = self.certify.radius_step
        off_grid = [radius for radius in self.report.radii if abs(radius / step - round(radius / step)) > 1e-9]
        if self.certify.stopping == "sequential" and off_grid:
            raise ValueError(
                f"report.radii {off_grid[0]} must be a multiple of certify.radius_step {step}, "
                "or certify.stopping fixed"
            )
        return self

    @model_validator(mode="after")
    def derived_fits(self) -> Self:
        values = self.model_dump(mode="json", include=set(SECTIONS))
        if self.derived != derived_settings(values):
            raise ValueError("derived: does not fit the other settings; run `make params`, or change them with -S")
        return self


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of a pydantic error as one line: the key, its value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key, value, message = ".".join(path), first["input"], first["msg"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(model, path[:-1])
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; every setting must be given{more}"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(value, Mapping | BaseModel):  # a rule over a whole section: the message names key and value
        return f"{key + ': ' if key else ''}{message}{more}"
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return f"{key} = {shown}: {message}{more}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:  # a key, or the index of a list's entry
        model = get_args(model)[0] if part.isdigit() else model.model_fields[part].annotation
    return list(model.model_fields)


def parse_config(values: Mapping, source: str = "params.yaml") -> Config:
    """Validate a mapping, and the table of methods that it chooses from.

    Raises `RRCMError` with one line naming the key, the value and what is allowed.
    """
    check_methods()
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise RRCMError(f"{source}: {explain(error, Config)}") from None


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and validate params.yaml."""
    try:
        values = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise RRCMError(
            f"{path}: no such file; run from the repository's root, or compose it with `make params`"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RRCMError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise RRCMError(f"{path}: must be a mapping of settings, found {type(values).__name__}")
    return parse_config(values, str(path))
