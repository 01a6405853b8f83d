"""The contract between training, certification and code outside the package: base classifiers and model folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, change_model
from torch import nn

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier, Normalized
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.folders import write_model_folder
from rrcm.models.kinds import FOLDER_LOADERS, LoadedClassifier, load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json


def small(num_classes: int = 3, t: float = 1.0, seed: int = 0) -> NoiseConditionedClassifier:
    torch.manual_seed(seed)
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=1, num_heads=2)
    classifier = NoiseConditionedClassifier(encoder, num_classes, t)
    nn.init.normal_(classifier.head.weight)
    return classifier.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path / "model", small(), class_names=["cat", "dog", "fox"], sigma=0.49, method="rrcm")
    return tmp_path / "model"


def test_a_noise_conditioned_classifier_keeps_the_contract():
    classifier = small(num_classes=7, t=0.5)
    assert isinstance(classifier, BaseClassifier)
    assert (classifier.num_classes, classifier.sigma) == (7, 0.25)
    assert classifier.keeps_float32_input and not classifier.stochastic
    pixels = torch.rand(6, 1, 8, 8)
    assert classifier(pixels).shape == (6, 7)
    torch.testing.assert_close(classifier(pixels, num_chunks=3), classifier(pixels))


@pytest.mark.parametrize(("keeps", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_pixels_are_rounded_before_a_bfloat16_network_unless_it_keeps_float32(keeps, dtype):
    class Network(BaseClassifier):
        num_classes, keeps_float32_input = 2, keeps

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, noisy, draw=None):
            assert noisy.dtype == dtype and self.layer.weight.dtype == torch.bfloat16 and draw is None
            return self.layer(noisy.flatten(1).bfloat16())

    smoothed = SmoothedClassifier(Network(), 0.5, 2, precision="bf16", batch_size=50)
    assert len(smoothed.certify(torch.rand(2, 1, 2, 2), n=150)) == 2
    assert smoothed(torch.rand(2, 1, 2, 2)).shape == (2, 2)


def test_normalized_images_of_a_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    classifier = Normalized(network, 5, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    pixels = torch.rand(4, 3, 2, 2)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    expected = network((pixels - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(classifier(pixels), expected)
    assert (classifier.num_classes, classifier.sigma, classifier.keeps_float32_input) == (5, None, False)


def test_a_model_folder_says_what_certification_needs(folder):
    config = read_json(folder / "config.json")
    assert [config[key] for key in ("kind", "format", "class_names", "sigma", "t", "method")] == [
        *("classifier", 3, ["cat", "dog", "fox"], 0.49, 1.0, "rrcm")
    ]
    loaded = load_base_classifier(folder)
    assert (loaded.class_names, loaded.num_classes, loaded.image_size, loaded.channels) == (
        *(["cat", "dog", "fox"], 3, 8, 1),
    )
    assert loaded.sigma == loaded.classifier.sigma == 0.49 and loaded.classifier.t == 1.0
    assert not loaded.classifier.training
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.classifier(pixels), small()(pixels))
    assert torch.equal(load_encoder(folder)(pixels, 1.0), small().encoder(pixels, 1.0))


def test_classes_without_names_are_numbered(tmp_path):
    save_model(tmp_path, small(t=0.5))
    loaded = load_model_folder(tmp_path)
    assert (loaded.class_names, loaded.sigma) == (["0", "1", "2"], 0.25)
    with pytest.raises(RRCMError, match="2 class names for 3 classes"):
        save_model(tmp_path, small(), class_names=["cat", "dog"])


def test_weights_can_be_published_in_bfloat16(tmp_path):
    """The file has half the size, and gives the rounded weights in float32."""
    for dtype in ("fp32", "bf16"):
        save_model(tmp_path / dtype, small(), dtype=dtype)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("fp32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_model_folder(tmp_path / "bf16").classifier.state_dict()
    for name, weight in small().state_dict().items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], weight.bfloat16().float())


def test_an_encoder_has_a_kind_but_no_classes(tmp_path):
    save_model(tmp_path, small().encoder)
    assert read_json(tmp_path / "config.json")["kind"] == "encoder"
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_encoder(tmp_path)(pixels, 1.0), small().encoder(pixels, 1.0))
    for load in (load_model_folder, load_base_classifier):
        with pytest.raises(RRCMError, match=r"config\.json: this is an encoder without a head; fine-tune it first"):
            load(tmp_path)


@pytest.mark.parametrize("load", [load_encoder, load_model_folder, load_base_classifier])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": ...}, "has no `kind`"),
        ({"kind": ["classifier"]}, "has no `kind`"),
        ({"kind": "antigravity"}, "kind 'antigravity' cannot be loaded here; must be classifier"),
        ({"format": 1}, "has format 1, must be 3"),
        ({"format": ...}, "has format None, must be 3"),
        ({"architecture": {"width": 32}}, "architecture.image_size: missing"),
        ({"class_names": []}, "class_names = []: List should have at least 1 item"),
        ({"class_names": [1, 2, 3]}, "class_names.0 = 1: should be a valid string (and 2 more)"),
        ({"t": None}, "t = None: should be a valid number"),
        ({"sigma": -1.0}, "sigma = -1.0: should be greater than 0"),
        ({"class_names": ["cat", "dog"]}, "checkpoint of another architecture"),
    ],
)
def test_bad_folders_are_refused_in_one_line(folder, load, values, said):
    change_model(folder, **values)
    if "kind" in values and load is load_encoder:
        said = said.replace("must be classifier", "must be classifier or encoder")
    with pytest.raises(RRCMError) as error:
        load(folder)
    assert str(error.value).startswith(str(folder)) and said in str(error.value) and "\n" not in str(error.value)
    assert "antigravity" not in sys.modules  # no name in a config.json is imported


@pytest.mark.parametrize("text", [None, "", "[1]", '"classifier"'])
def test_a_folder_without_a_readable_config_is_refused(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(RRCMError, match=r"config\.json: ") as error:
        load_base_classifier(folder)
    assert "\n" not in str(error.value)


class Average(BaseClassifier):
    """The mean logits of two classifiers."""

    keeps_float32_input = True

    def __init__(self, members: list[NoiseConditionedClassifier], sigma: float):
        super().__init__()
        self.members, self.num_classes, self.sigma = nn.ModuleList(members), members[0].num_classes, sigma

    def forward(self, noisy, draw=None):
        return sum(member(noisy) for member in self.members) / len(self.members)


def load_average(folder: Path, config: dict) -> LoadedClassifier:
    members = [load_model_folder(folder / name).classifier for name in config["members"]]
    return LoadedClassifier(Average(members, config["sigma"]).eval(), 8, 1, config["class_names"])


def test_a_kind_from_outside_the_package_is_loaded_and_certified(tmp_path, monkeypatch):
    config = {"kind": "average", "members": ["a", "b"], "sigma": 0.5, "class_names": ["x", "y", "z"]}
    for seed, name in enumerate(config["members"]):
        save_model(tmp_path / name, small(seed=seed))
    write_model_folder(tmp_path, config)
    with pytest.raises(RRCMError, match="kind 'average' cannot be loaded here; must be classifier"):
        load_base_classifier(tmp_path)

    monkeypatch.setitem(FOLDER_LOADERS, "average", load_average)
    loaded = load_base_classifier(tmp_path)
    assert (loaded.class_names, loaded.sigma, loaded.num_classes) == (["x", "y", "z"], 0.5, 3)
    smoothed = SmoothedClassifier(loaded.classifier, loaded.sigma, loaded.num_classes, batch_size=64)
    images = torch.rand(4, 1, 8, 8)
    expected = SmoothedClassifier(Average([small(seed=0), small(seed=1)], 0.5), 0.5, 3, batch_size=64)
    assert smoothed.certify(images, n=200) == expected.certify(images, n=200)


@pytest.mark.thorough
def test_loading_and_certifying_import_no_timm():
    """timm takes seconds to import; only its own models need it."""
    code = (
        "import sys; import rrcm.certification.certify, rrcm.models.load; "
        "print([name for name in sys.modules if name.split('.')[0] in ('timm', 'torchvision')])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "[]\n"
