"""The rules between sections of params.yaml. Each raises ValueError with the settings at fault and what to change.

The border: config.py has the rules within a section, and this file the rules that need several sections or the method
table. Whatever also needs the data set, the number of processes, a file, a network, or an object that a stage builds is
in training/checks.py, which runs once before training.
"""

from typing import TYPE_CHECKING

from rrcm.derived import CONDITIONED, SECTIONS, derived_settings
from rrcm.methods import METHODS, REFERENCE
from rrcm.models import DENOISING_CLASSIFIERS, NETWORKS, TRAINED_CLASSIFIERS

if TYPE_CHECKING:
    from rrcm.config import Config, Model


def entries_differ(config: "Config") -> None:
    """Methods and noise levels name files and stages."""
    for name in ("sigmas", "methods"):
        if len(set(getattr(config, name))) != len(getattr(config, name)):
            raise ValueError(f"{name} {getattr(config, name)} must not repeat an entry")


def students_fit(config: "Config") -> None:
    """The teacher of a student is a single network of the same run. A joint student needs a joint teacher."""
    students = [name for name in config.methods if METHODS[name].is_student]
    if not students:
        return
    name, teacher = config.student.teacher, METHODS[config.student.teacher]
    if teacher.denoises or teacher.is_ensemble or teacher.can_pass or teacher.is_student:
        kind = "is a student" if teacher.is_student else "can pass" if teacher.can_pass else "is several networks"
        raise ValueError(f"student.teacher {name}: {kind}; name a method with one network, such as rrcm_joint")
    if name not in config.methods:
        raise ValueError(f"student.teacher {name}: must be among methods {config.methods}, as {students[0]} needs it")
    joint = [student for student in students if METHODS[student].joint is not None]
    if joint and teacher.joint is None:
        raise ValueError(f"student.teacher {name}: must be joint, as {joint[0]} is; name one, such as {name}_joint")


def networks_of(config: "Config") -> "dict[str, Model]":
    """The networks of a run, by the section with their sizes: `model`, and `student` if a method trains a student."""
    students = [name for name in config.methods if METHODS[name].is_student]
    return {"model": config.model} | ({"student": config.model_of(students[0])} if students else {})


def patches_fill_images(config: "Config") -> None:
    """A ViT divides the image into whole patches."""
    size = config.data.image_size
    used = {name: each.patch_size for name, each in networks_of(config).items() if each.architecture == "vit"}
    if config.trains_denoiser and config.denoiser.network == "vit":
        used["denoiser"] = config.denoiser.patch_size
    for name, patch_size in used.items():
        if size % patch_size:
            raise ValueError(f"data.image_size {size} must be a multiple of {name}.patch_size {patch_size}")


def stems_fit(config: "Config") -> None:
    """Convolutions halve the image down to its tokens, in a stem or in a CNN. A ViT from timm has its own stem."""
    used = [(name, each) for name, each in networks_of(config).items() if each.architecture in CONDITIONED]
    used += [("denoiser", config.denoiser)] if config.trains_denoiser and config.denoiser.network == "vit" else []
    for name, section in used:
        try:
            section.check_stem(config.data.image_size)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    if config.model.architecture not in CONDITIONED:
        return
    starts = {METHODS[method].initial_weights: method for method in config.methods}
    if "timm" in starts and (config.model.architecture, config.model.stem) != ("vit", "patches"):
        given = "architecture cnn" if config.model.architecture == "cnn" else f"stem {config.model.stem}"
        raise ValueError(f"methods: {starts['timm']} needs a ViT with model.stem patches, not {given}; leave it out")


def initial_weights_exist(config: "Config") -> None:
    """Whatever a method starts from is pre-trained here or named in the settings."""
    for name in config.methods:
        start = METHODS[name].initial_weights
        if start == "timm" and config.finetune.timm.model is None:
            raise ValueError(f"finetune.timm.model null must be the name of a model in timm, or methods without {name}")
        if config.finetune.uses_pretraining(name) and start not in config.pretrain.objectives:
            raise ValueError(
                f"methods: {name} starts from models/pretrain/{start}; add {start} to pretrain.objectives "
                f"{config.pretrain.objectives}"
            )


def other_trunks_are_not_pretrained_here(config: "Config") -> None:
    """Only our encoders can be pre-trained here, have a learning rate for each layer, and run in chunks.

    Any other trunk starts from random weights, or from the weights that timm has for it.
    """
    others = [method for method in config.methods if config.model_of(method).architecture not in CONDITIONED]
    if not others:
        return
    for method in others:
        start, trunk = METHODS[method].initial_weights, config.model_of(method).architecture
        key = f"{'student' if METHODS[method].is_student else 'model'}.architecture"
        if start == "timm" and trunk in NETWORKS:
            raise ValueError(f"methods: {method} needs {key} vit or a timm model, not {trunk}; leave it out")
        if start not in (None, "timm") or METHODS[method].matched:
            raise ValueError(f"methods: {method} needs {key} vit or cnn, not {trunk}; leave it out")
        for sigma in config.sigmas:
            if config.finetune.settings(method, sigma).layer_decay != 1:
                raise ValueError(f"finetune.layer_decay must be 1 with {key} {trunk}")
        if key == "model.architecture" and config.pretrain.objectives:
            raise ValueError(f"pretrain.objectives must be [] with {key} {trunk}, which is not pre-trained")
        if config.finetune.num_chunks != 1:
            raise ValueError(f"finetune.num_chunks must be 1 with {key} {trunk}")
    for key in ("pixel_mean", "pixel_std"):
        values = getattr(config.model, key)
        if values is not None and len(values) != config.data.channels:
            raise ValueError(f"model.{key} {values} must have data.channels {config.data.channels} values")


def every_training_has_settings(config: "Config") -> None:
    """A setting may be a mapping. It must then have a value for each training, and the values must fit together."""
    by_passes = config.finetune.equal_passes or any(METHODS[name].matched for name in config.methods)
    for method in [*config.methods, *([REFERENCE] if by_passes else [])]:
        for sigma in config.sigmas:
            config.finetune.settings(method, sigma)


def soft_labels_are_available(config: "Config") -> None:
    """The classifier that votes for soft labels is trained in the same run."""
    source = config.soft_labels
    for name in config.methods:
        if METHODS[name].needs_soft_labels and not (source.method in config.methods and source.sigma in config.sigmas):
            raise ValueError(
                f"soft_labels: {name} needs the votes of {source.method} at sigma {source.sigma}; add these to "
                "methods and sigmas, or change soft_labels"
            )
    if METHODS[source.method].joint is not None:
        raise ValueError(f"soft_labels.method {source.method} is joint; name the method of an expert")
    if METHODS[source.method].needs_soft_labels:
        raise ValueError(f"soft_labels.method {source.method} needs soft labels itself; choose another")


def denoising_methods_fit(config: "Config") -> None:
    """Settings of methods that denoise concern no other methods, and some settings do not concern them."""
    for name in config.methods:
        if not METHODS[name].denoises or METHODS[name].objective is None:
            continue
        if config.finetune.equal_passes:
            raise ValueError(f"finetune.equal_passes true has no meaning for {name}; leave it out, or set it to false")
        if config.denoised.model is not None:
            raise ValueError(
                f"denoised.model {config.denoised.model}: {name} fine-tunes a classifier that is trained here; leave "
                "it out, or set denoised.model to null"
            )
    for name in config.denoised.max_images:
        if not METHODS[name].denoises:
            raise ValueError(f"denoised.max_images.{name}: does not denoise; set certify.max_images for all")


def compiled_classifiers_are_deterministic(config: "Config") -> None:
    """A compiled network cannot draw noise of its own."""
    if not config.certify.compile:
        return
    classifiers = TRAINED_CLASSIFIERS | DENOISING_CLASSIFIERS
    for name in config.methods:
        if getattr(classifiers.get(METHODS[name].classifier), "stochastic", False):
            raise ValueError(f"certify.compile = True: {name} is stochastic and cannot be compiled; set it to false")


def one_compiler(config: "Config") -> None:
    """OpenVINO compiles the network itself."""
    if config.certify.compile and config.certify.runtime != "torch":
        raise ValueError(f"certify.compile = True: is for torch, not for {config.certify.runtime}; set it to false")


def int8_is_for_openvino(config: "Config") -> None:
    """Torch has no networks in int8."""
    if config.certify.precision == "int8" and config.certify.runtime != "openvino":
        raise ValueError("certify.precision int8: is for certify.runtime openvino; set this too, or another precision")


def radii_are_certified(config: "Config") -> None:
    """The sequential procedure certifies radii on a grid, so the report can only show radii on that grid."""
    step = config.certify.radius_step
    off_grid = [radius for radius in config.report.radii if abs(radius / step - round(radius / step)) > 1e-9]
    if config.certify.stopping == "sequential" and off_grid:
        raise ValueError(
            f"report.radii {off_grid[0]} must be a multiple of certify.radius_step {step}, or certify.stopping fixed"
        )


def attacked_methods_can_be_attacked(config: "Config") -> None:
    """The attack needs the certificates of a method and the gradient of its classifier."""
    attacked = config.attack.methods
    if len(set(attacked)) != len(attacked) or not set(attacked) <= set(config.methods):
        raise ValueError(f"attack.methods {attacked} must be among methods {config.methods}, each at most once")
    for name in attacked:
        if METHODS[name].classifier == "densepure":
            raise ValueError(f"attack.methods: {name} votes, which has no gradient to follow; leave it out")


def cascades_fit(config: "Config") -> None:
    """A cascade consists of base classifiers that are trained here, at two sigmas or more."""
    methods, sigmas, thresholds = config.cascade.methods, config.cascade_sigmas, config.cascade.thresholds
    if len(set(methods)) != len(methods) or not set(methods) <= set(config.methods):
        raise ValueError(f"cascade.methods {methods} must be among methods {config.methods}, each at most once")
    if not methods:
        return
    if len(set(sigmas)) != len(sigmas) or not set(sigmas) <= set(config.sigmas):
        raise ValueError(f"cascade.sigmas {sigmas} must be among sigmas {config.sigmas}, each at most once")
    if len(sigmas) < 2:
        raise ValueError(f"cascade.methods {methods}: a cascade needs two sigmas or more; add one to sigmas {sigmas}")
    if thresholds != "chosen" and len(thresholds) != len(sigmas) - 1:
        raise ValueError(
            f"cascade.thresholds {thresholds} must be {len(sigmas) - 1}, one for each of the sigmas {sigmas} but the "
            "smallest, or chosen"
        )


def joint_trainings_fit(config: "Config") -> None:
    """A joint training covers all sigmas. Only objectives have settings of their own for each image."""
    joint = [name for name in config.methods if METHODS[name].joint is not None]
    interval, time_condition = config.finetune.joint_interval, config.finetune.time_condition
    low, high = interval or (min(config.sigmas), max(config.sigmas))
    if low > high or (joint and not low <= min(config.sigmas) <= max(config.sigmas) <= high):
        raise ValueError(f"finetune.joint_interval {interval} must increase and include sigmas {config.sigmas}")
    for name in joint:
        if METHODS[name].pretrained_here and time_condition != "exact":
            raise ValueError(f"finetune.time_condition {time_condition} must be exact for {name}, where t = 2 sigma")
        each = [config.finetune.settings(name, sigma).model_dump(exclude={"objectives"}) for sigma in config.sigmas]
        for setting, value in each[0].items():
            if any(other[setting] != value for other in each):
                values = ", ".join(
                    f"{other[setting]} at sigma {s:g}" for other, s in zip(each, config.sigmas, strict=True)
                )
                raise ValueError(
                    f"finetune.{setting}: is {values}; {name} needs one value for all: give it the key joint"
                )


def derived_settings_are_current(config: "Config") -> None:
    """DVC watches what follows from the other settings, so an edit of params.yaml by hand must not leave it behind."""
    values = config.model_dump(mode="json", include=set(SECTIONS))
    if config.derived != derived_settings(values):
        raise ValueError("derived: does not fit the other settings; run `make params`, or change them with -S")


CONSTRAINTS = (  # in the order of the sections that they concern; the first that fails is reported
    entries_differ,
    students_fit,
    other_trunks_are_not_pretrained_here,
    initial_weights_exist,
    attacked_methods_can_be_attacked,
    cascades_fit,
    denoising_methods_fit,
    soft_labels_are_available,
    every_training_has_settings,
    patches_fill_images,
    stems_fit,
    compiled_classifiers_are_deterministic,
    one_compiler,
    int8_is_for_openvino,
    radii_are_certified,
    joint_trainings_fit,
    derived_settings_are_current,
)
