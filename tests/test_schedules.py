"""Schedules follow the length of a training, in every profile and after an override."""

import pytest
from test_config import FROM_SCRATCH, PROFILES, profile

from rrcm.utils.errors import RRCMError


def pretraining(tmp_path, steps):
    return profile(tmp_path, "fashion_mnist", f"pretrain.steps={steps}").pretrain


def test_schedules_that_follow_the_steps_pass_through_the_papers(tmp_path):
    """At 300,000 steps, CIFAR-10's: the grid, the noise range, and the horizons of both averages."""
    names = ("min_levels", "max_levels", "t_max", "teacher_decay_start", "teacher_decay_end", "ema_decay")
    paper = profile(tmp_path, "cifar10").pretrain
    assert pretraining(tmp_path, 300_000).model_dump(include={*names}) == paper.model_dump(include={*names})


@pytest.mark.parametrize("steps", [40, 360, 1200, 7200, 50_000, 600_000])
def test_schedules_that_follow_the_steps_fit_any_number(tmp_path, steps):
    settings, longer = pretraining(tmp_path, steps), pretraining(tmp_path, 2 * steps)
    assert settings.warmup_steps < steps and settings.min_levels <= settings.max_levels <= longer.max_levels <= 80
    assert settings.ema_decay <= longer.ema_decay and settings.teacher_decay_end <= longer.teacher_decay_end
    assert settings.t_max >= 2 * max(settings.evaluate_sigmas)  # the trajectory passes every noise that is certified


@pytest.mark.parametrize(("steps", "levels"), [(1200, 5), (7200, 12), (75_000, 40)])
def test_the_grid_grows_with_the_root_of_the_steps(tmp_path, steps, levels):
    """4 sqrt(steps / 750) strides, to a loudest noise level of the same number."""
    settings = pretraining(tmp_path, steps)
    assert (settings.max_levels, settings.t_max) == (levels, levels)


def test_layer_decay_follows_the_length_of_fine_tuning(tmp_path):
    decays = [
        profile(tmp_path, "fashion_mnist", f"finetune.epochs={epochs}", "finetune.warmup_epochs=0")
        .finetune.settings("rrcm", 0.5)
        .layer_decay
        for epochs in (1, 2, 10, 100, 300)
    ]
    assert decays == pytest.approx([0.9975, 0.995, 0.975, 0.75, 0.75])


LENGTHS = ("pretrain.steps", "finetune.epochs", "denoiser.steps")


def shortened(config, factor):
    """Overrides that divide the length of each training by `factor`."""
    for path in LENGTHS:
        section, name = path.split(".")
        length = getattr(getattr(config, section), name)
        if isinstance(length, dict):
            yield f"{path}={{{', '.join(f'{key}: {max(1, value // factor)}' for key, value in length.items())}}}"
        else:
            yield f"{path}={max(1, length // factor)}"


@pytest.mark.thorough
@pytest.mark.parametrize("name", PROFILES)
def test_warm_ups_follow_the_length_of_every_profile(tmp_path, name):
    """At a tenth of their length, all schedules have the same share of it, for each objective."""
    full = profile(tmp_path, name)
    short = profile(tmp_path, name, *shortened(full, 10))
    for section in ("pretrain", "denoiser"):
        shares = [getattr(each, section).warmup_steps / getattr(each, section).steps for each in (full, short)]
        assert shares[0] == pytest.approx(shares[1], abs=0.5 / getattr(short, section).steps)
    for method in FROM_SCRATCH:
        for sigma in full.sigmas:
            before, after = (each.finetune.settings(method, sigma).of_objective(method) for each in (full, short))
            schedules = [key for key in before if key.endswith("_epochs") and key != "linear_probe_epochs"]
            if before["lr_schedule"] != "step":
                schedules.remove("lr_step_epochs")
            for key in schedules:
                assert after[key] / after["epochs"] == pytest.approx(before[key] / before["epochs"]), key


@pytest.mark.parametrize(
    ("name", "overrides", "method", "expected"),  # warm-ups of the learning rate and of the attack at sigma 0.5
    [
        ("digits", ["finetune.epochs=3"], "smoothadv", (0.6, 1.2)),
        ("cifar10", ["finetune.epochs=3"], "smoothadv", (0.3, 0.3)),
        ("cifar10", ["finetune.epochs={default: 3, smoothadv: 9}"], "smoothadv", (0.9, 0.9)),
        ("cifar10", ["finetune.epochs={default: 3, smoothadv: 9}"], "smoothmix", (0.3, 0.3)),
        ("cifar10", ["finetune.epochs={sigma_0.25: 3, sigma_0.5: 9, default: 1}"], "smoothadv", (0.9, 0.9)),
        ("cifar10", ["finetune.epochs=3", "finetune.warmup_epochs=1"], "smoothadv", (1, 0.3)),
        ("imagenet_b", ["finetune.epochs=3"], "smoothadv", (0.3, 0.6)),
        ("imagenet_b", ["finetune.epochs={sigma_0.5: 100}"], "smoothadv", (10, 20)),
        ("fashion_mnist_lenet", ["finetune.epochs={default: 9, cat_rs: 15}"], "smoothadv", (0, 1)),
    ],
)
def test_warm_ups_follow_an_override_of_the_length(tmp_path, name, overrides, method, expected):
    values = profile(tmp_path, name, *overrides).finetune.settings(method, 0.5).of_objective(method)
    ramp = values.get("attack_warmup_epochs", values.get("mix_warmup_epochs"))
    assert (values["warmup_epochs"], ramp) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["finetune.epochs=3", "finetune.warmup_epochs=5"], "warmup_epochs 5 of consistency must be below epochs 3"),
        (["finetune.epochs=0"], "finetune.epochs = 0: should be greater than or equal to 1"),
        (["finetune.epochs=many"], "finetune.epochs = 'many': should be a valid integer"),
        (["pretrain.steps=0"], "pretrain.steps = 0: should be greater than or equal to 1"),
        (["pretrain.steps=1"], "pretrain: warmup_steps 1 must be below steps 1"),
    ],
)
def test_a_length_that_cannot_be_is_refused_in_one_line(tmp_path, overrides, said):
    with pytest.raises(RRCMError) as caught:
        profile(tmp_path, "digits", *overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)
