"""What fine-tuning starts from: our pre-training, a folder of ours, the authors' checkpoints, ViTs of timm's."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import assert_close, change, compose, stage
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.layers import SwiGLUPacked
from torch import nn

from rrcm.config import Config, load_config
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.kinds import load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.timm_vit import convert_timm_vit
from rrcm.models.vit import NoiseConditionedViT
from rrcm.training.plan import time_condition
from rrcm.training.start import linear_probe, load_initial_encoder
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.tensors import sha256_tensors

pytestmark = pytest.mark.thorough  # trains from each kind of start

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # each channel its own
OURS = {"image_size": 16, "channels": 3, "patch_size": 4}
AUTHORS = ["data.image_size=16", "data.channels=3", "model.embed_dim=48", "model.num_heads=3", "pretrain.max_levels=20"]


def timm_vit(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    """A small one for 16 pixels and patches of 4; nothing in it is 0 or 1, so that nothing can be forgotten."""
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    overlay = {"mean": MEAN, "std": DEVIATION}
    network = timm.create_model(name, pretrained_cfg_overlay=overlay, **{**small, **changes}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def as_timm_sees(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """timm's own representation of images in [0, 1]: its class token after the last norm."""
    data = resolve_model_data_config(network)
    mean, deviation = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    return network.forward_features((pixels.expand(-1, 3, -1, -1) - mean) / deviation)[:, 0]


def tokens_of(encoder: NoiseConditionedViT, pixels: torch.Tensor, t: float) -> torch.Tensor:
    """What the first block of ours is given: class, time, patches."""
    seen = []
    hook = encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(2 * pixels - 1, t)
    hook.remove()
    return seen[0]


def without_time_token(encoder: NoiseConditionedViT, pixels: torch.Tensor, t: float) -> torch.Tensor:
    tokens = tokens_of(encoder, pixels, t)
    tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
    return encoder.norm(encoder.blocks[-1].forward_cls(encoder.blocks[:-1](tokens)))


@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"no_embed_class": True}, {"mlp_ratio": 3.3, "qkv_bias": False}])
@torch.no_grad()
def test_a_transplanted_vit_is_timms_with_one_token_more(changes, channels, t):
    network, pixels = timm_vit(**changes), torch.rand(2, channels, 16, 16)
    before = sha256_tensors(network.state_dict())
    encoder = convert_timm_vit(network, "it", **OURS | {"channels": channels}, t=t).eval()
    expected = as_timm_sees(network, pixels)
    assert_close(without_time_token(encoder, pixels, t), expected)
    assert (without_time_token(encoder, pixels, t + 0.5) - expected).abs().max() > 1e-2  # the stem is folded for one t
    assert sha256_tensors(network.state_dict()) == before


@torch.no_grad()
def test_the_time_token_starts_as_a_patch_of_the_mean_colour_at_the_mean_place():
    network, t = timm_vit(), 1.0
    encoder = convert_timm_vit(network, "it", **OURS, t=t).eval()
    mean_colour = torch.tensor(MEAN)[None, :, None, None].expand(1, 3, 16, 16)
    tokens = tokens_of(encoder, torch.cat([mean_colour, torch.rand(1, 3, 16, 16)]), t)
    assert_close(tokens[0, 1], tokens[0, 2:].mean(dim=0))
    assert_close(tokens[1, 1], tokens[0, 1])


@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 4), (8, 4), (16, 2), (32, 8)])
@torch.no_grad()
def test_other_sizes_are_resampled_as_timm_loads_them(tmp_path, image_size, patch_size):
    network, pixels = timm_vit(), torch.rand(2, 3, image_size, image_size)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"mean": MEAN, "std": DEVIATION, "file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    sizes = {"img_size": image_size, "patch_size": patch_size, "embed_dim": 48, "depth": 3, "num_heads": 3}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **sizes
    )
    encoder = convert_timm_vit(network, "it", image_size=image_size, channels=3, patch_size=patch_size, t=1.0)
    ours = without_time_token(encoder.eval(), pixels, 1.0)
    assert_close(ours, as_timm_sees(theirs.eval(), pixels))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_values": 1e-5}, "LayerScale"),
        ({"qk_norm": True}, "qk_norm"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"global_pool": "avg"}, "avg pooling"),
        ({"global_pool": "map"}, "AttentionPoolLatent"),
        ({"fc_norm": True}, "fc_norm"),
        ({"pre_norm": True}, "pre_norm"),
        ({"final_norm": False}, "no norm after its blocks"),
        ({"pos_embed": "none"}, "no learned position embedding"),
        ({"embed_norm_layer": "layernorm"}, "a norm in its stem"),
        ({"in_chans": 4}, "a stem for 4 channels"),
        ({"scale_attn_norm": True}, "a norm inside its attention"),
        ({"scale_mlp_norm": True}, "a norm inside its MLPs"),
        ({"norm_layer": "rmsnorm"}, "RmsNorm"),
        ({"act_layer": "quick_gelu"}, "QuickGELU"),
        ({"mlp_layer": SwiGLUPacked}, "GluMlp"),
        ({"name": "eva02_tiny_patch14_224"}, "rotary position embedding"),
        ({"name": "vit_relpos_small_patch16_224"}, "VisionTransformerRelPos"),
        ({"name": "vit_base_patch16_rpn_224"}, "ResPostBlock"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled"),
    ],
)
def test_what_cannot_be_carried_over_is_named(changes, said):
    network = timm_vit(**changes)
    with pytest.raises(RRCMError, match="which our network does not support") as caught:
        convert_timm_vit(network, "some_vit", **OURS, t=1.0)
    assert str(caught.value).startswith("some_vit: has ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_networks_than_vits_are_refused():
    with pytest.raises(RRCMError, match="a module of type ResNet"):
        convert_timm_vit(timm.create_model("test_resnet"), "test_resnet", **OURS, t=1.0)


def test_the_hash_is_of_names_and_values():
    a, b, nearly_b = torch.arange(3.0), torch.zeros(2), torch.tensor([0, 1e-9])
    assert sha256_tensors({"a": a, "b": b}) == sha256_tensors({"b": b, "a": a})
    different = ({"a": a, "b": b}, {"a": a, "c": b}, {"a": a, "b": nearly_b})
    assert len({sha256_tensors(tensors) for tensors in different}) == 3


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """Weights, inputs and answers of the authors' code."""
    return load_file(Path(__file__).parent.parent / "fixtures/authors_parity.safetensors")


def settings(tmp_path: Path, *overrides: str) -> Config:
    return load_config(compose(tmp_path / "params.yaml", *overrides))


def initial_encoder(config: Config, method: str, folder: Path) -> NoiseConditionedViT:
    """The encoder that `method` starts from, where no encoder has been pre-trained."""
    return load_initial_encoder(method, 1.0, folder / "nowhere", config.finetune, config.model, config.data)


def condition_of(config: Config, method: str, sigma: float) -> float:
    return time_condition(method, sigma, config.finetune, config.pretrain)


@pytest.mark.parametrize("prefix", ["module.", "module.base_model."])
def test_a_checkpoint_of_the_authors(reference, tmp_path, prefix):
    """Pre-trained or fine-tuned: the representation is the one that their code gave."""
    names = {f"{prefix}{k.removeprefix('student.')}": v for k, v in reference.items() if k.startswith("student.")}
    if "base_model" in prefix:
        names |= {k.replace("head.", "module.linear_head."): v for k, v in reference.items() if k.startswith("head.")}
    torch.save(names, tmp_path / "theirs.pth")
    config = settings(tmp_path, *AUTHORS, f"finetune.initial_weights={tmp_path / 'theirs.pth'}")
    encoder = initial_encoder(config, "rrcm", tmp_path).eval()
    with torch.no_grad():
        representation = encoder(reference["x"] + reference["noise"], 1.0)
    assert_close(representation, reference["cls_t1.0"])
    other = settings(tmp_path, *AUTHORS, "model.depth=3", f"finetune.initial_weights={tmp_path / 'theirs.pth'}")
    with pytest.raises(RRCMError, match=r"theirs.pth: checkpoint of another architecture: depth is 2, .* want 3"):
        initial_encoder(other, "rrcm", tmp_path)


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_grid_time_is_what_the_authors_network_is_told(reference, tmp_path, sigma):
    config = settings(tmp_path, *AUTHORS, "finetune.time_condition=nearest_level")
    condition = float(reference[f"nearest_t_noise{2 * sigma}"])
    assert condition_of(config, "rrcm", sigma) == pytest.approx(condition, rel=1e-6) and condition != 2 * sigma
    assert condition_of(config, "gaussian", sigma) == 2 * sigma  # knows of no grid
    assert condition_of(settings(tmp_path, *AUTHORS), "rrcm", sigma) == 2 * sigma


@pytest.mark.parametrize("with_head", [False, True])
def test_a_folder_of_ours(tmp_path, with_head):
    torch.manual_seed(3)
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=2, num_heads=2)
    save_model(tmp_path / "start", NoiseConditionedClassifier(encoder, 10, 0.7) if with_head else encoder)
    config = settings(tmp_path, f"finetune.initial_weights={tmp_path / 'start'}", "model.freeze_patch_embed=true")
    started = initial_encoder(config, "rrcm", tmp_path)
    assert sha256_tensors(started.state_dict()) == sha256_tensors(encoder.state_dict())
    assert [name for name, p in started.named_parameters() if not p.requires_grad] == [
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    scratch = initial_encoder(config, "gaussian", tmp_path)
    assert sha256_tensors(scratch.state_dict()) != sha256_tensors(encoder.state_dict())


def test_what_was_transplanted_comes_back_from_disk(tmp_path):
    encoder = convert_timm_vit(timm_vit(mlp_ratio=3.3), "it", **OURS, t=1.0)
    save_model(tmp_path, encoder)
    found = read_json(tmp_path / "config.json")["architecture"]
    assert (found["mlp_dim"], found["qkv_bias"], found["norm_eps"]) == (158, True, 1e-6)
    again, images = load_encoder(tmp_path), torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images, 1.0), encoder(images, 1.0))


def test_a_classifier_of_ours_tuned_again(project, trained):
    """Without models/pretrain, whose compute is then not counted; on the authors' grid of time."""
    change(
        project,
        finetune__initial_weights=str(trained / "models/rrcm/sigma_0.5"),
        finetune__time_condition="nearest_level",
        finetune__epochs=1,
        finetune__warmup_epochs=0,
    )
    answer = stage(project, "finetune", "rrcm", "0.5")
    assert answer.returncode == 0, answer.stderr
    folder = project / "models/rrcm/sigma_0.5"
    made = read_json(folder / "config.json")
    assert made["initial_weights"] == str(trained / "models/rrcm/sigma_0.5") and made["compute"]["pretrain_share"] == 0
    assert made["sigma"] == 0.5 and made["t"] != 1.0 and abs(made["t"] - 1.0) < 0.05
    assert load_base_classifier(str(folder)).sigma == 0.5


def save_timm_vit(path: Path) -> nn.Module:
    """Weights of timm's test_vit (160 pixels, patches of 16, 64 wide, 6 deep) as a file."""
    torch.manual_seed(4)
    network = timm.create_model("test_vit", num_classes=7)
    save_file(network.state_dict(), path)
    return network


@pytest.mark.thorough
def test_timms_vit_from_fine_tuning_to_certificate(project):
    """Neither models/pretrain nor our own network's size is asked for."""
    network = save_timm_vit(project / "vit.safetensors")
    change(project, methods=["timm"], finetune__timm={"model": "test_vit", "weights": "vit.safetensors"})
    change(project, finetune__epochs=2, finetune__linear_probe_epochs=1, finetune__lr=1e-3)
    for command in ("finetune", "certify"):
        answer = stage(project, command, "timm", "0.5")
        assert answer.returncode == 0, answer.stderr
    made = read_json(project / "models/timm/sigma_0.5/config.json")
    assert made["initial_weights"] == "test_vit" and made["compute"]["pretrain_share"] == 0
    assert [made["architecture"][name] for name in ("image_size", "embed_dim", "depth", "mlp_dim")] == [8, 64, 6, 192]
    started = convert_timm_vit(network, "it", image_size=8, channels=1, patch_size=4, t=1.0).state_dict()
    tuned = load_model_folder(project / "models/timm/sigma_0.5").classifier.encoder.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed"):
        cosine = nn.functional.cosine_similarity(started[name].flatten(), tuned[name].flatten(), dim=0)
        assert 0.8 < cosine < 1 - 1e-7, name


@pytest.mark.parametrize(
    ("start", "method", "said"),
    [
        ({"initial_weights": "nowhere"}, "rrcm", "finetune.initial_weights = 'nowhere': no such folder or file"),
        ({"initial_weights": "vit.safetensors"}, "rrcm", "vit.safetensors"),
        ({"timm": {"model": "test_vitt", "weights": None}}, "timm", "did you mean test_vit"),
        (
            {"timm": {"model": "test_vit", "weights": "nowhere.safetensors"}},
            "timm",
            "nowhere.safetensors: no such file",
        ),
        ({"timm": {"model": "test_vit2", "weights": "vit.safetensors"}}, "timm", "not the weights of timm's test_vit2"),
        ({"timm": {"model": None, "weights": None}}, "timm", "finetune.timm.model null must be the name"),
        ({"time_condition": "nearest"}, "rrcm", "finetune.time_condition = 'nearest'"),
    ],
)
def test_starts_that_are_refused(project, start, method, said):
    save_timm_vit(project / "vit.safetensors")
    change(project, methods=[method], **{f"finetune__{name}": value for name, value in copy.deepcopy(start).items()})
    answer = stage(project, "finetune", method, "0.5")
    lines = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert answer.returncode == 1 and len(lines) == 1 and said in lines[0], answer.stderr
    assert "Traceback" not in answer.stderr and not (project / "models" / method).exists()


def test_a_linear_probe_needs_a_head():
    training = SimpleNamespace(settings=SimpleNamespace(linear_probe_epochs=2))
    with pytest.raises(RRCMError, match=r"^finetune.linear_probe_epochs = 2: Linear has no attribute head to train; "):
        linear_probe(training, nn.Linear(2, 2), None, None)
