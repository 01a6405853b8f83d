"""How long each method trains: equal epochs, equal passes and equal total compute, and what warm-ups make of it."""

import pytest
import torch
import yaml
from conftest import TINY, change, compose, composed, with_derived
from torch.utils.flop_counter import FlopCounterMode

from rrcm import methods
from rrcm.config import load_config, parse_config
from rrcm.methods import METHODS
from rrcm.models import vit
from rrcm.models.architectures import build_network
from rrcm.models.encoders import build_encoder
from rrcm.objectives import PRETRAINING
from rrcm.training.budget import (
    build_finetuning_objective,
    build_pretraining_objective,
    plan_budget,
    plan_pretraining,
    planned_passes,
    pretraining_compute,
    scale_steps,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import write_json

IMAGES, SIGMA = 12_800, 0.5  # 100 steps per epoch of batch 128
TRAINABLE = [name for name, row in METHODS.items() if name != "timm" and row.joint is None]


@pytest.fixture
def plan(tmp_path):
    """Plan the budget of a method with these settings: (config, budget)."""

    def budget_of(method: str, *overrides: str, images: int = IMAGES, sigma: float | str = SIGMA):
        row = METHODS[method]
        methods = {"rrcm", "gaussian", method} | ({"rrcm_joint"} if row.is_student else set())
        values = yaml.safe_load(composed(*TINY, *overrides))  # the same for all methods, as composing takes long
        values["methods"] = sorted(methods)  # gaussian: the voter for soft labels; rrcm_joint: the teacher
        values["pretrain"]["objectives"] = sorted({"rrcm", row.initial_weights if row.pretrained_here else "rrcm"})
        config = parse_config(with_derived(values))
        spent = {"compute": {"pretrain": pretraining_compute(config, "rrcm")}}
        for name in {kind.initial_weights for kind in METHODS.values() if kind.pretrained_here}:
            write_json(tmp_path / name / "config.json", spent)
        return config, plan_budget(config, method, sigma, images, tmp_path)

    return budget_of


def test_the_reference_is_the_fine_tuning_of_rrcm(plan):
    config, budget = plan("gaussian", "finetune.num_noise=3")
    assert (
        planned_passes(config, "rrcm", SIGMA, IMAGES) == 3 * 3 * 6 * IMAGES
    )  # m = 3, a pass forward and two back, 6 epochs
    _, of_rrcm = plan("rrcm", "finetune.num_noise=3", "finetune.equal_passes=true")
    assert of_rrcm.compute == 3 * 3 * 6 * IMAGES and of_rrcm.epochs == budget.epochs == 6


@pytest.mark.parametrize(
    ("name", "own", "passes"),
    [
        ("gaussian", "gaussian.num_noise.default=1", 3),
        ("stability", "stability.num_noise=1", 6),
        ("smoothmix", "smoothmix={num_noise:1,attack_steps:1}", 8),
    ],
)
def test_an_objective_may_have_a_number_of_noises_of_its_own(plan, name, own, passes):
    config, budget = plan(name, "finetune.num_noise=4", f"finetune.objectives.{own}")
    assert budget.step_compute == passes * config.finetune.batch_size
    assert planned_passes(config, "consistency", SIGMA, IMAGES) == 4 * 3 * 6 * IMAGES  # that has none


@pytest.mark.parametrize("method", [n for n in TRAINABLE if not METHODS[n].matched and not METHODS[n].denoises])
def test_equal_passes_are_equal_to_within_a_percent(plan, method):
    config, budget = plan(method, "finetune.equal_passes=true")
    members = config.finetune.ensemble_members if METHODS[method].is_ensemble else 1
    assert members * budget.compute == pytest.approx(planned_passes(config, "rrcm", SIGMA, IMAGES), rel=0.01)
    _, by_epochs = plan(method)
    assert by_epochs.epochs == 6 and isinstance(by_epochs.epochs, int)


@pytest.mark.parametrize("unit", ["epochs", "passes"])
@pytest.mark.parametrize("method", [name for name in TRAINABLE if METHODS[name].matched])
def test_matched_methods_get_the_total_compute_of_rrcm(plan, method, unit):
    """To within half an epoch, or half a step."""
    settings = (f"finetune.equal_passes={unit == 'passes'}", "finetune.epochs=40", "pretrain.steps=20000")
    config, budget = plan(method, *settings)
    _, of_rrcm = plan("rrcm", *settings)
    share = pretraining_compute(config, "rrcm") / config.finetune.pretrain_cost_shared_by
    step = budget.step_compute * (1 if unit == "passes" else budget.epoch_steps)
    assert of_rrcm.pretrain_share == share
    assert abs(budget.compute + budget.soft_label_share - of_rrcm.compute - share) <= step / 2
    assert budget.pretrain_share == 0 and (unit == "passes" or isinstance(budget.epochs, int))


JOINT_METHODS = ["rrcm", "gaussian", "smoothadv", "cat_rs", "consistency_matched", "cat_rs_matched", "rrcm_ensemble"]


@pytest.mark.parametrize("by_passes", [False, True])
@pytest.mark.parametrize("expert", JOINT_METHODS)
def test_a_joint_training_gets_what_its_experts_get_together_or_a_third(plan, expert, by_passes):
    """To within half an epoch, or half a step. It takes all their shares of what comes before the fine-tuning."""
    settings = ["sigmas=[0.25,0.5,1.0]", "pretrain.steps=2000", f"finetune.equal_passes={by_passes}"]
    settings += ["finetune.objectives.smoothadv.num_noise={default: 2, sigma_0.25: 4, joint: 3}"]
    experts = [plan(expert, *settings, sigma=sigma)[1] for sigma in (0.25, 0.5, 1.0)]
    before = sum(each.pretrain_share for each in experts), sum(each.soft_label_share for each in experts)
    given = sum(each.compute for each in experts)
    matched = 0.0  # a third of the fine-tuning, and the whole of what replaces the pre-training
    for ending, share in (("joint", 1.0), ("joint_third", 1 / 3)):
        config, budget = plan(f"{expert}_{ending}", *settings, sigma="joint")
        if METHODS[expert].matched:
            matched = pretraining_compute(config, "rrcm") - before[1]
        step = budget.step_compute * (1 if by_passes else budget.epoch_steps)
        rounding = sum(each.step_compute * (1 if by_passes else each.epoch_steps) for each in experts) / 2
        assert abs(budget.compute - share * (given - matched) - matched) <= step / 2 + rounding
        assert (budget.pretrain_share, budget.soft_label_share) == pytest.approx(before)
        assert budget.planned_epochs == 6


@pytest.mark.parametrize("by_passes", [False, True])
def test_passes_are_trained_on_top_of_the_joint_training(plan, by_passes):
    settings = ["sigmas=[0.25,0.5,1.0]", f"finetune.equal_passes={by_passes}", "finetune.pass_share=0.25"]
    settings += ["finetune.pass_votes=7"]
    _, joint = plan("smoothadv_joint", *settings, sigma="joint")
    _, budget = plan("smoothadv_joint_pass", *settings, sigma="joint")
    unit = 1 if by_passes else joint.epoch_steps
    assert abs(budget.total_steps - joint.total_steps / 4) <= unit / 2
    assert budget.step_compute == 2 * budget.step_images == 2 * joint.step_images  # forward passes of 2 noisy copies
    assert budget.joint == joint.compute + 7 * 3 * 100 * 128
    assert budget.account == {**joint.account, "finetune": budget.compute, "joint": budget.joint}
    assert (budget.planned_epochs, budget.schedule_epochs) == (joint.planned_epochs, budget.planned_epochs)
    assert "joint" in budget.identity and "joint" not in joint.identity and "joint" not in joint.account


def test_a_third_of_three_experts_trains_like_one(plan):
    sigmas = "sigmas=[0.25,0.5,1.0]"
    assert plan("rrcm_joint_third", sigmas, sigma="joint")[1].epochs == plan("rrcm", sigmas)[1].epochs == 6
    assert plan("rrcm_joint", sigmas, sigma="joint")[1].epochs == 18


def test_fine_tuning_on_denoised_images_counts_the_denoiser(plan):
    """Each noisy copy goes through the denoiser once, without a way back."""
    _, budget = plan("dds_finetuned", "finetune.num_noise=3")
    assert budget.compute == (3 * 3 + 3) * 6 * IMAGES


@pytest.mark.parametrize("architecture", ["vit", "lenet"])
def test_the_passes_of_a_student_count_by_its_multiply_adds(plan, tmp_path, monkeypatch, architecture):
    """Torch counts them. Each noisy copy also goes through the teacher, whose own cost is apart."""
    settings = ["sigmas=[0.25,0.5]", "data.image_size=28", "finetune.num_noise=3", "student.embed_dim=16"]
    config, budget = plan("distill_joint", *settings, f"student.architecture={architecture}", sigma="joint")
    monkeypatch.setattr(vit, "attention", lambda q, k, v: (q @ k.mT).softmax(-1) @ v)  # the fused one is not counted
    counted = []
    for model in (config.model_of("distill"), config.model):
        own = model.architecture == "vit"
        network = build_encoder(model, config.data) if own else build_network("lenet", 28, 1, num_classes=1)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 1, 28, 28), *([1.0] if own else []))
        counted.append(counter.get_total_flops())
    assert budget.step_compute == pytest.approx((3 * 3 * counted[0] / counted[1] + 3) * 128, rel=0.01)
    assert budget.epochs == 12
    of_teacher = plan_budget(config, "rrcm_joint", "joint", IMAGES, tmp_path)
    assert budget.teacher == budget.account["teacher"] == sum(of_teacher.account.values()) > of_teacher.compute
    expert = plan_budget(config, "distill", 0.5, IMAGES, tmp_path)
    assert expert.teacher == budget.teacher / 2 and expert.step_compute == budget.step_compute and expert.epochs == 6
    assert "teacher" in budget.identity and "teacher" not in of_teacher.identity and "teacher" not in of_teacher.account


def test_soft_labels_cost_their_votes_and_the_training_of_the_voter(plan):
    """Gaussian, m = 2, 6 epochs: 6 passes per image and epoch. Three models share both."""
    _, budget = plan("cat_rs", "soft_labels.n=1000")
    assert budget.soft_label_share == (1000 + 6 * 6) * IMAGES / 3


def test_soft_labels_that_cost_all_are_refused(plan):
    with pytest.raises(RRCMError, match=r"soft_labels.n = 100000: cat_rs_matched spends all"):
        plan("cat_rs_matched", "soft_labels.n=100000")


def test_schedules_end_with_a_training_that_is_shorter_than_planned(plan):
    """SmoothAdv with T = 10 and m = 2 costs 46 passes per image, consistency 6."""
    settings = "finetune.objectives.smoothadv"
    _, budget = plan(
        "smoothadv", f"{settings}.attack_steps=10", f"{settings}.num_noise=2", "finetune.equal_passes=true"
    )
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
        "smoothadv", "finetune.objectives.smoothadv.attack_steps=900", "finetune.equal_passes=true", images=128
    )
    assert (budget.total_steps, budget.epochs) == (1, 1)


# Pre-training


@pytest.mark.parametrize("name", PRETRAINING)
def test_with_equal_passes_every_pre_training_costs_what_rrcm_costs(project, name):
    change(project, pretrain__equal_passes=True, pretrain__steps=3000, pretrain__warmup_steps=100)
    config = load_config(project / "params.yaml")
    assert pretraining_compute(config, name) == pytest.approx(12 * 3000 * 64, rel=1e-3)
    settings, objective = plan_pretraining(config, name), build_pretraining_objective(config, name)
    assert settings.warmup_steps / settings.steps == pytest.approx(1 / 30, rel=0.02)
    if hasattr(objective, "levels"):
        assert len(objective.levels(settings.steps - 1)) == 81  # the curriculum is spread over all its steps
    if name == "rrcm":
        assert settings == config.pretrain


def test_without_equal_passes_every_pre_training_has_the_same_steps(project):
    config = load_config(project / "params.yaml")
    assert all(plan_pretraining(config, name) == config.pretrain for name in PRETRAINING)


def test_what_is_counted_in_steps_grows_with_them(project):
    settings = load_config(project / "params.yaml").pretrain
    longer, shorter = scale_steps(settings, 4.0), scale_steps(settings, 0.001)
    assert (longer.steps, longer.warmup_steps, longer.checkpoint_every) == (120, 16, 20)
    assert longer.ema_decay == pytest.approx(1 - (1 - settings.ema_decay) / 4)
    assert longer.teacher_decay_end == pytest.approx(1 - (1 - settings.teacher_decay_end) / 4)
    assert (shorter.steps, shorter.warmup_steps, shorter.log_every, shorter.ema_decay) == (1, 0, 1, 0.0)


def test_a_learning_rate_of_its_own(project):
    change(
        project, pretrain__lr={"default": 1e-3, "dmae": 5e-4}, pretrain__temperature={"default": 1.0, "moco_v3": 0.2}
    )
    config = load_config(project / "params.yaml")
    assert [plan_pretraining(config, name).lr for name in ("rrcm", "dmae")] == [1e-3, 5e-4]
    assert build_pretraining_objective(config, "moco_v3").temperature == 0.2


def test_an_objective_that_needs_soft_labels_must_be_named_in_the_method_table(tmp_path, monkeypatch):
    """Without its name there the training would fail at its first step."""
    settings = load_config(compose(tmp_path / "params.yaml")).finetune.settings("cat_rs", SIGMA)
    monkeypatch.setattr(methods, "SOFT_LABEL_OBJECTIVES", set())
    with pytest.raises(RRCMError, match=r"^rrcm/methods\.py: objective cat_rs needs soft labels; add it to SOFT_LAB"):
        build_finetuning_objective(settings, "cat_rs", SIGMA)
