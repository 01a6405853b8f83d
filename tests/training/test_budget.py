"""How long each method trains: equal epochs, equal passes and equal total compute, and what warm-ups make of it."""

import pytest
from conftest import compose

from rrcm.config import load_config
from rrcm.methods import METHODS
from rrcm.training.budget import build_finetuning_objective, plan_budget, pretraining_compute, reference_passes
from rrcm.utils.files import write_json

IMAGES, SIGMA = 12_800, 0.5  # 100 steps per epoch of batch 128
TRAINABLE = [name for name in METHODS if name != "timm"]


@pytest.fixture
def plan(tmp_path):
    """Plan the budget of a method with these settings: (config, budget)."""

    def budget_of(method: str, *overrides: str, images: int = IMAGES):
        methods = ",".join(sorted({"rrcm", method}))
        config = load_config(compose(tmp_path / "params.yaml", f"methods=[{methods}]", *overrides))
        spent = {"compute": {"pretrain": pretraining_compute(config, "rrcm")}}
        for name in {kind.initial_weights for kind in METHODS.values() if kind.pretrained_here}:
            write_json(tmp_path / name / "config.json", spent)
        objective = build_finetuning_objective(config.finetune.settings(method, SIGMA), method, SIGMA)
        return config, plan_budget(config, method, SIGMA, objective, images, tmp_path)

    return budget_of


def test_the_reference_is_the_fine_tuning_of_rrcm(plan):
    config, budget = plan("gaussian", "finetune.num_noise=3")
    assert reference_passes(config, SIGMA, IMAGES) == 3 * 3 * 6 * IMAGES  # m = 3, a pass forward and two back, 6 epochs
    _, of_rrcm = plan("rrcm", "finetune.num_noise=3", "finetune.budget=passes")
    assert of_rrcm.compute == 3 * 3 * 6 * IMAGES and of_rrcm.epochs == budget.epochs == 6


@pytest.mark.parametrize("method", [name for name in TRAINABLE if METHODS[name].budget == "finetune"])
def test_equal_passes_are_equal_to_within_a_percent(plan, method):
    config, budget = plan(method, "finetune.budget=passes")
    assert budget.compute == pytest.approx(reference_passes(config, SIGMA, IMAGES), rel=0.01)
    _, by_epochs = plan(method)
    assert by_epochs.epochs == 6 and isinstance(by_epochs.epochs, int)


@pytest.mark.parametrize("unit", ["epochs", "passes"])
@pytest.mark.parametrize("method", [name for name in TRAINABLE if METHODS[name].budget == "total"])
def test_matched_methods_get_the_total_compute_of_rrcm(plan, method, unit):
    """To within half an epoch, or half a step."""
    settings = (f"finetune.budget={unit}", "finetune.epochs=40", "pretrain.steps=20000")
    config, budget = plan(method, *settings)
    _, of_rrcm = plan("rrcm", *settings)
    share = pretraining_compute(config, "rrcm") / config.finetune.pretrain_cost_shared_by
    step = budget.step_compute * (1 if unit == "passes" else budget.epoch_steps)
    assert of_rrcm.pretrain_share == share
    assert abs(budget.compute - of_rrcm.compute - share) <= step / 2
    assert budget.pretrain_share == 0 and (unit == "passes" or isinstance(budget.epochs, int))


def test_schedules_end_with_a_training_that_is_shorter_than_planned(plan):
    """SmoothAdv with T = 10 and m = 2 costs 46 passes per image, consistency 6."""
    overrides = ("finetune.objectives.smoothadv.attack_steps=10", "finetune.budget=passes")
    _, budget = plan("smoothadv", *overrides)
    assert budget.total_steps == round(600 * 6 / 46) == 78 and budget.epochs == 0.78
    assert budget.schedule_epoch(0) == 0 and budget.schedule_epoch(39) == pytest.approx(3)
    assert budget.schedule_epoch(78) == pytest.approx(6) == budget.schedule_epochs


def test_schedules_of_a_longer_training_stay_as_given(plan):
    _, budget = plan("consistency_matched", "pretrain.steps=6000")
    assert budget.epochs > 6 and budget.schedule_epochs == budget.epochs
    assert [budget.schedule_epoch(step) for step in (0, 1, 150)] == [0, 1 / 100, 1.5]


def test_a_longer_training_is_evaluated_as_often(plan):
    config, budget = plan("consistency_matched", "finetune.evaluate_every=2", "pretrain.steps=6000")
    assert budget.evaluate_every == -(-2 * budget.epochs // config.finetune.epochs) > 2


def test_a_training_has_at_least_one_step(plan):
    _, budget = plan(
        "smoothadv", "finetune.objectives.smoothadv.attack_steps=900", "finetune.budget=passes", images=128
    )
    assert (budget.total_steps, budget.epochs) == (1, 1)
