"""params.yaml: every profile composes, validates and builds; everything else is refused in one line."""

import filecmp

import pytest
import torch
from conftest import REPOSITORY, change, compose, stage
from dvc.utils.hydra import compose_and_dump

from rrcm.config import load_config
from rrcm.models.vit import EncoderWithProjector, build_encoder, parameter_count
from rrcm.utils.errors import RRCMError

PROFILES = sorted(path.stem for path in (REPOSITORY / "conf/profile").glob("*.yaml"))


def profile(tmp_path, name):
    conf = REPOSITORY / "conf"
    compose_and_dump(tmp_path / "params.yaml", str(conf), None, "config", str(conf / "plugins"), [f"profile={name}"])
    return load_config(tmp_path / "params.yaml")


def test_there_are_these_profiles():
    small = {"digits", "fashion_mnist", "cifar10", "kather", "imagefolder"}
    assert set(PROFILES) == small | {"imagenet_b", "imagenet_s", "imagenet_b_deep"}


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
        ("digits", "gaussian_matched", 1.0, (10, 2, 128, 5e-3, 1.0, "none", 0, 0, 0, 10)),
        ("fashion_mnist", "rrcm", 0.25, (10, 1, 256, 1e-3, 0.75, "none", 0, 0, 0, 10)),
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
        ("imagefolder", "rrcm", 0.25, (150, 5, 256, 2e-4, 0.65, "randaugment", 0.8, 1.0, 0.1, 10)),
        ("imagefolder", "rrcm", 0.5, (50, 5, 2048, 2e-4, 0.65, "crop_flip", 0.8, 1.0, 0, 20)),
    ],
)
def test_settings_of_each_training(tmp_path, name, method, sigma, row):
    """Those of cifar10 and imagenet_b are the paper's. At 0.12 no setting is given for that sigma alone."""
    settings = profile(tmp_path, name).finetune.settings(method, sigma)
    values = settings.model_dump() | settings.objectives.consistency.model_dump()
    assert tuple(values[column] for column in COLUMNS) == row
    assert (settings.num_noise, settings.weight_decay, values["entropy_weight"]) == (2, 0, 0.5)


def test_params_yaml_is_the_composed_default(tmp_path):
    answer = stage(tmp_path, "compose", "--output", "params.yaml")
    assert answer.returncode == 0, answer.stderr
    assert filecmp.cmp(tmp_path / "params.yaml", REPOSITORY / "params.yaml", shallow=False), "run `make params`"


def test_overrides_reach_their_run(tmp_path):
    config = load_config(compose(tmp_path / "params.yaml", "finetune.sigma_overrides=[{sigma: 0.5, lr: 7.0e-4}]"))
    assert config.finetune.settings("rrcm", 0.5).lr == 7e-4 != config.finetune.settings("rrcm", 0.25).lr
    assert config.finetune.settings("gaussian", 0.5).layer_decay == 1.0


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
        ({"pretrain__warmup_steps": 30}, "warmup_steps 30 must be below steps 30"),
        ({"model__num_heads": 5}, "embed_dim 32 must be even and a multiple of num_heads 5"),
        ({"model__patch_size": 3}, "data.image_size 8 must be a multiple of model.patch_size 3"),
        ({"finetune__scratch_overrides": {"lrr": 1}}, "finetune: scratch_overrides.lrr: unknown key; did you mean lr?"),
        ({"finetune__sigma_overrides": [{"lr": 1e-3}]}, "sigma_overrides.0: needs a number `sigma`"),
        ({"profile": "../etc"}, "profile = '../etc'"),
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
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(RRCMError, match="cannot be read as YAML"):
        load_config(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("[]")
    with pytest.raises(RRCMError, match="must be a mapping"):
        load_config(tmp_path / "params.yaml")
