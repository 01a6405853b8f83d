"""Networks other than our ViT: their layers, their training from scratch, and their model folders."""

import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same_gradients, change, change_model, stage
from torch import nn

from rrcm.config import parse_config
from rrcm.models.architectures import build_network, network_classifier
from rrcm.models.checkpoints import save_model
from rrcm.models.load import load_base_classifier
from rrcm.models.vit import parameter_count
from rrcm.training.optim import build_optimizer, warmup_step
from rrcm.utils.distributed import SyncBatchNorm2d, sync_batch_norm
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_lenet_is_the_published_network():
    """conv 20 5x5, ReLU, pool, conv 50 5x5, ReLU, pool, fc 500, ReLU, fc."""
    torch.manual_seed(0)
    lenet = build_network("lenet", 28, 1, 10)
    assert parameter_count(lenet) == (25 * 20 + 20) + (500 * 50 + 50) + (800 * 500 + 500) + (500 * 10 + 10)
    layers = [lenet.conv1, nn.ReLU(), nn.MaxPool2d(2), lenet.conv2, nn.ReLU(), nn.MaxPool2d(2)]
    published = nn.Sequential(*layers, nn.Flatten(), lenet.fc1, nn.ReLU(), lenet.fc2)
    noisy = images(6, 1, 28, 28)
    gradients = []
    for network in (lenet, published):
        network.zero_grad()
        network(noisy).square().sum().backward()
        gradients.append({number: p.grad.clone() for number, p in enumerate(network.parameters())})
    torch.testing.assert_close(lenet(noisy), published(noisy))
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("size", [28, 30])  # from 30 pixels: 26 and 9 before the poolings, so a row is left out
def test_lenet_without_gradients_is_the_same_network(size):
    lenet, noisy = build_network("lenet", size, 1, 10), images(6, 1, size, size)
    trained = lenet(noisy)
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(lenet(noisy), trained)


def test_resnet110_has_110_layers_and_the_published_number_of_parameters():
    network = build_network("resnet110", 32, 3, 10)
    shortcuts = ("layer2.0.downsample.0", "layer3.0.downsample.0")
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) - len(shortcuts) == 110 and set(shortcuts) < set(layers)
    assert parameter_count(network) == 1_730_714
    std = network.layer1[0].conv1.weight.std().item()
    assert std == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)
    assert network(images(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_is_timms(name):
    torch.manual_seed(1)
    ours = build_network(name, 32, 1, 7).eval()
    torch.manual_seed(1)
    sizes = {"img_size": 32} if name == "test_vit" else {}
    theirs = timm.create_model(name, num_classes=7, in_chans=1, **sizes).eval()
    assert torch.equal(ours(images(3, 1, 32, 32)), theirs(images(3, 1, 32, 32)))


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("lenet", 8, "cannot be built .*too small for a LeNet, which needs 16"),
        ("lennet", 28, "must be vit, lenet, resnet110 or a timm name"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_one_line(name, size, said):
    with pytest.raises(RRCMError, match=f"model.architecture = '{name}': {said}") as caught:
        build_network(name, size, 1, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("lenet", 28), ("resnet110", 32), ("test_resnet", 16)])
def test_a_model_folder_gives_back_the_same_logits(tmp_path, name, size):
    """The classifier normalises pixels itself, after the noise has been added."""
    torch.manual_seed(0)
    normalization = {"pixel_mean": [0.3], "pixel_std": [0.5]}
    architecture = {"name": name, "image_size": size, "channels": 1, **normalization}
    classifier = network_classifier(architecture, 4, sigma=0.25)
    classifier.train()(images(16, 1, size, size))  # moves the running averages
    save_model(tmp_path / "model", classifier.eval(), class_names=list("abcd"))
    loaded = load_base_classifier(tmp_path / "model")
    assert (loaded.image_size, loaded.channels, loaded.class_names, loaded.sigma) == (size, 1, list("abcd"), 0.25)
    noisy = images(3, 1, size, size)
    assert torch.equal(loaded.classifier(noisy), classifier(noisy))
    torch.testing.assert_close(classifier(noisy), classifier.network((noisy - 0.3) / 0.5))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": {"name": "lenet"}}, "architecture.image_size: missing"),
        ({"architecture": None}, "architecture = None"),
        ({"sigma": None}, "sigma = None: should be a valid number"),
        ({"class_names": []}, "class_names = ..: List should have at least 1 item"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(tmp_path, changed, said):
    architecture = {"name": "lenet", "image_size": 16, "channels": 1, "pixel_mean": None, "pixel_std": None}
    save_model(tmp_path, network_classifier(architecture, 3, sigma=0.5))
    change_model(tmp_path, **changed)
    with pytest.raises(RRCMError, match=f"config.json: {said}") as caught:
        load_base_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_batch_norms_are_shared_by_processes_under_the_same_names(monkeypatch):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    names, before = list(network.state_dict()), network.eval()(images(5, 1, 8, 8))
    sync_batch_norm(network)
    assert sum(isinstance(module, SyncBatchNorm2d) for module in network.modules()) == 2
    assert list(network.state_dict()) == names and torch.equal(network.eval()(images(5, 1, 8, 8)), before)
    monkeypatch.setattr("rrcm.utils.distributed.world_size", lambda: 2)
    with pytest.raises(RRCMError, match="BatchNorm1d: several processes cannot share it"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))


def test_sgd_follows_its_formula():
    """v <- momentum v + g + decay w, w <- w - lr v."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer([(1.0, [weight])], lr=0.1, weight_decay=0.01, name="sgd")
    expected, velocity = weight.detach().clone(), torch.zeros(2)
    for gradient in (torch.tensor([1.0, 0.5]), torch.tensor([-0.3, 2.0])):
        weight.grad = gradient
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.01 * expected
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(weight.detach(), expected)


def test_step_decay_by_hand():
    factors = [warmup_step(epoch, 0, 30) for epoch in (0, 29.99, 30, 59.99, 60, 89.99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert warmup_step(1, 4, 30) == 0.25


def another_trunk(project, **settings):
    change(project, methods=["gaussian"], sigmas=[0.5], model__architecture="test_resnet", pretrain__objectives=[])
    change(project, finetune__layer_decay=1.0, finetune__epochs=2, certify__max_images=4, **settings)


@pytest.mark.thorough
def test_the_stages_train_and_certify_another_trunk(project):
    another_trunk(project, finetune__optimizer="sgd", finetune__lr_schedule="step", finetune__lr_step_epochs=1)
    for command in (["finetune", "gaussian", "0.5"], ["certify", "gaussian", "0.5"], ["latency"]):
        answer = stage(project, *command)
        assert answer.returncode == 0, answer.stderr
    config = read_json(project / "models/gaussian/sigma_0.5/config.json")
    assert config["training"]["num_noise"] == 2  # the common value, as the block of `gaussian` has none
    assert config["kind"] == "network" and config["architecture"]["name"] == "test_resnet"
    history = pd.read_csv(project / "models/gaussian/sigma_0.5/history.csv")
    assert history["lr"].tolist() == pytest.approx([5e-3 / 2, 5e-4 / 2], rel=0.2)  # of the last steps, and warming up


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ["rrcm"]}, "methods: rrcm needs model.architecture vit"),
        (
            {"methods": ["timm"], "model__architecture": "lenet"},
            "methods: timm needs model.architecture vit or a timm model, not lenet",
        ),
        ({"methods": ["gaussian_matched"]}, "methods: gaussian_matched needs model.architecture vit"),
        ({"pretrain__objectives": ["rrcm"]}, "pretrain.objectives must be"),
        ({"finetune__layer_decay": 0.9}, "finetune.layer_decay must be 1"),
        ({"finetune__num_chunks": 2}, "finetune.num_chunks must be 1"),
        ({"model__pixel_mean": [0.5]}, "model: pixel_mean and pixel_std must both be given"),
        (
            {"model__pixel_mean": [0.5] * 3, "model__pixel_std": [0.5] * 3},
            "model.pixel_mean .* must have data.channels",
        ),
        ({"finetune__optimizer": "adam"}, "finetune.optimizer"),
        ({"finetune__lr_step_epochs": 0}, "finetune.lr_step_epochs"),
    ],
)
def test_settings_that_do_not_fit_another_trunk(project, settings, said):
    another_trunk(project)
    change(project, **settings)
    with pytest.raises(RRCMError, match=said) as caught:
        import yaml

        parse_config(yaml.safe_load((project / "params.yaml").read_text()))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"), [("lenet", "too small for a LeNet"), ("vgg11", "cannot take images of 8 x 8"), ("vitt", "timm")]
)
def test_a_trunk_that_cannot_take_the_images_is_found_before_training(project, name, said):
    another_trunk(project)
    change(project, model__architecture=name)  # the digits have 8 pixels
    answer = stage(project, "finetune", "gaussian", "0.5")
    assert answer.returncode != 0 and said in answer.stderr and answer.stderr.count("\n") == 1


def test_noise_reaches_a_trunk_before_its_normalization():
    architecture = {"name": "lenet", "image_size": 16, "channels": 1, "pixel_mean": [0.0], "pixel_std": [1.0]}
    torch.manual_seed(0)
    normalized = network_classifier(architecture, 3, sigma=0.5)
    torch.manual_seed(0)
    plain = network_classifier(architecture | {"pixel_mean": None, "pixel_std": None}, 3, sigma=0.5)
    noisy = images(4, 1, 16, 16)
    assert torch.equal(normalized(noisy), plain(noisy))
    assert F.cross_entropy(plain(noisy), torch.zeros(4, dtype=torch.long)).isfinite()
