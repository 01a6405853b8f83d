"""Every setting of params.yaml: its type, its unit and its meaning, and the rules within each section.

constraints.py has the rules between sections. docs/settings.md lists all settings with their defaults.

Units: `sigma` is the smoothing noise in pixel units (pixels in [0, 1]). `t` is the noise level in model space (pixels
scaled to [-1, 1]), so t = 2 * sigma.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from rrcm.constraints import CONSTRAINTS
from rrcm.derived import ONLY_VIT, cascade_sigmas, choose_values, finetuning_keys, initial_weights, model_settings
from rrcm.methods import JOINT, JOINT_SHARES, METHODS, PASS, PER_OBJECTIVE, check_methods, has_joint
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.plugins import use_plugin
from rrcm.sections import (
    Section,
    about,
    check_cnn,
    check_name,
    check_stem,
    check_training_key,
    check_width,
    explain,
    section_by_key,
    value_by_key,
    word_or,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_text


def check_method(name: str) -> str:
    """Return `name` if it is a method. Otherwise raise ValueError, with the reason if it cannot be joint."""
    expert = next((name.removesuffix(f"_{end}") for end in JOINT_SHARES if name.endswith(f"_{end}")), name)
    if expert != name and expert in METHODS and METHODS[expert].denoises:
        raise ValueError(f"{expert} has no joint form, as its denoiser takes every sigma; name {expert} itself")
    if name == f"{expert}_{PASS}" and expert in METHODS and not has_joint(METHODS[expert], PASS):
        kind = "an ensemble" if METHODS[expert].is_ensemble else "a student"
        raise ValueError(f"{expert} has no form that can pass, as it is {kind}; name {expert}_{JOINT}")
    student, matched, _ = name.partition("_matched")
    if matched and student in METHODS and METHODS[student].is_student:
        raise ValueError(f"{student} has no matched form, as its teacher has passes of its own; name {student} itself")
    return check_name(name, METHODS, "method")


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
ErrorRate = Annotated[float, Field(gt=0, le=0.5)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
TwoOrMore = Annotated[int, Field(ge=2)]
Interval = Annotated[list[Positive], Field(min_length=2, max_length=2)]
RadiusWeights = Annotated[dict[NonNegative, Positive], Field(min_length=1)]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
MethodName = Annotated[str, AfterValidator(check_method)]
PretrainingName = Annotated[str, AfterValidator(partial(check_name, known=PRETRAINING, what="objective"))]
PerObjective = value_by_key(Positive, partial(check_name, known=["default", *PRETRAINING], what="objective"))
Stem = Literal["patches", "convolutions"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]  # auto: `rrcm.utils.distributed.native_precision`
CertifiedPrecision = Literal["auto", "fp32", "bf16", "int8"]


class Data(Section):
    """The data set and its shards."""

    source: FileName = about("Name of the data set in `rrcm.sources.DATASETS`")
    root: str | None = about("Folder of the raw files; null: the default folder of the data set")
    image_size: Count = about("Side of the square image that the network sees", "pixels")
    channels: Literal[1, 3] = about("Colour channels of the images")
    val_fraction: Annotated[float, Field(gt=0, le=0.5)] = about("Share of train held out for validation, by class")
    labels_per_class: Count | None = about("Training images of each class with labels for fine-tuning; null: all")
    shard_size: Count = about("Size of a shard", "images")
    workers: CountOrZero = about("Processes that load data, or 0 to load in the main process; threads in shard-data")


class Model(Section):
    """The network: an encoder that is conditioned on the noise level, with its projector, or another trunk.

    The encoder is a ViT (class token, time token, patches), or a CNN, which uses only `patch_size` and `embed_dim`. The
    other trunks are for methods that start from scratch or from timm's weights. They use `architecture`, `pixel_mean`
    and `pixel_std`.
    """

    architecture: str = about("`vit` or `cnn`, or another trunk: `lenet`, `resnet110`, or the name of a timm model")
    pixel_mean: list[float] | None = about("Mean of each channel for another trunk; null: not normalized", "[0, 1]")
    pixel_std: list[Positive] | None = about("Standard deviation of each channel, likewise", "[0, 1]")
    stem: Stem = about("How an image becomes tokens: patches, or convolutions of stride 2, one token for each patch")
    patch_size: Count = about("Side of a patch; a CNN halves the image until there is one position for each", "pixels")
    embed_dim: Count = about("Width D of the tokens and of the representation; a CNN has up to D / 4 channels")
    depth: Count = about("Number of transformer blocks")
    num_heads: Count = about("Attention heads of a block")
    projector_hidden_dim: Count = about("Width of the hidden layers of the projector")
    projection_dim: Count = about("Width of the projection")
    init: Literal["torch", "moco_v3"] = about("How the encoder is initialized")
    freeze_patch_embed: bool = about("Keep the patch embedding as initialized, for stability")
    grad_checkpointing: bool = about("Recompute each block in the backward pass: less memory, a third more time")

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise ValueError("pixel_mean and pixel_std must both be given, or both be null")
        check_width(self.embed_dim, self.num_heads)
        if self.stem != "patches" and (self.init != "torch" or self.freeze_patch_embed):
            raise ValueError(f"stem {self.stem} needs init torch and freeze_patch_embed false")
        for name, default in ONLY_VIT.items():
            if self.architecture == "cnn" and getattr(self, name) != default:
                raise ValueError(f"{name} {getattr(self, name)} is for a ViT; a cnn needs {default}")
        return self

    def check_stem(self, image_size: int) -> None:
        """Raise ValueError unless the stem of the ViT, or the CNN, fits images of this size."""
        if self.architecture == "cnn":
            check_cnn(image_size, self.patch_size, self.embed_dim)
        else:
            check_stem(self.stem, image_size, self.patch_size, self.embed_dim)


class Student(Section):
    """The network of students. They learn the predictions of another method's network, their teacher.

    A size that is null is taken from `model`, so that it equals the teacher's.
    """

    teacher: MethodName = about(
        "Method of the teacher, which is trained in the same run; joint students need a joint one"
    )
    architecture: str | None = about("Network of the student; null: as in `model`, which also normalizes its pixels")
    stem: Stem | None = about("Stem of the student; null: as in `model`")
    patch_size: Count | None = about("Patch size of the student; null: as in `model`", "pixels")
    embed_dim: Count | None = about("Width of the student; null: as in `model`")
    depth: Count | None = about("Blocks of the student; null: as in `model`")
    num_heads: Count | None = about("Attention heads of the student; null: as in `model`")


class Views(Section):
    """MoCo-v3's two asymmetric augmentation recipes. Pairs are (view 1, view 2)."""

    min_crop_area: Share = about("Smallest share of the image in a random resized crop")
    flip_prob: Probability = about("Probability of a horizontal flip")
    color_jitter_prob: Probability = about("Probability of colour jitter, of strengths .4, .4, .2 and .1")
    grayscale_prob: Probability = about("Probability of a grey image")
    blur_prob: tuple[Probability, Probability] = about("Probability of a Gaussian blur in each view")
    blur_sigma: tuple[Positive, Positive] = about("Smallest and largest width of the blur", "pixels")
    solarize_prob: tuple[Probability, Probability] = about("Probability of solarization in each view")


class DMAESettings(Section):
    """Denoising masked autoencoders (Wu et al. 2023), alone and together with rRCM."""

    mask_ratio: Rate = about("Share of the patches that the encoder does not see; it sees at least one")
    sigma: NonNegative = about("Noise of the encoder's input", "pixel units")
    decoder_embed_dim: Count = about("Width of the decoder")
    decoder_depth: Count = about("Number of the decoder's transformer blocks")
    decoder_num_heads: Count = about("Attention heads of a decoder block")

    @model_validator(mode="after")
    def heads_divide(self) -> Self:
        check_width(self.decoder_embed_dim, self.decoder_num_heads, "decoder_")
        return self


class RRCMDMAESettings(Section):
    """rRCM and DMAE on one encoder. The DMAE part has the settings of `dmae`."""

    dmae_weight: NonNegative = about("Weight of DMAE's loss beside rRCM's")


class Pretrain(Section):
    """Pre-training: losses, curriculum and schedules (Lei et al. 2025, section 4).

    `lr` and `temperature` are one value, or a mapping by objective with the key `default`: {default: 1e-3, dmae: 5e-4}.
    """

    objectives: list[PretrainingName] = about("Objectives of `rrcm.objectives.PRETRAINING`; each trains one encoder")
    batch_size: TwoOrMore = about("Images per optimizer step, over all processes", "images")
    steps: Count = about("Length of the training, K", "steps")
    equal_passes: bool = about("Give every objective the encoder passes of rRCM's steps, instead of equal steps")
    warmup_steps: CountOrZero = about("Linear warm-up of the learning rate, before a cosine to zero", "steps")
    lr: PerObjective = about("Peak learning rate of AdamW")
    weight_decay: NonNegative = about("Weight decay of AdamW")
    grad_clip_norm: Positive = about("Largest norm of the gradient, once the warm-up is over")
    temperature: PerObjective = about("Temperature of InfoNCE, tau")
    min_levels: TwoOrMore = about("Strides of the first noise grid, s0")
    max_levels: TwoOrMore = about("Strides of the last noise grid, s1")
    t_min: Positive = about("Lowest noise level", "model space")
    t_max: Positive = about("Highest noise level", "model space")
    rho: Positive = about("Exponent that spaces the noise levels (Karras et al. 2022)")
    teacher_decay_start: Rate = about("Decay rate of the teacher at the first step, m0")
    teacher_decay_end: Rate = about("Decay rate of the teacher at the last step, m1")
    teacher_decay_steepness: Positive = about("How fast the teacher's decay rate rises, A")
    ema_decay: Rate = about("Decay rate of the average of the student, from which fine-tuning starts")
    views: Views
    dmae: DMAESettings
    rrcm_dmae: RRCMDMAESettings
    precision: Precision = about("Number format; auto: bf16 where the device has it, else fp16 (GPU) or fp32 (CPU)")
    num_chunks: Count = about("Chunks of a batch (GradCache): less memory, the same gradient")
    compile: bool = about("Use torch.compile")
    log_every: Count = about("Interval between rows of the log", "steps")
    evaluate_every: Count = about("Interval between evaluations of the representations on validation images", "steps")
    evaluate_sigmas: Annotated[list[Positive], Field(min_length=1)] = about("Noise of these evaluations", "pixel units")
    checkpoint_every: Count = about("Interval between the states from which a killed training resumes", "steps")

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

    num_noise: Count | None = about("Noisy copies of each image, m; null: `finetune.num_noise`")


class StabilitySettings(Section):
    """Stability training (Li et al. 2019)."""

    num_noise: Count | None = about("Noisy copies of each image, m; null: `finetune.num_noise`")
    stability_weight: NonNegative = about("Weight of the stability loss, lambda")


class ConsistencySettings(Section):
    """Consistency regularization (Jeong & Shin 2020)."""

    consistency_weight: NonNegative = about("Weight of the consistency loss, lambda")
    entropy_weight: NonNegative = about("Weight of the entropy of the mean prediction, eta")


class MACERSettings(Section):
    """MACER (Zhai et al. 2020)."""

    num_noise: TwoOrMore = about("Noisy copies of each image, k, in place of `finetune.num_noise`")
    radius_weight: NonNegative = about("Weight of the radius loss, lambda")
    beta: Positive = about("Inverse temperature of the soft votes")
    gamma: Positive = about("Margin of the hinge on the radius")
    deferred_epochs: NonNegative = about("Time before the radius loss begins", "epochs")


class SmoothAdvSettings(Section):
    """SmoothAdv (Salman et al. 2019)."""

    num_noise: Count | None = about("Noisy copies of each image, m; null: `finetune.num_noise`")
    attack_radius: NonNegative = about("L2 radius of the attack, epsilon", "pixel units")
    attack_steps: Count = about("Steps of the attack, T")
    attack_warmup_epochs: NonNegative = about("Time over which epsilon grows linearly from zero", "epochs")


class SmoothMixSettings(Section):
    """SmoothMix (Jeong et al. 2021)."""

    num_noise: Count | None = about("Noisy copies of each image, m; null: `finetune.num_noise`")
    mix_weight: NonNegative = about("Weight of the loss on mixed images, eta")
    attack_step: Positive = about("L2 length of a step of the attack, alpha", "pixel units")
    attack_steps: Count = about("Steps of the attack, T")
    one_step_clean_end: bool = about("Mix from the adversary after one step instead of from the clean image")
    mix_warmup_epochs: NonNegative = about("Time over which eta and the distance of that adversary grow", "epochs")


class CATRSSettings(Section):
    """CAT-RS (Jeong et al. 2023)."""

    num_noise: Count = about("Noisy copies of each image, m, in place of `finetune.num_noise`")
    worst_case_weight: NonNegative = about("Weight of the worst-case loss, lambda")
    attack_radius: NonNegative = about("L2 radius of the attack on the noise, epsilon", "pixel units")
    attack_steps: Count = about("Steps of the attack, T")
    confidence: Literal["predictions", "soft_label"] | None = about("What says how many copies count; null if m is 1")

    @model_validator(mode="after")
    def one_copy_always_counts(self) -> Self:
        if (self.num_noise == 1) != (self.confidence is None):
            needed = "null, as its one copy always counts" if self.num_noise == 1 else "predictions or soft_label"
            raise ValueError(f"confidence {self.confidence} with num_noise {self.num_noise} must be {needed}")
        return self


class ObjectiveSettings(Section):
    """Settings of the fine-tuning objectives, with a block for each objective that has any.

    A plug-in's objective may have one as well.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    gaussian: GaussianSettings
    stability: StabilitySettings
    consistency: ConsistencySettings
    macer: MACERSettings
    smoothadv: SmoothAdvSettings
    smoothmix: SmoothMixSettings
    cat_rs: CATRSSettings

    @model_validator(mode="before")
    @classmethod
    def blocks_are_of_objectives(cls, blocks: object) -> object:
        known = {*cls.model_fields, *FINETUNING}
        if isinstance(blocks, Mapping) and (unknown := [name for name in blocks if name not in known]):
            details = {"type": "extra_forbidden", "loc": (str(unknown[0]),), "input": blocks[unknown[0]]}
            raise ValidationError.from_exception_data(cls.__name__, [details])
        return blocks


class FinetuneSettings(Section):
    """Fine-tuning of one classifier."""

    epochs: Count = about("Length of the training", "epochs")
    warmup_epochs: NonNegative = about("Linear warm-up of the learning rate", "epochs")
    batch_size: Count = about("Images of a batch, over all processes", "images")
    steps_per_batch: Literal[1, "num_noise"] = about("Optimizer steps; num_noise: one on each of m equal parts")
    lr: Positive = about("Peak learning rate for a batch of 256 images; it is scaled by the batch size")
    layer_decay: Share = about("Factor by which the learning rate falls from one layer to the layer below")
    weight_decay: NonNegative = about("Weight decay of the optimizer")
    optimizer: Literal["adamw", "sgd"] = about("Optimizer; sgd has a momentum of 0.9")
    lr_schedule: Literal["cosine", "step"] = about("After warm-up: to zero, or a tenth after every lr_step_epochs")
    lr_step_epochs: Positive = about("Interval between the drops of lr_schedule step", "epochs")
    num_noise: Count = about("Noisy copies of each image, m")
    augmentation: Literal["none", "flip", "pad_crop_flip", "crop_flip", "randaugment"] = about("Augmentation of images")
    mixup: NonNegative = about("Alpha of mixup; 0: off")
    cutmix: NonNegative = about("Alpha of cutmix; 0: off")
    mixup_switch_prob: Probability = about("Probability of cutmix instead of mixup where both are on")
    label_smoothing: Rate = about("Probability mass that the target spreads over all classes")
    linear_probe_epochs: CountOrZero = about("Epochs on the head alone and on clean images, beforehand", "epochs")
    objectives: ObjectiveSettings

    def of_objective(self, name: str) -> dict[str, object]:
        """The settings of one objective: the common ones, overridden by its own block."""
        common = self.model_dump(exclude={"objectives"})
        own = self.objectives.model_dump().get(name, {})
        return common | {key: value for key, value in own.items() if value is not None}

    def check_objective(self, name: str) -> None:
        """Raise ValueError when these settings do not fit an objective."""
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


def _choose(settings: Mapping, keys: Sequence[str], path: str) -> dict:
    """`choose_values` of the section at `path`. Raises ValueError for a setting that has no value for any of `keys`."""
    chosen = choose_values(settings, keys)
    for name, value in chosen.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{path}.{name}: has no value for {keys[-2]}; add {keys[-2]} or default")
    return chosen


class TimmModel(Section):
    """The timm model that method `timm` starts from: a plain ViT, or a network of `model.architecture`."""

    model: str | None = about("Name in timm, snapshot folder or hf-hub:owner/name; null if no method starts from timm")
    weights: str | None = about("File with the weights of a name in timm; null: timm downloads them")


class Finetune(section_by_key(FinetuneSettings, partial(check_training_key, objectives=FINETUNING))):
    """Fine-tuning: the initial weights, and the settings of all trainings.

    A setting of `FinetuneSettings` is one value, or a mapping with the keys `smoothadv` (for that objective), `scratch`
    (for methods with random initial weights), `sigma_0.5` (for that noise) and `default`. The first of these that the
    mapping has, in this order, is used. For joint methods the key `joint` comes before all others.
    """

    equal_passes: bool = about("Give every method the encoder passes of rRCM's epochs, instead of equal epochs")
    initial_weights: str | None = about("Model folder or authors' file that replaces models/pretrain/<objective>")
    ensemble_members: TwoOrMore = about("Members of an ensemble, k")
    joint_interval: Interval | None = about(
        "Noise of joint trainings: log-uniform from the first to the second; null: each of `sigmas` equally often",
        "pixel units",
    )
    pass_votes: Count = about("Votes for each training image at each sigma, for the targets of `pass`", "samples")
    pass_share: Share = about("Steps that train an output for `pass`, as a share of the steps of the joint training")
    pass_bias: float = about(
        "Number added to the logit of `pass`: a larger one improves small radii and worsens large ones"
    )
    time_condition: Literal["exact", "nearest_level"] = about("t = 2 sigma, or the nearest level of pre-training")
    timm: TimmModel
    pretrain_cost_shared_by: Count = about("Fine-tuned models that share the compute of one pre-training", "models")
    precision: Precision = about("Number format; auto: bf16 where the device has it, else fp16 (GPU) or fp32 (CPU)")
    weights_dtype: Literal["bf16", "fp32"] = about("Format of the weights that are selected, saved and certified")
    num_chunks: Count = about("Chunks of a batch, as in pre-training")
    compile: bool = about("Use torch.compile")
    evaluate_every: Count = about("Interval between evaluations on the validation split", "epochs")
    checkpoint_every: Count = about("Interval between the states from which a killed training resumes", "epochs")

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

    base_channels: Count = about("Channels at the full size")
    channel_mults: Annotated[list[Count], Field(min_length=1)] = about("Factor of each level, each at half the size")
    layers_per_block: Count = about("Residual layers at each level")
    attention_levels: list[CountOrZero] = about("Levels with attention; 0 is the full size")


class DenoiserSettings(Section):
    """The denoiser D(x; t) of the methods that denoise first: its network, and its training (Karras et al. 2022)."""

    public: str | None = about("Folder that diffusers has saved, or hf-hub:owner/name; null: train one")
    network: Literal["vit", "unet"] = about("The trunk with a head for pixels, or the UNet of diffusers")
    unet: UNetSettings
    stem: Stem = about("`model.stem` of the denoiser's ViT")
    patch_size: Count = about("Side of a patch of the ViT", "pixels")
    embed_dim: Count = about("Width of the ViT")
    depth: Count = about("Transformer blocks of the ViT")
    num_heads: Count = about("Attention heads of a block of the ViT")
    batch_size: Count = about("Images per optimizer step, over all processes", "images")
    steps: Count = about("Length of the training", "steps")
    warmup_steps: CountOrZero = about("Linear warm-up of the learning rate, before a cosine to zero", "steps")
    lr: Positive = about("Peak learning rate of AdamW")
    ema_decay: Rate = about("Decay rate of the average of the weights, which is kept")
    noise_mean: float = about("Mean of ln t, which is normal; P_mean")
    noise_std: Positive = about("Standard deviation of ln t; P_std")
    augmentation: Literal["none", "flip"] = about("Augmentation of images")
    precision: Precision = about("Number format; auto: bf16 where the device has it, else fp16 (GPU) or fp32 (CPU)")
    num_chunks: Count = about("Chunks of a batch, as in pre-training")
    compile: bool = about("Use torch.compile")
    log_every: Count = about("Interval between rows of the log", "steps")
    evaluate_every: Count = about("Interval between errors on the validation split", "steps")
    checkpoint_every: Count = about("Interval between the states from which a killed training resumes", "steps")

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        check_width(self.embed_dim, self.num_heads)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    def check_stem(self, image_size: int) -> None:
        """Check the sizes as `Model` does."""
        check_stem(self.stem, image_size, self.patch_size, self.embed_dim)


class DensePureSettings(Section):
    """DensePure (Xiao et al. 2023)."""

    runs: Count = about("Reverse processes per noisy image, K")
    steps: Count = about("Steps of each process, b")


class DiffSmoothSettings(Section):
    """DiffSmooth (Zhang et al. 2023)."""

    num_noise: Count = about("Local noises per denoised image, m")
    local_sigma: Positive = about("Local noise, with which the classifier is trained as well, sigma'", "pixel units")


class Denoised(Section):
    """Classifiers that denoise first. The classifier of the denoised images is method gaussian at very little noise."""

    model: str | None = about("Timm model or model folder that classifies instead of a classifier trained here")
    densepure: DensePureSettings
    diffsmooth: DiffSmoothSettings
    max_images: dict[MethodName, Count | None] = about("Images of a method, at most; null: no further limit", "images")


class SoftLabels(Section):
    """The smoothed classifier whose votes for the training images are soft labels, for objectives that need them."""

    method: MethodName = about("Method of the classifier that votes")
    sigma: Positive = about("Smoothing noise of that classifier", "pixel units")
    n: Count = about("Noisy copies of each training image", "samples")


class Certify(Section):
    """Randomized smoothing: CERTIFY of Cohen et al. 2019, with a fixed or a group-sequential number of samples."""

    stopping: Literal["sequential", "fixed"] = about("Stop as early as the votes allow, or always draw n samples")
    bound: Literal["binary", "margin"] = about("p_B = 1 - p_A, as in all papers; or from the votes for every class")
    n0: Count = about("Samples that select the class", "samples")
    n: Count = about("Samples that bound its probability, at most", "samples")
    alpha: ErrorRate = about("Probability that a certificate is wrong, at most")
    radius_step: Positive = about("Grid of the radii that `sequential` certifies, L2", "pixel units")
    batch_size: Count | None = about("Noisy samples per forward pass; null: chosen to fit into memory", "samples")
    every: Count = about("Certify every k-th test image")
    max_images: Count | None = about("Certify at most this many images, evenly spaced", "images")
    precision: CertifiedPrecision = about(
        "Number format; auto: bf16 if the device has it, else fp32; int8: for openvino"
    )
    compile: bool = about("Use torch.compile, with CUDA graphs on a GPU")
    runtime: Literal["torch", "openvino"] = about(
        "Library that runs the network. `openvino` is for CPUs; if it cannot run the network, torch does"
    )

    @property
    def rule(self) -> dict[str, object]:
        """The settings that `make_stopping_rule` and `SmoothedClassifier.certify` take."""
        return self.model_dump(include={"stopping", "bound", "n0", "n", "alpha", "radius_step"})

    @property
    def torch_precision(self) -> str:
        """The precision of networks that torch runs, and of those that int8 is made from."""
        return "fp32" if self.precision == "int8" else self.precision


class Cascade(Section):
    """One deployed classifier for all radii: the cascade of a method's smoothed classifiers at increasing sigmas.

    Its base classifiers are one joint network or the experts. It is certified with the settings of `certify`.
    """

    methods: list[MethodName] = about("Methods whose cascade is certified; []: none")
    sigmas: Annotated[list[Positive], Field(min_length=2)] | None = about(
        "Noise of the smoothed classifiers in the cascade; null: all of `sigmas`", "pixel units"
    )
    thresholds: word_or("chosen", list[float], "a list of numbers") = about(
        "One for each sigma but the smallest, by increasing sigma; chosen: on validation images", "pixel units"
    )
    choose_by: word_or("acr", RadiusWeights, "a mapping from radii to weights") = about(
        "What chosen thresholds maximize: acr, or the weighted sum of certified accuracies, {radius: weight}"
    )
    choose_n: Count = about("Votes for each validation image at each sigma, to choose thresholds", "samples")
    multi_scale: bool = about("Also certify by the rule of Jeong & Shin (NeurIPS 2023), for comparison")

    @property
    def weights(self) -> dict[float, float] | None:
        """The weights for `choose_thresholds`: of the certified accuracy at each radius. None stands for ACR."""
        return None if self.choose_by == "acr" else dict(self.choose_by)


class Latency(Section):
    """Time to certify one image, at the precision of `certify`. The methods are timed alternately."""

    n: list[Count] = about("Samples per image that the time is extrapolated to; the figure shows the first", "samples")
    rounds: Count = about("Rounds; each times every method once")
    seconds: Positive = about("Time to measure each method in each round, at least one batch", "seconds")


class Attack(Section):
    """PGD on the smoothed classifier (Salman et al. 2019). PREDICT on the attacked images has `certify.alpha`."""

    methods: list[MethodName] = about("Methods to attack; []: none")
    steps: Count = about("Steps of the attack")
    num_noise: Count = about("Noisy copies for each gradient", "samples")
    n: Count = about("Samples of PREDICT on the attacked image", "samples")
    max_images: Count | None = about("Attack at most this many of the certified images, evenly spaced", "images")
    batch_size: Count = about("Images of a batch; each has num_noise copies", "images")


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

    name: FileName = about("Folder below reports/")
    radii: Annotated[list[NonNegative], Field(min_length=1)] = about("Radii of the tables, L2", "pixel units")
    external_results: list[ExternalResult] = about("Certificates of other groups, drawn and listed beside the methods")

    @field_validator("external_results")
    @classmethod
    def external_results_differ(cls, results: list[ExternalResult]) -> list[ExternalResult]:
        keys = [(result.label, result.sigma) for result in results]
        for label, sigma in keys:
            if keys.count((label, sigma)) > 1:
                raise ValueError(f"{label!r} at sigma {sigma} appears twice; give each its own label")
        return results


class Config(Section):
    """params.yaml: the settings of the whole run, and a section for each part of the pipeline."""

    profile: FileName = about("Name of the profile, which the artifacts record")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = about("Seed of all randomness")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = about("`auto`, `cpu`, `cuda` or `cuda:1`")
    threads: Count | None = about("CPU threads per process; null: one per core. The number affects rounding")
    launcher: str = about("Command that starts a training stage: `python`, or `torchrun --nproc-per-node 8`")
    plugin: str | None = about("Module of your own package that adds losses, data sets and methods; null: none")
    plugin_path: str = about("Folder or file of the package of `plugin`, which DVC watches")
    sigmas: Annotated[list[Positive], Field(min_length=1)] = about("Smoothing noise of the classifiers", "pixel units")
    methods: Annotated[list[MethodName], Field(min_length=1)] = about("Rows of the table in rrcm/methods.py")
    data: Data
    model: Model
    student: Student
    pretrain: Pretrain
    finetune: Finetune
    soft_labels: SoftLabels
    denoiser: DenoiserSettings
    denoised: Denoised
    certify: Certify
    cascade: Cascade
    latency: Latency
    attack: Attack
    report: Report
    derived: dict[str, Any]  # what follows from the others (rrcm/derived.py), for DVC

    @field_validator("sigmas", mode="before")
    @classmethod
    def sigmas_are_floats(cls, values: object) -> object:
        if isinstance(values, list) and any(isinstance(value, int) for value in values):
            raise ValueError("write whole numbers as 1.0; the text names files and stages")
        return values

    @model_validator(mode="after")
    def sections_fit(self) -> Self:
        for constraint in CONSTRAINTS:
            constraint(self)
        return self

    def initial_weights(self, method: str) -> str:
        """The initial weights of a method, as `rrcm.derived.initial_weights` names them."""
        return initial_weights(method, self.finetune.model_dump(), self.denoised.model_dump())

    def model_of(self, method: str) -> Model:
        """The network of a method. Raises ValueError for a student whose sizes do not fit together."""
        if not METHODS[method].is_student:
            return self.model
        try:
            return Model.model_validate(model_settings(method, self.model.model_dump(), self.student.model_dump()))
        except ValidationError as error:
            raise ValueError(f"student.{explain(error, Model)}") from None

    @property
    def cascade_sigmas(self) -> list[float]:
        """The sigmas of cascades, increasing."""
        return cascade_sigmas(self.cascade.sigmas, self.sigmas)

    @property
    def trains_denoiser(self) -> bool:
        """Whether a method needs a denoiser that is trained here."""
        return self.denoiser.public is None and any(METHODS[name].denoises for name in self.methods)


def parse_config(values: Mapping, source: str = "params.yaml") -> Config:
    """Validate a mapping, and the table of methods, which includes the methods of its plug-in.

    Raises `RRCMError` with one line naming the key, the value and what is allowed.
    """
    if isinstance(plugin := values.get("plugin"), str):
        use_plugin(plugin)
    check_methods()
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise RRCMError(f"{source}: {explain(error, Config)}") from None


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and validate params.yaml."""
    return parse_config(read_settings(path), str(path))


def read_settings(path: Path | str) -> Mapping:
    """Read params.yaml without validating its settings. Raises `RRCMError` if the file is no mapping."""
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
    return values
