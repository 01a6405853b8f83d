"""What every objective must do, whatever its formula: run over both tables."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rrcm.config import Config, load_config
from rrcm.methods import METHODS
from rrcm.models.base_classifiers import CLASSIFIERS
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.objectives.base import Draw, build_objective, soft_cross_entropy
from rrcm.training.budget import build_finetuning_objective, build_pretraining_objective
from rrcm.utils.errors import RRCMError

B, K = 12, 5
CPU = torch.device("cpu")


@pytest.fixture
def config(project: Path) -> Config:
    return load_config(project / "params.yaml")


def encoder() -> NoiseConditionedViT:
    torch.manual_seed(0)
    return NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=2, num_heads=2)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def pretraining_gradients(config: Config, name: str, num_chunks: int = 1, step: int = 3) -> dict:
    """Loss, terms and gradients of the student."""
    student = EncoderWithProjector(encoder(), 32, 16).train()
    teacher = EncoderWithProjector(encoder(), 32, 16).train().requires_grad_(False)
    pretrain = config.pretrain.model_copy(update={"num_chunks": num_chunks})
    objective = build_pretraining_objective(config.model_copy(update={"pretrain": pretrain}), name)
    batch = {key: 2 * images(B, 1, 8, 8) - 1 for key in ("image", "view1", "view2")}
    draw = Draw(0, step, list(range(B)), B, CPU)
    losses = objective(SimpleNamespace(student=student, teacher=teacher), batch, draw)
    assert set(losses) == {"loss", *objective.terms}
    losses["loss"].backward()
    return losses | {key: p.grad for key, p in student.named_parameters()}


def finetuning_gradients(config: Config, method: str, step: int = 3) -> dict:
    """Loss, terms and gradients of the classifier."""
    classifier = CLASSIFIERS[METHODS[method].classifier](encoder(), K, 1.0).train()
    torch.nn.init.normal_(classifier.head.weight)
    objective = build_finetuning_objective(config.finetune.settings(method, 0.5), method, 0.5)
    batch = {"image": images(B, 1, 8, 8), "target": torch.eye(K)[torch.arange(B) % K]}
    losses = objective(lambda noisy: classifier(noisy), batch, Draw(0, step, range(B), B, CPU))
    assert set(losses) == {"loss", *objective.terms}
    losses["loss"].backward()
    return losses | {key: p.grad for key, p in classifier.named_parameters()}


def check(first: dict, again: dict, other_step: dict) -> None:
    for name, value in first.items():
        assert value is not None and value.isfinite().all(), name
        assert torch.equal(value, again[name]), f"{name}: another result for the same seed"
    assert any(not torch.equal(value, other_step[name]) for name, value in first.items()), "the step changes nothing"
    assert all(value.abs().sum() > 0 for name, value in first.items() if name.endswith("weight"))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_reaches_every_parameter_and_draws_by_seed_and_step(config, name):
    check(*(pretraining_gradients(config, name, step=step) for step in (3, 3, 4)))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_in_chunks_is_the_whole(config, name):
    whole, divided = pretraining_gradients(config, name), pretraining_gradients(config, name, num_chunks=4)
    for key, value in whole.items():
        torch.testing.assert_close(divided[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_finetuning_reaches_every_parameter_and_draws_by_seed_and_step(config, method):
    check(*(finetuning_gradients(config, method, step=step) for step in (3, 3, 4)))


@pytest.mark.parametrize("name", {**PRETRAINING, **FINETUNING})
def test_cost_counts_the_passes_through_the_encoder(config, name):
    """Every image that goes through the encoder counts once, three times where a backward pass follows."""
    passes, module = 0.0, encoder()

    def count(_, inputs, output):
        nonlocal passes
        passes += len(inputs[0]) * (3 if output.requires_grad else 1)

    module.register_forward_hook(count)
    if name in PRETRAINING:
        student = EncoderWithProjector(module, 32, 16).train()
        objective = build_pretraining_objective(config, name)
        with torch.no_grad():
            quiet = EncoderWithProjector(module, 32, 16).train()
        teacher = lambda *args, **kwargs: quiet(*args, **kwargs)  # noqa: E731
        batch = {key: images(B, 1, 8, 8) for key in ("image", "view1", "view2")}
        objective(SimpleNamespace(student=student, teacher=teacher), batch, Draw(0, 3, range(B), B, CPU))
    else:
        classifier = CLASSIFIERS["classifier"](module, K, 1.0).train()
        settings = {"sigma": 0.5, "num_noise": 2, "consistency_weight": 1.0, "entropy_weight": 0.5}
        objective = build_objective(FINETUNING, name, settings)
        batch = {"image": images(B, 1, 8, 8), "target": torch.eye(K)[torch.arange(B) % K]}
        objective(classifier, batch, Draw(0, 3, range(B), B, CPU))
    assert passes == objective.forwards_per_image * B


def test_consistency_without_its_weights_is_gaussian(config):
    """Jeong & Shin 2020: lambda = eta = 0 leaves the cross-entropy of the m copies."""
    settings = {"sigma": 0.5, "num_noise": 2, "consistency_weight": 0.0, "entropy_weight": 0.0}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, K))
    batch = {"image": images(B, 1, 8, 8), "target": torch.eye(K)[torch.arange(B) % K]}
    one, other = (
        build_objective(FINETUNING, name, settings)(model, batch, Draw(0, 0, range(B), B, CPU))["loss"]
        for name in ("consistency", "gaussian")
    )
    torch.testing.assert_close(one, other)


def test_soft_cross_entropy_is_torchs():
    logits, target = images(3, B, K), images(B, K).softmax(1)
    expected = sum(torch.nn.functional.cross_entropy(one, target) for one in logits) / 3
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)


def test_a_draw_depends_on_position_not_on_company():
    whole = Draw(0, 3, range(6), 6, CPU).normal("noise", (4,), copies=2).unflatten(0, (2, 6))
    part = Draw(0, 3, [4, 2], 6, CPU).normal("noise", (4,), copies=2).unflatten(0, (2, 2))
    assert torch.equal(part, whole[:, [4, 2]])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("macre", {}, "macre: no such objective; rrcm/objectives/__init__.py has gaussian, consistency"),
        ("gaussian", {"sigma": 0.5}, "objective gaussian: needs the setting num_noise"),
    ],
)
def test_a_bad_objective_is_refused_in_one_line(name, settings, said):
    with pytest.raises(RRCMError, match=f"^{said}$"):
        build_objective(FINETUNING, name, settings)
