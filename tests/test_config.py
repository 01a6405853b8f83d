"""params.yaml: every profile composes, validates and builds; everything else is refused in one line."""

import filecmp

import pytest
import torch
from conftest import REPOSITORY, change, compose, composed, stage

from rrcm.config import load_config
from rrcm.methods import METHODS, REFERENCE, expert_of
from rrcm.models.encoders import build_encoder
from rrcm.models.vit import EncoderWithProjector, parameter_count
from rrcm.utils.errors import RRCMError

PROFILES = sorted(path.stem for path in (REPOSITORY / "conf/profile").glob("*.yaml"))
OTHER_TRUNKS = {"fashion_mnist_lenet", "cifar10_resnet110"}  # which are not pre-trained


def profile(tmp_path, name, *overrides):
    (tmp_path / "params.yaml").write_text(composed(f"profile={name}", *overrides))
    return load_config(tmp_path / "params.yaml")


def test_there_are_these_profiles():
    small = {"digits", "fashion_mnist", "cifar10", "kather", "kather_28", "imagefolder"}
    assert set(PROFILES) >= small | OTHER_TRUNKS | {"imagenet_b", "imagenet_s", "imagenet_b_deep"}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_compose_validate_and_build(tmp_path, name):
    config = profile(tmp_path, name)
    assert config.profile == name
    with torch.device("meta"):
        encoder = build_encoder(config.model, config.data)
        network = EncoderWithProjector(encoder, config.model.projector_hidden_dim, config.model.projection_dim)
        size, channels = config.data.image_size, config.data.channels
        (representation,) = network([torch.empty(2, channels, size, size)], [1.0], num_projected=0)
    assert representation.shape == (2, config.model.embed_dim)
    for method in config.methods:
        for sigma in config.sigmas:
            assert config.finetune.settings(method, sigma).epochs > 0


@pytest.mark.parametrize(("name", "millions"), [("imagenet_s", 19.4), ("imagenet_b", 85.8), ("cifar10", 85.1)])
def test_networks_have_the_stated_size(tmp_path, name, millions):
    config = profile(tmp_path, name)
    with torch.device("meta"):
        encoder = build_encoder(config.model, config.data)
    assert parameter_count(encoder) / 1e6 == pytest.approx(millions, abs=0.3)


def test_profiles_have_the_papers_settings(tmp_path):
    cifar10, imagenet = profile(tmp_path, "cifar10"), profile(tmp_path, "imagenet_b")
    small, deep = profile(tmp_path, "imagenet_s"), profile(tmp_path, "imagenet_b_deep")
    names = ["batch_size", "steps", "warmup_steps", "lr", "weight_decay", "temperature"]
    names += ["teacher_decay_steepness", "ema_decay"]
    for config, row in (
        (cifar10, (2048, 300_000, 10_000, 1e-4, 0, 0.2, 15, 0.9999)),
        (imagenet, (4096, 600_000, 15_000, 2e-4, 0.03, 0.2, 10, 0.99)),
        (small, (4096, 600_000, 10_000, 1e-4, 0.01, 0.2, 10, 0.99)),
    ):
        assert tuple(getattr(config.pretrain, name) for name in names) == row
        assert (config.pretrain.min_levels, config.pretrain.max_levels, config.pretrain.grad_clip_norm) == (20, 80, 2.0)
        assert (config.pretrain.teacher_decay_start, config.pretrain.teacher_decay_end) == (0.99, 0.9999)
    assert (deep.model.depth, deep.model.embed_dim) == (24, 768)
    for config in (cifar10, imagenet, small, deep):
        assert (config.certify.n0, config.certify.n, config.certify.alpha) == (100, 100_000, 0.001)
    assert (cifar10.certify.every, imagenet.certify.every) == (20, 100)


COLUMNS = ["epochs", "warmup_epochs", "batch_size", "lr", "layer_decay", "augmentation", "mixup", "cutmix"]
COLUMNS += ["label_smoothing", "consistency_weight"]


@pytest.mark.parametrize(
    ("name", "method", "sigma", "row"),
    [
        ("digits", "rrcm", 0.5, (10, 2, 128, 5e-3, 0.9, "none", 0, 0, 0, 10)),
        ("digits", "gaussian_matched", 1.0, (10, 2, 128, 1e-2, 1.0, "none", 0, 0, 0, 10)),
        ("fashion_mnist", "rrcm", 0.25, (10, 1, 256, 2e-3, 0.975, "none", 0, 0, 0, 10)),
        ("cifar10", "rrcm", 0.25, (100, 10, 1024, 2e-4, 0.75, "none", 0, 0, 0, 10)),
        ("cifar10", "rrcm", 0.5, (100, 10, 1024, 2e-4, 0.75, "none", 0, 0, 0, 20)),
        ("cifar10", "rrcm", 1.0, (100, 10, 1024, 2e-4, 0.65, "none", 0, 0, 0, 20)),
        ("cifar10", "consistency", 1.0, (100, 10, 1024, 2e-4, 1.0, "none", 0, 0, 0, 20)),
        ("imagenet_b", "rrcm", 0.25, (150, 5, 1024, 2e-4, 0.65, "randaugment", 0.8, 1.0, 0.1, 10)),
        ("imagenet_b", "rrcm", 0.5, (50, 5, 2048, 2e-4, 0.65, "crop_flip", 0.8, 1.0, 0, 20)),
        ("imagenet_b", "rrcm", 1.0, (150, 5, 256, 1e-4, 0.65, "flip", 0.8, 1.0, 0, 20)),
        ("imagenet_b", "gaussian", 0.5, (50, 5, 2048, 2e-4, 1.0, "crop_flip", 0.8, 1.0, 0, 20)),
        ("imagenet_b", "rrcm", 0.12, (150, 5, 1024, 2e-4, 0.65, "none", 0.8, 1.0, 0, 20)),
        ("kather", "timm", 0.25, (150, 5, 1024, 2e-4, 0.65, "randaugment", 0.8, 1.0, 0.1, 10)),
        ("imagenet_b_deep", "consistency", 1.0, (150, 5, 256, 1e-4, 1.0, "flip", 0.8, 1.0, 0, 20)),
        ("imagefolder", "rrcm_joint", 0.5, (30, 3, 32, 8e-3, 0.925, "none", 0, 0, 0, 10)),
    ],
)
def test_settings_of_each_training(tmp_path, name, method, sigma, row):
    """Those of cifar10 and imagenet_b are the paper's. At 0.12 no setting is given for that sigma alone."""
    settings = profile(tmp_path, name).finetune.settings(method, sigma)
    values = settings.model_dump() | settings.objectives.consistency.model_dump()
    assert tuple(values[column] for column in COLUMNS) == row
    assert (settings.num_noise, settings.weight_decay, values["entropy_weight"]) == (2, 0, 0.5)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 20), (3, 100), (30, 3000), (100, 300_000)])
def test_the_profile_of_own_images_follows_the_budget_and_fits_small_folders(tmp_path, epochs, steps):
    """Of 60 images, 43 are for training."""
    config = profile(tmp_path, "imagefolder", f"finetune.epochs={epochs}", f"pretrain.steps={steps}")
    settings = config.finetune.settings("consistency_joint", 0.5)
    assert settings.warmup_epochs == pytest.approx(epochs / 10) and settings.batch_size <= 43
    assert config.pretrain.warmup_steps == steps / 20 and config.pretrain.batch_size <= 43
    assert 0.75 <= config.finetune.settings("rrcm_joint", 0.5).layer_decay < 1
    assert config.pretrain.max_levels == min(80, max(4, round(4 * (steps / 750) ** 0.5)))


@pytest.mark.slow
def test_params_yaml_is_the_composed_default(tmp_path):
    answer = stage(tmp_path, "compose", "--output", "params.yaml")
    assert answer.returncode == 0, answer.stderr
    assert filecmp.cmp(tmp_path / "params.yaml", REPOSITORY / "params.yaml", shallow=False), "run `make params`"


PRESETS = sorted(path.stem for path in (REPOSITORY / "conf/preset").glob("*.yaml"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(PROFILES) - OTHER_TRUNKS))
def test_presets_compose_with_every_profile(tmp_path, name):
    plain = profile(tmp_path, name)
    assert profile(tmp_path, name, "preset=default") == plain and plain.report.name == name
    for preset in PRESETS:
        config = profile(tmp_path, name, f"preset={preset}")
        assert config.report.name == (name if preset == "default" else f"{name}_{preset}")
        same = {"profile", "seed", "sigmas", "data", "model", "certify", "latency"}
        same -= {"certify"} if preset == "flagship" else set()  # it certifies as published certificates do
        assert config.model_dump(include=same) == plain.model_dump(include=same)
    equal_passes = profile(tmp_path, name, "preset=all").finetune
    assert equal_passes.equal_passes is True
    for method in ("gaussian", "stability"):
        assert equal_passes.settings(method, 0.5).of_objective(method)["num_noise"] == 1
    own = {"gaussian", "stability"}
    assert equal_passes.objectives.model_dump(exclude=own) == plain.finetune.objectives.model_dump(exclude=own)
    alone = {"equal_passes": False, "objectives": plain.finetune.objectives}
    assert equal_passes.model_copy(update=alone) == plain.finetune


FROM_SCRATCH = ("gaussian", "stability", "consistency", "macer", "smoothadv", "smoothmix", "cat_rs")


@pytest.mark.parametrize("method", FROM_SCRATCH)
def test_published_recipes_have_the_papers_settings(tmp_path, method):
    """Though one inherits from `fashion_mnist`, whose settings are for short trainings."""
    lenet, resnet = (profile(tmp_path, name) for name in ("fashion_mnist_lenet", "cifar10_resnet110"))
    assert lenet.soft_labels == resnet.soft_labels
    for sigma in lenet.sigmas:
        ours, papers = (config.finetune.settings(method, sigma) for config in (lenet, resnet))
        own = {"macer": {"deferred_epochs"}, "consistency": {"consistency_weight"}, "smoothadv": {"attack_radius"}}
        assert ours.objectives.model_dump(exclude=own) == papers.objectives.model_dump(exclude=own)
        split = method in ("consistency", "smoothadv", "smoothmix", "cat_rs")
        assert ours.steps_per_batch == papers.steps_per_batch == ("num_noise" if split else 1)
        assert ours.epochs <= lenet.finetune.evaluate_every  # only the last weights are evaluated, and kept
        assert papers.epochs <= resnet.finetune.evaluate_every


def test_published_recipes_follow_the_authors_files(tmp_path):
    """Their commands, and for Fashion-MNIST the lambda, the deferral and the epochs that their logs show."""
    lenet = profile(tmp_path, "fashion_mnist_lenet").finetune
    rows = {
        name: [lenet.settings(name, sigma).of_objective(name) for sigma in (0.25, 0.5, 1.0)] for name in FROM_SCRATCH
    }

    def column(name, key):
        return [row[key] for row in rows[name]]

    assert column("smoothadv", "num_noise") == [4, 8, 2] and column("smoothadv", "attack_radius") == [1, 1, 1]
    assert column("consistency", "consistency_weight") == [10, 5, 5]
    assert column("macer", "radius_weight") == [12, 6, 12] and column("macer", "deferred_epochs") == [31, 31, 31]
    assert column("stability", "num_noise") == [1, 1, 1] and column("stability", "stability_weight") == [2, 2, 1]
    assert column("cat_rs", "epochs") == [150] * 3 and column("cat_rs", "lr_step_epochs") == [50] * 3
    assert column("gaussian", "epochs") == [90] * 3 and column("gaussian", "lr_step_epochs") == [30] * 3


@pytest.mark.parametrize("name", sorted(OTHER_TRUNKS))
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"default"}))
def test_presets_with_pretraining_need_our_trunk(tmp_path, name, preset):
    with pytest.raises(RRCMError, match=r"methods: rrcm(_joint)? needs model\.architecture vit"):
        profile(tmp_path, name, f"preset={preset}")


def test_presets_hold_every_method(tmp_path):
    """Except `timm`, which needs a network of timm. Of joint methods, some presets have some.

    `all` has each method from scratch and its matched form.
    """
    presets = {name: profile(tmp_path, "digits", f"preset={name}") for name in PRESETS}
    assert set(PRESETS) >= {"default", "all", "equal_compute", "pretraining", "ablation", "denoised", "joint"}
    experts = {name: kind for name, kind in METHODS.items() if kind.joint is None}
    held = set().union(*(config.methods for config in presets.values()))
    assert {expert_of(name) for name in held} == experts.keys() - {"timm"}
    assert {"rrcm_joint", "rrcm_joint_third"} <= held
    scratch = {name for name, kind in experts.items() if kind.initial_weights is None and not kind.is_student}
    assert scratch <= set(presets["all"].methods)
    for name, config in presets.items():
        assert config.methods[0] == ("rrcm_joint" if name in ("flagship", "student") else REFERENCE)
        kinds = [METHODS[method] for method in config.methods]
        started_from = {kind.initial_weights for kind in kinds if kind.pretrained_here}
        assert started_from == set(config.pretrain.objectives), name


@pytest.mark.parametrize(
    ("methods", "expected"), [("macer,dds", []), ("gaussian,dmae,rrcm,rrcm_joint", ["dmae", "rrcm"])]
)
def test_what_methods_start_from_is_pretrained_and_nothing_else(tmp_path, methods, expected):
    assert profile(tmp_path, "digits", f"methods=[{methods}]").pretrain.objectives == expected


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["methods=[rrcm,gaussian]"], ["preset=all", "methods=[rrcm,gaussian]"]])
def test_a_list_of_methods_beats_the_preset(tmp_path, overrides):
    answer = stage(tmp_path, "compose", "--output", "params.yaml", *overrides)
    assert answer.returncode == 0, answer.stderr
    assert load_config(tmp_path / "params.yaml").methods == ["rrcm", "gaussian"]


def chosen(config, name):
    """The value of a setting, or of one of the objective `consistency`, by method and sigma."""
    found = {}
    for method in config.methods:
        for sigma in config.sigmas:
            settings = config.finetune.settings(method, sigma)
            found[method, sigma] = getattr(settings.objectives.consistency, name, getattr(settings, name, None))
    return found


LR = "finetune.lr={default: 1.0e-3, sigma_0.5: 2.0e-3, scratch: 3.0e-3}"


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),  # expected of rrcm at 0.25 and 0.5, and of gaussian_matched at 0.25 and 0.5
    [
        ([], "layer_decay", (0.9, 0.9, 1.0, 1.0)),
        ([LR], "lr", (1e-3, 2e-3, 3e-3, 3e-3)),  # scratch comes before the sigma, and the sigma before default
        ([LR, "finetune.lr=7e-3"], "lr", (7e-3, 7e-3, 7e-3, 7e-3)),  # one value is for every sigma and every start
        ([LR, "finetune.lr.default=7e-3"], "lr", (7e-3, 2e-3, 3e-3, 3e-3)),
        ([LR, "finetune.lr={sigma_0.5: 7e-3}"], "lr", (1e-3, 7e-3, 3e-3, 3e-3)),
        ([LR, "+finetune.lr={sigma_0.25: 7e-3}"], "lr", (7e-3, 2e-3, 3e-3, 3e-3)),
        (["finetune.layer_decay=0.8"], "layer_decay", (0.8, 0.8, 0.8, 0.8)),
        (
            ["finetune.objectives.consistency.consistency_weight={sigma_0.25: 5, default: 6}"],
            "consistency_weight",
            (5.0, 6.0, 5.0, 6.0),
        ),
        (["finetune.lr={sigma_0.25: 1e-3, sigma_0.5: 2e-3, sigma_9.0: 1.0}"], "lr", (1e-3, 2e-3, 1e-3, 2e-3)),
    ],
)
def test_a_setting_is_one_value_or_one_for_each_noise_and_start(tmp_path, overrides, name, expected):
    config = load_config(compose(tmp_path / "params.yaml", *overrides))
    assert tuple(chosen(config, name).values()) == expected


def test_an_override_beats_the_profile(tmp_path):
    """The batch of imagenet_b at sigma 0.5 is 2,048."""
    assert set(chosen(profile(tmp_path, "imagenet_b"), "batch_size").values()) == {1024, 2048, 256}
    config = profile(tmp_path, "imagenet_b", "finetune.batch_size=32", "finetune.epochs.default=9")
    assert set(chosen(config, "batch_size").values()) == {32}
    assert set(chosen(config, "epochs").values()) == {9, 50}


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({"sigmas": [0.0]}, "sigmas.0 = 0.0: should be greater than 0"),
        ({"sigmas": [-0.5]}, "sigmas.0 = -0.5: should be greater than 0"),
        ({"sigmas": []}, "sigmas = []"),
        ({"sigmas": [0.5, 0.5]}, "must not repeat"),
        ({"sigmas": [1]}, "write whole numbers as 1.0"),
        ({"methods": ["rcm"]}, "methods.0 = 'rcm'"),
        ({"certify__radius_step": 0.0}, "certify.radius_step = 0.0: should be greater than 0"),
        ({"certify__stopping": "quick"}, "certify.stopping = 'quick'"),
        ({"report__radii": [0.0, 0.333]}, "report.radii 0.333 must be a multiple of certify.radius_step"),
        ({"certify__alpha": 1.0}, "certify.alpha = 1.0: should be less than or equal to 0.5"),
        ({"certify__nn": 3}, "certify.nn: unknown key; did you mean n?"),
        ({"nonsense": 3}, "nonsense: unknown key; allowed here: profile, seed"),
        ({"pretrain__lr": "fast"}, "pretrain.lr = 'fast': should be a valid number"),
        ({"pretrain__lr": float("nan")}, "pretrain.lr = nan: should be a finite number"),
        ({"pretrain__lr": {"dmae": 1e-3}}, "pretrain: lr {'dmae': 0.001} must have a value for default"),
        ({"pretrain__temperature": {"default": 0}}, "pretrain.temperature.default = 0: should be greater than 0"),
        ({"pretrain__equal_passes": "passes"}, "pretrain.equal_passes = 'passes': should be a valid boolean"),
        ({"pretrain__dmae__mask_ratio": 1}, "pretrain.dmae.mask_ratio = 1: should be less than 1"),
        ({"pretrain__dmae__sigma": -0.1}, "pretrain.dmae.sigma = -0.1: should be greater than or equal to 0"),
        ({"pretrain__dmae__decoder_depth": 0}, "pretrain.dmae.decoder_depth = 0: should be greater than or equal to 1"),
        (
            {"pretrain__dmae__decoder_num_heads": 5},
            "pretrain.dmae: decoder_embed_dim 72 must be even and a multiple of decoder_num_heads 5",
        ),
        ({"pretrain__dmae__ratio": 1}, "pretrain.dmae.ratio: unknown key; did you mean mask_ratio?"),
        ({"pretrain__warmup_steps": 30}, "warmup_steps 30 must be below steps 30"),
        ({"model__num_heads": 5}, "embed_dim 32 must be even and a multiple of num_heads 5"),
        ({"model__patch_size": 3}, "data.image_size 8 must be a multiple of model.patch_size 3"),
        ({"finetune__lrr": 1e-3}, "finetune.lrr: unknown key; did you mean lr?"),
        ({"finetune__sigma_overrides": []}, "finetune.sigma_overrides: unknown key; allowed here: epochs"),
        ({"finetune__lr": {}}, "finetune.lr: has no value for sigma_0.25; add sigma_0.25 or default"),
        ({"finetune__lr": {"scratch": 1.0}}, "finetune.lr: has no value for sigma_0.25; add sigma_0.25 or default"),
        ({"finetune__lr": {"sigma_0.25": 1.0}}, "finetune.lr: has no value for sigma_0.5; add sigma_0.5 or default"),
        ({"finetune__lr": {"defualt": 1.0}}, "finetune.lr.defualt: unknown key; did you mean default?"),
        ({"finetune__lr": {0.5: 1.0, "default": 1.0}}, "finetune.lr.0.5: unknown key; did you mean sigma_0.5?"),
        ({"finetune__lr": {"sigma_1": 1.0}}, "finetune.lr.sigma_1: unknown key; did you mean sigma_1.0?"),
        (
            {"finetune__lr": {"rrcm": 1.0}},
            "finetune.lr.rrcm: unknown key; allowed here: default, joint, scratch, gaussian, ",
        ),
        ({"finetune__lr": {"default": 1.0, "sigma_9.0": 0}}, "finetune.lr.sigma_9.0 = 0: should be greater than 0"),
        ({"finetune__lr": {"default": "fast"}}, "finetune.lr.default = 'fast': should be a valid number"),
        ({"finetune__lr": {"default": float("inf")}}, "finetune.lr.default = inf: should be a finite number"),
        ({"finetune__lr": {"default": {"scratch": 1.0}}}, "finetune.lr.default: should be a valid number"),
        (
            {"finetune__objectives__consistency__entropy_weight": {"default": 1.0, "scratch": -1}},
            "finetune.objectives.consistency.entropy_weight.scratch = -1: should be greater than or equal to 0",
        ),
        ({"finetune__objectives__consistncy": {}}, "finetune.objectives.consistncy: unknown key; did you mean"),
        ({"finetune__epochs": {"default": 1, "sigma_0.5": 0, "scratch": 0}}, "finetune.epochs.scratch = 0: should"),
        ({"finetune__warmup_epochs": 6}, "finetune: warmup_epochs 6 of consistency must be below epochs 6"),
        (
            {"methods": ["macer"], "finetune__objectives__macer__deferred_epochs": 6},
            "finetune: deferred_epochs 6 of macer must be below epochs 6",
        ),
        (
            {"methods": ["smoothadv"], "finetune__objectives__smoothadv__attack_warmup_epochs": 7},
            "finetune: attack_warmup_epochs 7 of smoothadv must be at most epochs 6",
        ),
        (
            {
                "methods": ["smoothmix"],
                "finetune__objectives__smoothmix__mix_warmup_epochs": {"sigma_0.5": 7, "default": 1},
            },
            "finetune: mix_warmup_epochs 7 of smoothmix must be at most epochs 6",
        ),
        ({"finetune__steps_per_batch": 2}, "finetune.steps_per_batch = 2: should be 1 or 'num_noise'"),
        (
            {"finetune__steps_per_batch": "num_noise", "finetune__num_noise": 3},
            "finetune.batch_size 128 must be a multiple of num_noise 3 of consistency, as finetune.steps_per_batch",
        ),
        (
            {"finetune__objectives__cat_rs__confidence": "predictions"},
            "confidence predictions with num_noise 1 must be null, as its one copy always counts",
        ),
        (
            {"finetune__objectives__cat_rs__num_noise": 4},
            "confidence None with num_noise 4 must be predictions or soft_label",
        ),
        ({"profile": "../etc"}, "profile = '../etc'"),
        ({"report__name": "../etc"}, "report.name = '../etc'"),
        ({"finetune__equal_passes": "epochs"}, "finetune.equal_passes = 'epochs': should be a valid boolean"),
        (
            {"methods": ["gaussian_matched"], "finetune__lr": {"scratch": 1.0}},  # the passes are rrcm's
            "finetune.lr: has no value for sigma_0.25; add sigma_0.25 or default",
        ),
        ({"finetune__objectives__cat_rs__num_noise": 0}, "cat_rs.num_noise = 0: should be greater than or equal to 1"),
        ({"finetune__objectives__cat_rs__attack_radius": -1.0}, "cat_rs.attack_radius = -1.0: should be greater than"),
        ({"finetune__objectives__cat_rs__attack_steps": 0}, "cat_rs.attack_steps = 0: should be greater than or equal"),
        ({"finetune__objectives__cat_rs__worst_case_weight": -0.1}, "cat_rs.worst_case_weight = -0.1: should be gr"),
        ({"finetune__objectives__cat_rs__confidence": "high"}, "cat_rs.confidence = 'high': should be 'predictions'"),
        ({"finetune__ensemble_members": 1}, "finetune.ensemble_members = 1: should be greater than or equal to 2"),
        ({"soft_labels__n": 0}, "soft_labels.n = 0: should be greater than or equal to 1"),
        ({"soft_labels__method": "gausian"}, "soft_labels.method = 'gausian': no such method; did you mean gaussian?"),
        ({"soft_labels__method": "cat_rs"}, "soft_labels.method cat_rs needs soft labels itself; choose another"),
        (
            {"methods": ["cat_rs"]},
            "soft_labels: cat_rs needs the votes of gaussian at sigma 0.25; add these to methods",
        ),
        ({"methods": ["cat_rs", "gaussian"], "sigmas": [0.5]}, "soft_labels: cat_rs needs the votes of gaussian at"),
        ({"denoiser__warmup_steps": 800}, "denoiser: warmup_steps 800 must be below steps 800"),
        ({"denoiser__num_heads": 5}, "denoiser: embed_dim 32 must be even and a multiple of num_heads 5"),
        ({"denoiser__noise_std": 0}, "denoiser.noise_std = 0: should be greater than 0"),
        ({"methods": ["dds"], "denoiser__patch_size": 3}, "must be a multiple of denoiser.patch_size 3"),
        ({"denoised__densepure__runs": 0}, "denoised.densepure.runs = 0: should be greater than or equal to 1"),
        ({"denoised__diffsmooth__local_sigma": -1}, "denoised.diffsmooth.local_sigma = -1: should be greater than"),
        ({"denoised__max_images": {"gaussian": 5}}, "denoised.max_images.gaussian: does not denoise"),
        ({"cascade__methods": ["macer"]}, "cascade.methods ['macer'] must be among methods ['rrcm',"),
        ({"cascade__methods": ["rrcm", "rrcm"]}, "cascade.methods ['rrcm', 'rrcm'] must be among methods"),
        ({"cascade__methods": ["nope"]}, "cascade.methods.0 = 'nope': no such method"),
        (
            {"cascade__methods": ["rrcm"], "sigmas": [0.5]},
            "a cascade needs two sigmas or more; add one to",
        ),
        (
            {"cascade__methods": ["rrcm"], "cascade__sigmas": [0.25, 1.0]},
            "cascade.sigmas [0.25, 1.0] must be among sigmas [0.25, 0.5], each at most once",
        ),
        ({"cascade__methods": ["rrcm"], "cascade__sigmas": [0.5, 0.5]}, "cascade.sigmas [0.5, 0.5] must be among"),
        ({"cascade__sigmas": [0.25]}, "cascade.sigmas = [0.25]: List should have at least 2 items"),
        (
            {"cascade__methods": ["rrcm"], "cascade__thresholds": [0.0, 0.1]},
            "cascade.thresholds [0.0, 0.1] must be 1,",
        ),
        ({"cascade__thresholds": "best"}, "cascade.thresholds = 'best': must be chosen, or a list of numbers"),
        ({"cascade__thresholds": [".nan"]}, "cascade.thresholds.0 = '.nan': should be a valid number"),
        (
            {"cascade__choose_by": "radius"},
            "cascade.choose_by = 'radius': must be acr, or a mapping from radii",
        ),
        ({"cascade__choose_by": {"x": 1.0}}, "cascade.choose_by.x.[key] = 'x': should be a valid number"),
        ({"cascade__choose_by": {0.5: 0.0}}, "cascade.choose_by.0.5 = 0.0: should be greater than 0"),
        ({"cascade__choose_by": {}}, "cascade.choose_by: Dictionary should have at least 1 item"),
        ({"cascade__choose_n": 0}, "cascade.choose_n = 0: should be greater than or equal to 1"),
        ({"methods": ["densepure"], "attack__methods": ["densepure"]}, "attack.methods: densepure votes, which has no"),
        ({"methods": ["dds_finetuned"], "denoised__model": "vit"}, "denoised.model vit: dds_finetuned fine-tunes a"),
        (
            {"methods": ["dds_finetuned"], "finetune__equal_passes": True},
            "finetune.equal_passes true has no meaning for dds",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(project, change_of, said):
    change(project, **change_of)
    with pytest.raises(RRCMError) as caught:
        load_config(project / "params.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(RRCMError, match="no such file"):
        load_config(tmp_path / "params.yaml")
    for content in (b"a: [", "a: é".encode("latin-1"), b"\xff\xfea", b"a: \x00"):
        (tmp_path / "params.yaml").write_bytes(content)
        with pytest.raises(RRCMError, match="cannot be read as YAML"):
            load_config(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("[]")
    with pytest.raises(RRCMError, match="must be a mapping"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.slow
def test_the_settings_page_and_the_settings_of_own_images_are_up_to_date(tmp_path):
    written = {"settings.md": "docs/settings.md", "settings.yaml": "rrcm/own_images/settings.yaml"}
    answer = stage(tmp_path, "settings", "--output", "settings.md", "--own-images", "settings.yaml")
    assert answer.returncode == 0, answer.stderr
    for name, kept in written.items():
        assert filecmp.cmp(tmp_path / name, REPOSITORY / kept, shallow=False), (
            f"{kept}: run `python stages/settings.py`"
        )


JOINT = {"methods": ["rrcm_joint", "gaussian"]}


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({"methods": ["dds_joint"]}, "dds has no joint form, as its denoiser takes every sigma; name dds itself"),
        (
            {"methods": ["rrcm_ensemble_joint_pass"]},
            "rrcm_ensemble has no form that can pass, as it is an ensemble; name rrcm_ensemble_joint",
        ),
        ({"methods": ["cat_rs_joint_pass"]}, "soft_labels: cat_rs_joint_pass needs the votes of gaussian at sigma"),
        ({"methods": ["dds_joint_pass"]}, "dds has no joint form, as its denoiser takes every sigma; name dds itself"),
        (JOINT | {"finetune__pass_share": 0.0}, "finetune.pass_share = 0.0: should be greater than 0"),
        ({"methods": ["rrcm_joit"]}, "no such method; did you mean rrcm_joint?"),
        (JOINT | {"finetune__joint_interval": [1.0, 0.1]}, "finetune.joint_interval [1.0, 0.1] must increase and"),
        (JOINT | {"finetune__joint_interval": [0.3, 1.0]}, "include sigmas [0.25, 0.5]"),
        (JOINT | {"finetune__joint_interval": [0.3]}, "finetune.joint_interval = [0.3]: List should have at least 2"),
        (
            JOINT | {"finetune__time_condition": "nearest_level"},
            "finetune.time_condition nearest_level must be exact for rrcm_joint, where t = 2 sigma",
        ),
        (
            JOINT | {"finetune__lr": {"default": 1e-3, "sigma_0.5": 2e-3}},
            "finetune.lr: is 0.001 at sigma 0.25, 0.002 at sigma 0.5; rrcm_joint needs one value for all: give it the "
            "key joint",
        ),
        (
            {"methods": ["gaussian_joint", "cat_rs"], "soft_labels__method": "gaussian_joint"},
            "soft_labels.method gaussian_joint is joint; name the method of an expert",
        ),
    ],
)
def test_what_a_joint_training_cannot_do_is_refused_in_one_line(project, change_of, said):
    change(project, **change_of)
    with pytest.raises(RRCMError) as caught:
        load_config(project / "params.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_key_joint_gives_a_joint_training_values_of_its_own(project):
    change(project, **JOINT, finetune__lr={"default": 1e-3, "sigma_0.5": 2e-3, "joint": 3e-3})
    finetune = load_config(project / "params.yaml").finetune
    assert [finetune.settings("rrcm_joint", sigma).lr for sigma in (0.25, 0.5)] == [3e-3, 3e-3]
    assert [finetune.settings("rrcm", sigma).lr for sigma in (0.25, 0.5)] == [1e-3, 2e-3]
