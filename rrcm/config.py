"""Every setting of the pipeline, typed and checked whole before any work starts. Read from params.yaml.

Units: `sigma` is the smoothing noise in pixel units (pixels in [0, 1]); `t` is the noise level in model space
(pixels scaled to [-1, 1]), so t = 2 * sigma.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rrcm.utils.errors import RRCMError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]  # auto: `rrcm.utils.distributed.fast_precision`
CertifiedPrecision = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Method:
    """How a classifier is trained. `matched` gives a scratch method rRCM's total compute (pre-training included)."""

    start: Literal["pretrain", "timm"] | None  # the weights of our pre-training, those of a ViT of timm's, or random
    regularized: bool
    matched: bool
    label: str


METHODS = {
    "rrcm": Method(start="pretrain", regularized=True, matched=False, label="rRCM"),
    "consistency": Method(start=None, regularized=True, matched=False, label="Consistency"),
    "gaussian": Method(start=None, regularized=False, matched=False, label="Gaussian"),
    "consistency_matched": Method(start=None, regularized=True, matched=True, label="Consistency, matched compute"),
    "gaussian_matched": Method(start=None, regularized=False, matched=True, label="Gaussian, matched compute"),
    "timm": Method(start="timm", regularized=True, matched=False, label="timm ViT"),
}
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
    width: Count
    depth: Count
    heads: Count
    projector_hidden: Count
    projection: Count
    init: Literal["torch", "moco_v3"]
    freeze_patch_embed: bool
    checkpoint_blocks: bool  # recompute each block's insides in the backward pass: less memory, a third more time

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be even and a multiple of heads {self.heads}")
        return self


class Views(Section):
    """MoCo-v3's two asymmetric augmentation recipes; pairs are (view 1, view 2)."""

    crop_min: Annotated[float, Field(gt=0, le=1)]  # smallest area of the random resized crop
    flip: Probability
    jitter: Probability  # colour jitter .4/.4/.2/.1
    gray: Probability
    blur: tuple[Probability, Probability]
    blur_sigma: tuple[Positive, Positive]  # pixels
    solarize: tuple[Probability, Probability]


class Pretrain(Section):
    """Pre-training: losses, curriculum and schedules of the paper, section 4."""

    objective: Literal["rrcm", "moco_noise"]  # moco_noise: the contrastive term alone, noise as one more augmentation
    batch_size: Annotated[int, Field(ge=2)]  # images a step over all processes
    steps: Count
    warmup_steps: Annotated[int, Field(ge=0)]
    lr: Positive
    weight_decay: NonNegative
    clip_norm: Positive  # gradient norm bound, after warm-up only
    temperature: Positive
    start_levels: Annotated[int, Field(ge=2)]  # s0
    end_levels: Annotated[int, Field(ge=2)]  # s1
    t_min: Positive
    t_max: Positive
    rho: Positive
    teacher_ema_start: Rate  # m0
    teacher_ema_end: Rate  # m1
    teacher_ema_steepness: Positive  # A
    student_ema: Rate
    views: Views
    precision: Precision
    parts: Count  # that the networks see a batch in, to save memory; the gradient stays that of the whole batch
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
        if self.end_levels < self.start_levels:
            raise ValueError(f"end_levels {self.end_levels} must be at least start_levels {self.start_levels}")
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min {self.t_min} must be below t_max {self.t_max}")
        if self.teacher_ema_start >= self.teacher_ema_end:
            raise ValueError(
                f"teacher_ema_start {self.teacher_ema_start} must be below teacher_ema_end {self.teacher_ema_end}"
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
    copies: Annotated[int, Field(ge=1)]  # m, noisy copies of each image
    consistency_weight: NonNegative  # lambda; used by methods with the regulariser
    entropy_weight: NonNegative  # eta
    augmentation: Literal["none", "flip", "crop_flip", "randaugment"]
    mixup: NonNegative
    cutmix: NonNegative
    mixup_switch: Probability
    label_smoothing: Rate
    probe_epochs: Annotated[int, Field(ge=0)]  # linear-probe start: epochs on the head alone, clean images


class TimmViT(Section):
    """The ViT of timm's that method `timm` starts from."""

    model: str | None  # its name; null where nobody asks for it
    weights: str | None  # a safetensors file of its weights; null: timm downloads them


class Finetune(FinetuneSettings):
    """Fine-tuning, with where it starts and what differs per sigma or for networks trained from scratch."""

    start: str | None  # of `rrcm`: a folder of ours or a file of the authors, null: models/pretrain
    time: Literal["exact", "grid"]  # of `rrcm`: t = 2 sigma, or the nearest of the levels of pre-training
    timm: TimmViT
    scratch: dict[str, float | int | str]  # settings replaced when training from scratch
    per_sigma: list[dict[str, float | int | str]]  # entries {sigma: s, setting: value, ...}
    pretraining_shared_by: Count  # number of fine-tuned models that share the pre-training compute
    precision: Precision
    parts: Count  # as in pre-training
    compile: bool  # torch.compile
    evaluate_every: Count  # epochs between looks at the validation split
    checkpoint_every: Count  # epochs

    def settings(self, method: str, sigma: float) -> FinetuneSettings:
        """The settings of one run: the common ones, then those of this sigma, then those for scratch."""
        merged = {name: getattr(self, name) for name in FinetuneSettings.model_fields}
        for entry in self.per_sigma:
            if entry.get("sigma") == sigma:
                merged |= {name: value for name, value in entry.items() if name != "sigma"}
        if METHODS[method].start is None:
            merged |= self.scratch
        return FinetuneSettings.model_validate(merged)

    def origin(self, method: str) -> str:
        """What a method starts from: `scratch`, a folder, a file, or the name of a ViT of timm's."""
        names = {None: "scratch", "pretrain": self.start or "models/pretrain", "timm": self.timm.model}
        return names[METHODS[method].start]

    def uses_pretraining(self, method: str) -> bool:
        """Whether a method starts from models/pretrain: its compute then counts."""
        return METHODS[method].start == "pretrain" and self.start is None

    @model_validator(mode="after")
    def overrides_fit(self) -> Self:
        for place, entry in [("scratch", self.scratch), *((f"per_sigma.{i}", e) for i, e in enumerate(self.per_sigma))]:
            if place != "scratch" and not isinstance(entry.get("sigma"), float | int):
                raise ValueError(f"{place}: needs a number `sigma` that says which noise level it is for")
            values = {name: value for name, value in entry.items() if place == "scratch" or name != "sigma"}
            base = {name: getattr(self, name) for name in FinetuneSettings.model_fields}
            try:
                FinetuneSettings.model_validate(base | values)
            except ValidationError as error:
                raise ValueError(f"{place}.{describe(error, FinetuneSettings)}") from None
        return self


class Certify(Section):
    """Randomized smoothing: CERTIFY of Cohen et al. 2019, as it is or group-sequentially."""

    procedure: Literal["sequential", "fixed"]
    n0: Count  # samples that choose the class
    n: Count  # samples that bound its probability; `sequential` stops earlier where it can
    alpha: Annotated[float, Field(gt=0, le=0.5)]
    grid_step: Positive  # `sequential` certifies multiples of this radius, pixel L2 units
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


class OthersFile(Section):
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
        if folder != "others" or not rest or ".." in rest:
            raise ValueError("must be a file below others/, the folder that DVC watches for the report")
        return path


class Attack(Section):
    """PGD of Salman et al. 2019 on the smoothed classifier."""

    methods: list[MethodName]  # whose classifiers are attacked; []: none
    steps: Count
    samples: Count  # noisy copies that a step's gradient is of
    n: Count  # samples of PREDICT, which answers to the attacked image
    alpha: Annotated[float, Field(gt=0, le=0.5)]  # of PREDICT
    max_images: Count | None  # of the certified ones, evenly spread
    batch: Count  # images at once: `samples` times as many noisy copies go forward and back


class Report(Section):
    """What the tables and figures show."""

    radii: Annotated[list[NonNegative], Field(min_length=1)]  # pixel L2 units
    sheet_images: Count
    others: list[OthersFile]  # drawn and listed beside ours

    @field_validator("others")
    @classmethod
    def others_differ(cls, others: list[OthersFile]) -> list[OthersFile]:
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
        step = self.certify.grid_step
        off_grid = [radius for radius in self.report.radii if abs(radius / step - round(radius / step)) > 1e-9]
        if self.certify.procedure == "sequential" and off_grid:
            raise ValueError(
                f"report.radii {off_grid[0]} must be a multiple of certify.grid_step {step}, or certify.procedure fixed"
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
