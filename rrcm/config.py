"""Every setting of the pipeline, typed and checked whole before any work starts. Read from params.yaml.

Units: `sigma` is the smoothing noise in pixel units (pixels in [0, 1]); `t` is the noise level in model space
(pixels scaled to [-1, 1]), so t = 2 * sigma.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rrcm.methods import METHODS
from rrcm.utils.errors import RRCMError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]  # auto: `rrcm.utils.distributed.native_precision`
CertifiedPrecision = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


MethodName = Literal["rrcm", "consistency", "gaussian", "consistency_matched", "gaussian_matched", "timm"]


class Data(Section):
    """Where the images come from and how they are sharded."""

    source: Literal["digits", "fashion_mnist", "cifar10", "imagenet", "kather", "imagefolder"]
    root: str | None  # folder of the raw files; null: the source's own default place
    image_size: Count  # side of the square the network sees, pixels
    channels: Literal[1, 3]
    val_fraction: Annotated[float, Field(gt=0, le=0.5)]  # share of train carved out, stratified by class
    shard_size: Count  # samples a shard
    workers: Annotated[
        int, Field(ge=0)
    ]  # reading processes of a training (0: it reads by itself); threads of shard-data


class Model(Section):
    """The noise-conditioned ViT (patches + class token + time token) and its projector."""

    patch_size: Count
    embed_dim: Count
    depth: Count
    num_heads: Count
    projector_hidden_dim: Count
    projection_dim: Count
    init: Literal["torch", "moco_v3"]
    freeze_patch_embed: bool
    grad_checkpointing: bool  # recompute each block's insides in the backward pass: less memory, a third more time

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        if self.embed_dim % self.num_heads or self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be even and a multiple of num_heads {self.num_heads}")
        return self


class Views(Section):
    """MoCo-v3's two asymmetric augmentation recipes; pairs are (view 1, view 2)."""

    min_crop_area: Annotated[float, Field(gt=0, le=1)]  # smallest area of the random resized crop
    flip_prob: Probability
    color_jitter_prob: Probability  # colour jitter .4/.4/.2/.1
    grayscale_prob: Probability
    blur_prob: tuple[Probability, Probability]
    blur_sigma: tuple[Positive, Positive]  # pixels
    solarize_prob: tuple[Probability, Probability]


class Pretrain(Section):
    """Pre-training: losses, curriculum and schedules of the paper, section 4."""

    objective: Literal["rrcm", "moco_noise"]  # moco_noise: the contrastive term alone, noise as one more augmentation
    batch_size: Annotated[int, Field(ge=2)]  # images a step over all processes
    steps: Count
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: Positive
    weight_decay: NonNegative
    grad_clip_norm: Positive  # gradient norm bound, after warm-up only
    temperature: Positive
    min_levels: Annotated[int, Field(ge=2)]  # s0
    max_levels: Annotated[int, Field(ge=2)]  # s1
    t_min: Positive
    t_max: Positive
    rho: Positive
    teacher_decay_start: Rate  # m0
    teacher_decay_end: Rate  # m1
    teacher_decay_steepness: Positive  # A
    ema_decay: Rate
    views: Views
    precision: Precision
    num_chunks: Count  # GradCache: the networks see a batch in so many chunks; the gradient is that of the whole batch
    compile: bool  # torch.compile
    log_every: Count  # steps
    evaluate_every: Count  # steps between looks at the representations of the validation split
    evaluate_sigmas: Annotated[list[Positive], Field(min_length=1)]  # at these noises, pixel units
    evaluate_images: Count  # at most so many, of the validation split and of the training split (the neighbours)
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
                f"teacher_decay_start {self.teacher_decay_start} must be below teacher_decay_end {self.teacher_decay_end}"
            )
        return self


class FinetuneSettings(Section):
    """Fine-tuning of one classifier."""

    epochs: Count
    warmup_epochs: NonNegative
    batch_size: Count  # images a step over all processes
    lr: Positive  # per 256 images of a batch
    layer_decay: Annotated[float, Field(gt=0, le=1)]  # learning rate factor from one layer to the one below it
    weight_decay: NonNegative
    num_noise: Annotated[int, Field(ge=1)]  # m, noisy copies of each image
    consistency_weight: NonNegative  # lambda; used by methods with the regulariser
    entropy_weight: NonNegative  # eta
    augmentation: Literal["none", "flip", "crop_flip", "randaugment"]
    mixup: NonNegative
    cutmix: NonNegative
    mixup_switch_prob: Probability
    label_smoothing: Rate
    linear_probe_epochs: Annotated[int, Field(ge=0)]  # linear-probe start: epochs on the head alone, clean images


class TimmViT(Section):
    """The ViT of timm's that method `timm` starts from."""

    model: str | None  # its name; null where nobody asks for it
    weights: str | None  # a safetensors file of its weights; null: timm downloads them


class Finetune(FinetuneSettings):
    """Fine-tuning, with where it starts and what differs per sigma or for networks trained from scratch."""

    initial_checkpoint: str | None  # of `rrcm`: a folder of ours or a file of the authors, null: models/pretrain
    time_condition: Literal[
        "exact", "nearest_level"
    ]  # of `rrcm`: t = 2 sigma, or the nearest of the levels of pre-training
    timm: TimmViT
    scratch_overrides: dict[str, float | int | str]  # settings replaced when training from scratch
    sigma_overrides: list[dict[str, float | int | str]]  # entries {sigma: s, setting: value, ...}
    pretrain_cost_shared_by: Count  # number of fine-tuned models that share the pre-training compute
    precision: Precision
    num_chunks: Count  # as in pre-training
    compile: bool  # torch.compile
    evaluate_every: Count  # epochs between looks at the validation split
    checkpoint_every: Count  # epochs

    def settings(self, method: str, sigma: float) -> FinetuneSettings:
        """The settings of one run: the common ones, then those of this sigma, then those for scratch."""
        merged = {name: getattr(self, name) for name in FinetuneSettings.model_fields}
        for entry in self.sigma_overrides:
            if entry.get("sigma") == sigma:
                merged |= {name: value for name, value in entry.items() if name != "sigma"}
        if METHODS[method].initial_weights is None:
            merged |= self.scratch_overrides
        return FinetuneSettings.model_validate(merged)

    def origin(self, method: str) -> str:
        """What a method starts from: `scratch`, a folder, a file, or the name of a ViT of timm's."""
        names = {
            None: "scratch",
            "rrcm": self.initial_checkpoint or "models/pretrain",
            "timm": self.timm.model,
        }
        return names[METHODS[method].initial_weights]

    def uses_pretraining(self, method: str) -> bool:
        """Whether a method starts from models/pretrain: its compute then counts."""
        return METHODS[method].initial_weights == "rrcm" and self.initial_checkpoint is None

    @model_validator(mode="after")
    def overrides_fit(self) -> Self:
        for place, entry in [
            ("scratch_overrides", self.scratch_overrides),
            *((f"sigma_overrides.{i}", e) for i, e in enumerate(self.sigma_overrides)),
        ]:
            if place != "scratch_overrides" and not isinstance(entry.get("sigma"), float | int):
                raise ValueError(f"{place}: needs a number `sigma` that says which noise level it is for")
            values = {name: value for name, value in entry.items() if place == "scratch_overrides" or name != "sigma"}
            base = {name: getattr(self, name) for name in FinetuneSettings.model_fields}
            try:
                FinetuneSettings.model_validate(base | values)
            except ValidationError as error:
                raise ValueError(f"{place}.{describe(error, FinetuneSettings)}") from None
        return self


class Certify(Section):
    """Randomized smoothing: CERTIFY of Cohen et al. 2019, as it is or group-sequentially."""

    stopping: Literal["sequential", "fixed"]
    n0: Count  # samples that choose the class
    n: Count  # samples that bound its probability; `sequential` stops earlier where it can
    alpha: Annotated[float, Field(gt=0, le=0.5)]
    radius_step: Positive  # `sequential` certifies multiples of this radius, pixel L2 units
    batch_size: Count | None  # noisy samples a forward pass; null: found by itself within memory_gib
    memory_gib: Positive | None  # null: 1/16 on a CPU (its caches), half the memory of a GPU
    every: Count  # certify every k-th test image
    max_images: Count | None
    precision: CertifiedPrecision
    compile: bool  # torch.compile, on a GPU with CUDA graphs


class Latency(Section):
    """Time to certify one image."""

    n: list[Count]
    batch_size: Count | None  # null: found by itself
    precision: CertifiedPrecision


class ExternalResult(Section):
    """Another group's certificates, in the field's format, at one smoothing noise."""

    label: Annotated[str, Field(pattern=r"^[^|\n]+$")]  # it becomes a cell of Markdown tables
    sigma: Positive  # pixel units
    path: str

    @field_validator("label")
    @classmethod
    def not_ours(cls, label: str) -> str:
        if label in {method.label for method in METHODS.values()}:
            raise ValueError("is what a method of ours is called; add whose it is")
        return label

    @field_validator("path")
    @classmethod
    def dvc_sees_it(cls, path: str) -> str:
        folder, *rest = PurePosixPath(path).parts or [""]
        if folder != "external" or not rest or ".." in rest:
            raise ValueError("must be a file below external/, the folder that DVC watches for the report")
        return path


class Attack(Section):
    """PGD of Salman et al. 2019 on the smoothed classifier."""

    methods: list[MethodName]  # whose classifiers are attacked; []: none
    steps: Count
    num_noise: Count  # noisy copies that a step's gradient is of
    n: Count  # samples of PREDICT, which answers to the attacked image
    alpha: Annotated[float, Field(gt=0, le=0.5)]  # of PREDICT
    max_images: Count | None  # of the certified ones, evenly spread
    batch_size: Count  # images at once: `num_noise` times as many noisy copies go forward and back


class Report(Section):
    """What the tables and figures show."""

    radii: Annotated[list[NonNegative], Field(min_length=1)]  # pixel L2 units
    gallery_images: Count
    external_results: list[ExternalResult]  # drawn and listed beside ours

    @field_validator("external_results")
    @classmethod
    def others_differ(cls, others: list[ExternalResult]) -> list[ExternalResult]:
        runs = [(other.label, other.sigma) for other in others]
        for label, sigma in runs:
            if runs.count((label, sigma)) > 1:
                raise ValueError(f"{label!r} at sigma {sigma} is there twice; labels tell them apart")
        return others


class Config(Section):
    """params.yaml."""

    profile: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    launcher: str  # what starts a training stage: `python`, or `torchrun --nproc-per-node 8`
    sigmas: Annotated[list[Positive], Field(min_length=1)]
    methods: Annotated[list[MethodName], Field(min_length=1)]
    data: Data
    model: Model
    pretrain: Pretrain
    finetune: Finetune
    certify: Certify
    latency: Latency
    attack: Attack
    report: Report

    @field_validator("sigmas", mode="before")
    @classmethod
    def sigmas_are_floats(cls, values: object) -> object:
        if isinstance(values, list) and any(isinstance(value, int) for value in values):
            raise ValueError("write whole numbers as 1.0; the text names files and stages")
        return values

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        for name in ("sigmas", "methods"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must not repeat an entry")
        if "timm" in self.methods and self.finetune.timm.model is None:
            raise ValueError("finetune.timm.model null must be the name of a ViT of timm's, or methods without timm")
        attacked = self.attack.methods
        if len(set(attacked)) != len(attacked) or not set(attacked) <= set(self.methods):
            raise ValueError(f"attack.methods {attacked} must be among methods {self.methods}, each at most once")
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of model.patch_size {self.model.patch_size}"
            )
        step = self.certify.radius_step
        off_grid = [radius for radius in self.report.radii if abs(radius / step - round(radius / step)) > 1e-9]
        if self.certify.stopping == "sequential" and off_grid:
            raise ValueError(
                f"report.radii {off_grid[0]} must be a multiple of certify.radius_step {step}, or certify.stopping fixed"
            )
        return self


def describe(error: ValidationError, model: type[BaseModel]) -> str:
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
    return f"{key} = {value!r}: {message}{more}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:  # a key, or the place of a list's entry
        model = get_args(model)[0] if part.isdigit() else model.model_fields[part].annotation
    return list(model.model_fields)


def parse_config(values: Mapping, origin: str = "params.yaml") -> Config:
    """Validate a mapping. Raises `RRCMError` with one line naming the key, the value and what is allowed."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise RRCMError(f"{origin}: {describe(error, Config)}") from None


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and validate params.yaml."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RRCMError(
            f"{path}: no such file; run from the repository's root, or compose it with `make params`"
        ) from None
    except (OSError, yaml.YAMLError) as error:
        raise RRCMError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise RRCMError(f"{path}: must be a mapping of settings, found {type(values).__name__}")
    return parse_config(values, str(path))
