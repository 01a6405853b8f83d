"""A second implementation: MACER and SmoothMix of adversarial-robustness-toolbox have our gradients on a batch.

Its SmoothAdv is another algorithm, so it is not compared: it sets the order of the norm to epsilon, keeps only the last
step of its attack, and attacks one noisy copy at a time.
"""

import pytest
import torch
from torch import nn

from rrcm.objectives.adversarial import project_to_ball
from rrcm.objectives.macer import macer_loss
from rrcm.objectives.smoothmix import smoothmix_attack, smoothmix_loss

B, M, K, SIGMA = 10, 4, 5, 0.25
GENERATOR = torch.Generator().manual_seed(0)
X, NOISE = torch.rand(B, 1, 4, 4, generator=GENERATOR), torch.randn(M, B, 1, 4, 4, generator=GENERATOR)
LABELS, SHARE = torch.arange(B) % K, torch.rand(B, generator=GENERATOR) / 2
TARGET = torch.eye(K)[LABELS]


def network() -> nn.Module:
    """A network that classifies some of the images correctly."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, K))
    optimizer = torch.optim.Adam(layers.parameters(), 0.05)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layers(X), LABELS).backward()
        optimizer.step()
    return layers


def copies(layers: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return layers((images + SIGMA * NOISE).flatten(0, 1)).unflatten(0, (M, B))


def their_gradients(kind: type, images: torch.Tensor, labels: torch.Tensor, **settings) -> list[torch.Tensor]:
    """The gradients of the last batch that `fit` sees. A learning rate of 0 leaves the weights as they are."""
    layers = network()
    trained = kind(
        layers,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 4, 4),
        nb_classes=K,
        optimizer=torch.optim.SGD(layers.parameters(), lr=0.0),
        device_type="cpu",
        scale=SIGMA,
        **settings,
    )
    trained.fit(images.numpy(), labels.numpy(), nb_epochs=1)
    return [p.grad for p in layers.parameters()]


def agree(layers: nn.Module, loss: torch.Tensor, theirs: list[torch.Tensor]) -> None:
    for ours, other in zip(torch.autograd.grad(loss, list(layers.parameters())), theirs, strict=True):
        assert (ours - other).norm() <= 1e-4 * ours.norm() and ours.norm() > 1e-3


@pytest.fixture(autouse=True)
def one_unshuffled_batch(monkeypatch):
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda dataset, **_: [dataset.tensors])


def test_macer(monkeypatch):
    from art.estimators.certification.randomized_smoothing import PyTorchMACER

    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: NOISE.transpose(0, 1).flatten(0, 1))  # image by image
    settings = {"beta": 16.0, "gamma": 8.0}
    theirs = their_gradients(PyTorchMACER, X, LABELS, lmbda=3.0, gaussian_samples=M, **settings)
    layers = network()
    losses = macer_loss(copies(layers, X), TARGET, sigma=SIGMA, radius_weight=3.0, **settings)
    assert losses[1] > 0
    agree(layers, sum(losses), theirs)


@pytest.mark.parametrize("one_step", [False, True])
def test_smoothmix(monkeypatch, one_step):
    from art.estimators.certification.randomized_smoothing import PyTorchSmoothMix

    drawn = [noise for _ in range(M) for noise in NOISE]  # it gives a batch to the network in M parts
    monkeypatch.setattr(torch, "randn_like", lambda _: drawn.pop(0))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: 2 * SHARE)
    options = {"alpha": 0.5, "eta": 5.0, "num_noise_vec": M, "num_steps": 4, "mix_step": int(one_step)}
    theirs = their_gradients(PyTorchSmoothMix, X.repeat(M, 1, 1, 1), LABELS.repeat(M), **options)
    assert not drawn

    layers = network()
    first = smoothmix_attack(layers, X, TARGET, SIGMA * NOISE, length=0.5, steps=1)
    adversary = smoothmix_attack(layers, first, TARGET, SIGMA * NOISE, length=0.5, steps=3)
    clean = project_to_ball(first, X, 0.5) if one_step else X
    mixed = torch.lerp(clean, adversary, SHARE[:, None, None, None])
    cross_entropy, mix = smoothmix_loss(copies(layers, clean), copies(layers, mixed), TARGET, SHARE)
    assert mix > 0
    agree(layers, cross_entropy + 5.0 * mix, theirs)
