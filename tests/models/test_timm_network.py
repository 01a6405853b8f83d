"""Networks of timm that are no plain ViTs, as starts: their weights tensor by tensor, their channels, their errors."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import change, compose, stage
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from rrcm.config import load_config
from rrcm.models import ENCODERS
from rrcm.models.architectures import build_network, network_classifier
from rrcm.models.kinds import load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.timm_models import load_timm
from rrcm.models.timm_network import input_of
from rrcm.training.start import with_initial_weights
from rrcm.utils.errors import RRCMError

HEADS = {"test_resnet": "fc", "test_efficientnet": "classifier", "test_convnext": "head.fc"}


def save_network(path: Path, name: str = "test_resnet", **changes) -> nn.Module:
    """A network for seven classes, in which nothing is 0 or 1, and the file `path` of its weights."""
    torch.manual_seed(0)
    network = timm.create_model(name, **{"num_classes": 7, **changes}).eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    save_file(network.state_dict(), path)
    return network


def started(name: str, source: str, weights: str | None, channels: int = 3) -> nn.Module:
    """A network for four classes with the weights of `source`."""
    network = build_network(name, 32, channels, 4).eval()
    ENCODERS["timm network"](network, source, weights)
    return network


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_all_weights_but_the_head_are_timms(tmp_path, name, snapshot):
    """The head for other classes is random and very small, whatever timm gives it."""
    theirs = save_network(tmp_path / "weights.safetensors", name)
    save_for_hf(theirs, tmp_path / "folder")
    given = (str(tmp_path / "folder"), None) if snapshot else (name, str(tmp_path / "weights.safetensors"))
    network = started(name, *given)
    after, expected = network.state_dict(), theirs.state_dict()
    head = {key for key in after if key.startswith(f"{HEADS[name]}.")}
    assert len(head) == 2 and after.keys() == expected.keys()
    for key in after.keys() - head:
        assert torch.equal(after[key], expected[key]), key
    assert 0 < after[f"{HEADS[name]}.weight"].abs().max() < 1e-4 and not after[f"{HEADS[name]}.bias"].any()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_only_the_method_timm_starts_from_these_weights(tmp_path):
    theirs = save_network(tmp_path / "weights.safetensors", "test_resnet")
    given = ["finetune.timm.model=test_resnet", f"finetune.timm.weights={tmp_path / 'weights.safetensors'}"]
    finetune = load_config(compose(tmp_path / "params.yaml", *given)).finetune
    sizes = {"name": "test_resnet", "image_size": 32, "channels": 3, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
    for method, is_same in (("timm", True), ("gaussian", False)):
        started = with_initial_weights(network_classifier(sizes, 4, sigma=0.5), method, finetune)
        assert torch.equal(started.network.conv1[0].weight, theirs.conv1[0].weight) == is_same


@torch.no_grad()
def test_a_grey_image_counts_as_three_equal_channels(tmp_path):
    theirs = save_network(tmp_path / "w", "test_resnet")
    network = started("test_resnet", "test_resnet", str(tmp_path / "w"), channels=1)
    grey = torch.rand(2, 1, 32, 32)
    expected = theirs.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(network.forward_features(grey), expected, rtol=1e-4, atol=1e-4)


def test_what_a_network_takes(tmp_path):
    save_network(tmp_path / "w")
    takes = input_of(load_timm("test_resnet", tmp_path / "w"), "it")
    assert (takes.architecture, takes.side, takes.any_side, takes.channels) == ("test_resnet", 160, True, 3)
    assert takes.for_channels(3) == ([0.5] * 3, [0.5] * 3) and takes.for_channels(1) == ([0.5], [0.5])
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 3}
    save_for_hf(timm.create_model("test_vit2", **sizes), tmp_path / "vit", model_args=sizes)
    takes = input_of(load_timm(str(tmp_path / "vit")), "it")
    assert (takes.architecture, takes.side, takes.any_side) == ("test_vit2", 32, False)  # of its position embedding


@pytest.mark.parametrize(
    ("name", "changes", "channels", "said"),
    [
        ("test_resnet", {"in_chans": 1}, 3, "images of 1 channels, and the images have 3; set data.channels = 1"),
        ("test_resnet", {"in_chans": 5}, 3, "images of 5 channels, and the images have 3; set data.channels = 5"),
        ("test_efficientnet", {}, 3, "is (missing|unknown): weights of another network"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, name, changes, channels, said):
    save_for_hf(save_network(tmp_path / "w", name, **changes), tmp_path / "folder", model_args=changes)
    with pytest.raises(RRCMError, match=said) as caught:
        started("test_resnet", str(tmp_path / "folder"), None, channels)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "folder"))


def test_a_file_of_other_weights_is_refused_in_one_line(tmp_path):
    save_network(tmp_path / "w", "test_efficientnet")
    with pytest.raises(RRCMError, match="not the weights of timm's test_resnet") as caught:
        started("test_resnet", "test_resnet", str(tmp_path / "w"))
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_the_stages_train_and_certify_a_network_from_timms_weights(project):
    """Joint, for grey images, without a noise level: a cascade of the same network at two sigmas."""
    theirs = save_network(project / "w.safetensors")
    change(project, methods=["timm_joint"], sigmas=[0.25, 0.5], model__architecture="test_resnet")
    change(project, pretrain__objectives=[], finetune__layer_decay=1.0, finetune__epochs=1, finetune__warmup_epochs=0)
    change(project, finetune__timm={"model": "test_resnet", "weights": "w.safetensors"}, certify__max_images=4)
    for command in (["finetune", "timm_joint", "joint"], ["certify", "timm_joint", "0.25"]):
        answer = stage(project, *command)
        assert answer.returncode == 0, answer.stderr
    folder = project / "models/timm_joint/joint"
    loaded = load_model_folder(folder, sigma=0.5)
    assert load_base_classifier(str(folder), sigma=0.25).sigma == 0.25 and loaded.num_classes == 10
    tuned, expected = loaded.classifier.network.state_dict(), theirs.state_dict()
    shared = {
        key: nn.functional.cosine_similarity(tuned[key].flatten(), expected[key].flatten(), dim=0)
        for key in ("layer1.0.conv1.weight", "layer2.0.conv2.weight")
    }
    assert all(0.8 < value < 1 - 1e-7 for value in shared.values()), shared


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("timm_settings", "said"),
    [
        ({"model": "test_resnet", "weights": "nowhere"}, "nowhere: no such file"),
        ({"model": "test_efficientnet", "weights": "w"}, "w: not the weights of timm's test_efficientnet"),
        ({"model": None, "weights": None}, "finetune.timm.model null must be the name of a model in timm"),
    ],
)
def test_a_start_that_does_not_fit_is_found_before_training(project, timm_settings, said):
    save_network(project / "w")
    change(project, methods=["timm"], model__architecture="test_resnet", pretrain__objectives=[])
    change(project, finetune__layer_decay=1.0, finetune__timm=timm_settings)
    answer = stage(project, "finetune", "timm", "0.5")
    assert answer.returncode == 1 and said in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
