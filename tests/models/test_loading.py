"""Weights and models as other people save them: prefixes, nested state dicts, timm snapshots, the hub, and no code."""

import argparse
import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from conftest import change_model, compose
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from typer.testing import CliRunner

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.cli import app
from rrcm.config import load_config
from rrcm.derived import watched_weights
from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.kinds import load_model_folder
from rrcm.models.load import class_folders, load_base_classifier
from rrcm.models.timm_models import _weights_only, load_timm
from rrcm.models.vit import NoiseConditionedViT
from rrcm.training.start import load_initial_encoder
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_tensors, load_weights, plain_names

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


class Payload:
    """Makes the folder `owned` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def ours() -> NoiseConditionedClassifier:
    torch.manual_seed(0)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=64, depth=1, num_heads=1), 3, 1.0)
    nn.init.normal_(classifier.head.weight)
    return classifier.eval()


def timm_net(**changes: object) -> nn.Module:
    torch.manual_seed(1)
    network = timm.create_model("test_vit", **{"num_classes": 3, **changes}).eval()
    nn.init.normal_(network.head.weight)
    return network


def of_the_authors(classifier: NoiseConditionedClassifier) -> dict[str, torch.Tensor]:
    """Its weights under the authors' names."""
    names = {"encoder.": "base_model.", "head.": "linear_head."}
    weights = classifier.state_dict()
    return {new + n.removeprefix(old): w for old, new in names.items() for n, w in weights.items() if n.startswith(old)}


def in_a_model_folder(tensors: dict[str, torch.Tensor]) -> nn.Module:
    save_model("folder", ours())
    save_file(tensors, "folder/model.safetensors")
    change_model(Path("folder"))
    return load_base_classifier("folder").classifier


def in_an_authors_file(tensors: dict[str, torch.Tensor]) -> nn.Module:
    torch.save(tensors, "theirs.pth")
    return load_base_classifier("theirs.pth", sigma=0.5).classifier


def in_a_timm_file(tensors: dict[str, torch.Tensor]) -> nn.Module:
    torch.save(tensors, "timm.bin")
    return load_base_classifier("test_vit", weights=Path("timm.bin")).classifier.network


def in_a_snapshot(tensors: dict[str, torch.Tensor]) -> nn.Module:
    save_for_hf(timm_net(), "snapshot")
    torch.save(tensors, "snapshot/pytorch_model.bin")
    return load_base_classifier("snapshot").classifier.network


PLACES = [
    (in_a_model_folder, ours, lambda network: network.state_dict()),
    (in_an_authors_file, ours, of_the_authors),
    (in_a_timm_file, timm_net, lambda network: network.state_dict()),
    (in_a_snapshot, timm_net, lambda network: network.state_dict()),
]
PREFIXES = {
    "compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "both, the other way": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "of a block": lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
}


def same(a: nn.Module, b: nn.Module, **tolerance: float) -> bool:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), **(tolerance or {"rtol": 0, "atol": 0}))
    return True


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("load", "make", "names"), PLACES)
def test_prefixes_of_wrappers_are_removed_everywhere(load, make, names, prefix):
    assert same(load({PREFIXES[prefix](name): tensor for name, tensor in names(make()).items()}), make())


def test_wrappers_of_torch_add_these_prefixes(tmp_path):
    """What `state_dict` gives, not what we believe it gives."""
    network = ours()
    wrapped = [
        torch.compile(network, backend="eager"),
        nn.DataParallel(network),
        nn.DataParallel(torch.compile(network, backend="eager")),
        torch.optim.swa_utils.AveragedModel(network),
    ]
    for each in wrapped:
        save_file({name: t.clone() for name, t in each.state_dict().items()}, tmp_path / "weights.safetensors")
        assert set(each.state_dict()) != set(network.state_dict())
        assert same(load_weights(ours(), load_tensors(tmp_path / "weights.safetensors"), "it"), network)
    network.encoder = torch.compile(network.encoder, backend="eager")
    assert plain_names(network.state_dict(), "it").keys() == ours().state_dict().keys()


def test_weights_that_would_get_one_name_are_refused():
    with pytest.raises(RRCMError, match=r"^it: two weights are called a.b without their prefixes$"):
        plain_names({"a.b": torch.zeros(1), "module.a.b": torch.zeros(1)}, "it")


NESTS = {
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 7},
    "model": lambda weights: {"model": weights, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(lr=0.1)},
    "model_ema": lambda weights: {"model": {n: t + 1 for n, t in weights.items()}, "model_ema": weights},
    "twice": lambda weights: {"model": {"state_dict": weights}},
    "with a prefix": lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "parameters": lambda weights: {name: nn.Parameter(tensor) for name, tensor in weights.items()},
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize(("load", "make", "names"), PLACES[1:])
def test_state_dicts_may_be_nested(load, make, names, nest):
    assert same(load(NESTS[nest](names(make()))), make())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("load", "make", "names"), PLACES)
def test_weights_of_other_precisions_are_loaded_as_float32(load, make, names, dtype):
    loaded = load({name: tensor.to(dtype) for name, tensor in names(make()).items()})
    assert same(loaded, make(), rtol=1e-2, atol=1e-2)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(("load", "make", "names"), PLACES)
def test_whole_numbers_are_not_taken_for_weights(load, make, names):
    with pytest.raises(RRCMError, match=r"has numbers of type torch\.int8") as error:
        load({name: tensor.to(torch.int8) for name, tensor in names(make()).items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights.pth", "weights"])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_the_first_bytes_tell_the_format(name, save):
    weights = {"a": torch.randn(3)}
    save(weights, name)
    assert torch.equal(load_tensors(Path(name))["a"], weights["a"])
    torch.save(weights, name, _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(Path(name))["a"], weights["a"])


def bad_file(kind: str, path: str) -> None:
    tensors = {"a": torch.zeros(3)}
    contents = {
        "lfs": LFS,
        "page": b"\n<!DOCTYPE html><html><title>Sign in</title></html>",
        "empty": b"",
        "text": b"not found",
        "pickle": pickle.dumps(Payload()),
    }
    if kind in contents:
        Path(path).write_bytes(contents[kind])
    elif kind == "script":
        torch.jit.script(nn.Linear(2, 2)).save(path)
    elif kind == "cut":
        torch.save(tensors, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-60])
    else:
        objects = {
            "payload": {"state_dict": {"a": Payload()}},
            "payload beside": {"state_dict": tensors, "hook": Payload()},
            "module": nn.Linear(2, 2),
            "list": [tensors],
            "numbers": {0: torch.zeros(3)},
            "sparse": {"a": torch.eye(3).to_sparse()},
            "meta": {"a": torch.zeros(3, device="meta")},
            "text inside": {"a": "b"},
        }
        torch.save(objects[kind], path)


BAD_FILES = {
    "lfs": r": a pointer of Git LFS, not the weights; run `git lfs pull` in that folder$",
    "page": r": a web page, not the weights; download the file itself$",
    "empty": "truncated or not",
    "text": "or is damaged; no code in it was run",
    "pickle": "or is damaged; no code in it was run",
    "script": r": a program, not weights; give --model a function that .* with torch.jit.load, .* SmoothedClassifier$",
    "cut": "truncated or not",
    "payload": r"holds more than tensors \(posix.mkdir\), .* no code in it was run; save the state dict alone",
    "payload beside": r"holds more than tensors \(posix.mkdir\)",
    "module": r"holds more than tensors \(torch.nn.modules.linear.Linear\)",
    "list": "not a state dict of tensors$",
    "numbers": "not a state dict of tensors$",
    "sparse": "a is no dense tensor with values",
    "meta": "a is no dense tensor with values",
    "text inside": "a is no dense tensor with values",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "error::UserWarning")
@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("load", ["theirs.pth", "timm.bin", "snapshot", "encoder"])
def test_bad_files_end_in_one_line_and_run_no_code(load, kind):
    path = {"snapshot": "snapshot/pytorch_model.bin"}.get(load, load)
    if load == "snapshot":
        save_for_hf(timm_net(), "snapshot")
    bad_file(kind, path)
    with pytest.raises(RRCMError, match=BAD_FILES[kind]) as error:
        if load == "timm.bin":
            load_timm("test_vit", path)
        elif load == "encoder":
            load_encoder(path)
        else:
            load_base_classifier(load, sigma=0.5)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)
    assert not Path("owned").exists()


def test_the_payload_would_run():
    torch.save({"a": Payload()}, "bad.bin")
    torch.load("bad.bin", weights_only=False)
    assert Path("owned").exists()


@pytest.mark.parametrize("content", [LFS, b"", b"<html>", b"no weights"])
def test_a_model_folder_with_a_pointer_instead_of_weights(content):
    save_model("folder", ours())
    Path("folder/model.safetensors").write_bytes(content)
    with pytest.raises(RRCMError, match=r"^folder/model.safetensors: ") as error:
        load_base_classifier("folder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (1, 1, 64)),
        ("pos_embed", (64,)),
        ("pos_embed", (1, 2, 64)),
        ("patch_embed.proj.weight", (64, 1, 4)),
        ("patch_embed.proj.weight", (0, 1, 4, 4)),
        ("blocks", (1,)),
        ("blocks.999999999.norm1.weight", (64,)),
        ("linear_head.bias", ()),
        ("linear_head.bias", None),
    ],
)
def test_odd_shapes_of_an_authors_file_end_in_one_line(name, shape):
    weights, name = of_the_authors(ours()), name if name.startswith("linear_head") else f"base_model.{name}"
    weights.pop(name, None)
    if shape is not None:
        weights[name] = torch.zeros(shape)
    torch.save(weights, "theirs.pth")
    with pytest.raises(RRCMError, match=r"^theirs.pth: ") as error:
        load_authors_checkpoint("theirs.pth", sigma=0.5)
    assert "\n" not in str(error.value)


def test_an_authors_projector_without_its_layers():
    trunk = {n.removeprefix("base_model."): t for n, t in of_the_authors(ours()).items() if "linear" not in n}
    torch.save(trunk | {"projection_head.1.bias": torch.zeros(2)}, "theirs.pth")
    with pytest.raises(RRCMError, match=r"^theirs.pth: not an authors' checkpoint \(the 0.weight of its head"):
        load_authors_checkpoint("theirs.pth")


# --- timm snapshots ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch) -> Callable[..., Path]:
    """Make a folder a snapshot `group/net` in a cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("cache").absolute()))

    def put(folder: str, revision: str = "main") -> Path:
        commit = revision.encode().hex().zfill(40)
        repository = Path("cache/models--group--net")
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        return Path(folder).rename(repository / "snapshots" / commit)

    return put


def change_config(**values: object) -> None:
    config = json.loads(Path("snapshot/config.json").read_text()) | values
    Path("snapshot/config.json").write_text(json.dumps(config))


def pixels(size: int = 160, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("safe", [True, False, "both"])
@pytest.mark.parametrize("where", ["snapshot", "snapshot/", "./snapshot", "~/snapshot", "local-dir:snapshot", "hub"])
def test_a_snapshot_is_loaded_from_wherever_it_is(hub, where, safe):
    save_for_hf(timm_net(), "snapshot", safe_serialization=safe)
    if where == "hub":
        hub("snapshot")
    expected = timm_net()((pixels() - 0.5) / 0.5)
    for name in ("hf-hub:group/net", "hf_hub:group/net", "hf-hub:group/net@main") if where == "hub" else (where,):
        loaded = load_base_classifier(name)
        assert (loaded.num_classes, loaded.image_size, loaded.channels, loaded.sigma) == (3, 160, 3, None)
        assert torch.equal(loaded.classifier(pixels()), expected)
        assert same(load_timm(name), timm_net())


def test_a_revision_of_a_snapshot(hub):
    for revision, bias in (("main", 1.0), ("v2.0", 2.0)):
        network = timm_net()
        nn.init.constant_(network.head.bias, bias)
        save_for_hf(network, "snapshot")
        hub("snapshot", revision)
    for name, bias in (("hf-hub:group/net", 1.0), ("hf-hub:group/net@v2.0", 2.0)):
        assert load_timm(name).head.bias.tolist() == [bias] * 3


def test_safetensors_are_preferred_to_a_pickle(hub):
    save_for_hf(timm_net(), "snapshot", safe_serialization="both")
    torch.save({"a": Payload()}, "snapshot/pytorch_model.bin")
    assert same(load_timm("snapshot"), timm_net())
    hub("snapshot")
    assert same(load_timm("hf-hub:group/net"), timm_net())


@pytest.mark.parametrize("load", [load_timm, load_base_classifier])
def test_a_pickle_from_the_hub_runs_no_code(hub, load):
    save_for_hf(timm_net(), "snapshot")
    torch.save({"a": Payload()}, "snapshot/pytorch_model.bin")
    hub("snapshot")
    with pytest.raises(RRCMError, match=r"holds more than tensors \(posix.mkdir\)"):
        load("hf-hub:group/net")
    assert not Path("owned").exists()


def test_weights_of_timms_own_names_run_no_code(monkeypatch):
    """With the loaders of timm, which asked for no `weights_only` until 2025."""
    torch.save({"a": Payload()}, "bad.bin")

    def loader(*_: object, **__: object) -> dict:
        return torch.load("bad.bin", weights_only=False)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", loader)
    with pytest.raises(RRCMError, match=r"^test_vit: cannot download pretrained weights \(Weights only load failed"):
        load_timm("test_vit")
    assert not Path("owned").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with _weights_only(), pytest.raises(pickle.UnpicklingError):
        loader()


def test_a_snapshot_of_grey_images():
    network = timm_net(in_chans=1)
    save_for_hf(network, "snapshot", safe_serialization=True)
    loaded = load_base_classifier("snapshot")
    assert (loaded.image_size, loaded.channels) == (160, 1)
    assert torch.equal(loaded.classifier(pixels(160, 1)), network((pixels(160, 1) - 0.5) / 0.5))


@pytest.mark.parametrize("values", [{}, {"input_size": [3, 224, 224], "fixed_input_size": False}])
def test_a_snapshot_of_another_size(values):
    """Also where its configuration is still of the size that the network had at first."""
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    save_for_hf(network, "snapshot", safe_serialization=True)
    change_config(pretrained_cfg=json.loads(Path("snapshot/config.json").read_text())["pretrained_cfg"] | values)
    loaded = load_base_classifier("snapshot")
    assert loaded.image_size == 32
    assert torch.equal(loaded.classifier(pixels(32)), network((pixels(32) - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("labels", "descriptions", "names", "folders"),
    [
        (["cat", "dog", "fox"], None, ["cat", "dog", "fox"], {"cat": 0, "dog": 1, "fox": 2, "0": 0, "1": 1, "2": 2}),
        (["c", "d", "f"], {"c": "cat, kitty", "d": "dog"}, ["cat", "dog", "f"], {"cat": 0, "c": 0, "f": 2, "2": 2}),
        ({"0": "cat", "2": "fox"}, None, ["cat", "1", "fox"], {"cat": 0, "1": 1, "fox": 2}),
        (["2", "1", "0"], {"2": "cat", "1": "dog", "0": "fox"}, ["cat", "dog", "fox"], {"2": 0, "1": 1, "0": 2}),
        (["a", "a", "b"], {"a": "cat"}, ["a", "a", "b"], {"b": 2}),
        (None, None, ["0", "1", "2"], {"0": 0, "1": 1, "2": 2}),
    ],
)
def test_class_names_of_a_snapshot(labels, descriptions, names, folders):
    described = {"label_names": labels, "label_descriptions": descriptions} if labels else {}
    save_for_hf(timm_net(), "snapshot", model_config=described)
    loaded = load_base_classifier("snapshot")
    assert loaded.class_names == names
    known = class_folders(loaded)
    assert folders.items() <= known.items() and "a" not in known
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # as programs of Windows save text
        Path("names.txt").write_bytes("ä\r\ny\r\nz".encode(encoding))
        assert load_base_classifier("snapshot", classes=Path("names.txt")).class_names == ["ä", "y", "z"]
    Path("names.txt").write_text("x\ny\nz\n")
    assert load_base_classifier("snapshot", classes=Path("~/names.txt")).class_names == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label_names": ["a", "b"]}, "has 2 label_names for 3 classes; correct its config.json"),
        ({"label_names": {"7": "a"}}, r"label_names has a class outside 0 ... 2"),
        ({"label_names": "abc"}, "has no list of label_names for 3 classes"),
        ({"architecture": "test_vitt"}, "did you mean test_vit"),
        ({"architecture": None, "architectures": ["ViTForImageClassification"]}, "of timm or transformers"),
        ({"architecture": None}, "has no `kind`"),
        ({"num_classes": 5}, "has both 5 and 3 classes"),
        ({"model_args": {"num_classes": 4}}, "not a complete snapshot of a timm model"),
        ({"model_args": {"depth": 3}}, "not a complete snapshot of a timm model"),
        ({"model_args": {"checkpoint_path": "bad.bin"}}, "not a complete snapshot of a timm model"),
        ({"model_args": {"features_only": True}}, "not a complete snapshot of a timm model"),
        ({"model_args": [1]}, "not a complete snapshot of a timm model"),
        ({"pretrained_cfg": {"input_size": "large"}}, "not a complete snapshot of a timm model"),
    ],
)
def test_a_damaged_config_of_a_snapshot_ends_in_one_line(values, said):
    save_for_hf(timm_net(), "snapshot")
    torch.save({"a": Payload()}, "bad.bin")
    change_config(**values)
    with pytest.raises(RRCMError, match=said) as error:
        load_base_classifier("snapshot")
    assert str(error.value).startswith("snapshot") and "\n" not in str(error.value) and not Path("owned").exists()


def test_a_snapshot_without_a_head_has_no_classes_but_an_encoder():
    save_for_hf(timm.create_model("test_vit", num_classes=0), "snapshot")
    with pytest.raises(RRCMError, match=r"^snapshot: has 0 classes; certify a model that was fine-tuned"):
        load_base_classifier("snapshot")
    assert load_timm("snapshot").num_classes == 0


@pytest.mark.parametrize(
    ("files", "said"),
    [([], "it has none"), (["a.bin", "b.bin"], r"several \(a.bin, b.bin\)"), (["epoch3.pth"], None)],
)
def test_the_weights_of_a_snapshot_folder_are_found_or_asked_for(files, said):
    save_for_hf(timm_net(), "snapshot")
    weights = Path("snapshot/pytorch_model.bin").rename("weights")
    for file in files:
        Path("snapshot", file).write_bytes(weights.read_bytes())
    if said is None:
        assert same(load_timm("snapshot"), timm_net())
        return
    with pytest.raises(RRCMError, match=f"^snapshot: needs one file of weights, best model.safetensors; .*{said}"):
        load_timm("snapshot")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf-hub:", "must be hf-hub:owner/name or hf-hub:owner/name@revision"),
        ("hf-hub:net", "must be hf-hub:owner/name"),
        ("hf-hub:group/sub/net", "must be hf-hub:owner/name"),
        ("hf-hub:../../etc", "must be hf-hub:owner/name"),
        ("hf-hub:group/net", "cannot be downloaded (An error happened while trying to locate the file"),
        ("hf-hub:group/net@none", "cannot be downloaded"),
        ("hub:group/net", "a prefix must be hf-hub: or local-dir:"),
        ("group/net", "on the Hugging Face hub it would be hf-hub:group/net"),
        ("https://huggingface.co/group/net/", "on the Hugging Face hub it would be hf-hub:group/net"),
        ("local-dir:nowhere", "there is no such folder"),
        ("~nobody/net", "timm has no model of that name"),
    ],
)
@pytest.mark.parametrize("load", [load_timm, load_base_classifier])
def test_names_that_lead_nowhere_end_in_one_line(hub, name, said, load):
    with pytest.raises(RRCMError) as error:
        load(name)
    assert str(error.value).startswith(name) and said in str(error.value) and "\n" not in str(error.value)


def of_the_hub(error: str) -> Exception:
    kind = getattr(huggingface_hub.errors, error)
    return type(kind.__name__, (kind,), {"__init__": lambda self, text: Exception.__init__(self, text)})(
        "404 Client Error"
    )


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda: of_the_hub("RepositoryNotFoundError"), "the hub has no such model, or it is private; check the name"),
        (lambda: of_the_hub("GatedRepoError"), "or log in with `hf auth login`"),
        (lambda: of_the_hub("RevisionNotFoundError"), "the model has no revision 'v1' on the hub"),
        (lambda: of_the_hub("EntryNotFoundError"), "cannot be downloaded (404 Client Error"),
        (lambda: ConnectionError("no route\nto host"), "cannot be downloaded (no route to host); pass a local"),
    ],
)
def test_what_the_hub_answers_ends_in_one_line(monkeypatch, raised, said):
    def download(*_: object, **__: object) -> str:
        raise raised()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RRCMError) as error:
        load_timm("hf-hub:group/net@v1")
    assert str(error.value).startswith("hf-hub:group/net@v1: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_model_without_weights_that_timm_knows(hub):
    save_for_hf(timm_net(), "snapshot")
    Path("snapshot/pytorch_model.bin").rename("snapshot/tf_model.h5")
    hub("snapshot")
    with pytest.raises(RRCMError, match=r"has neither model\.safetensors nor pytorch_model\.bin on the hub"):
        load_timm("hf-hub:group/net")


def test_weights_are_for_names_only(hub):
    save_for_hf(timm_net(), "snapshot")
    save_file(timm_net().state_dict(), "weights.safetensors")
    for name in ("snapshot", "hf-hub:group/net"):
        for load in (load_timm, load_base_classifier):
            with pytest.raises(RRCMError, match=r"^weights.safetensors: weights are for a timm"):
                load(name, weights=Path("weights.safetensors"))
    assert same(load_timm("test_vit", "~/weights.safetensors"), timm_net())


def test_other_loaders_say_what_a_snapshot_is_for():
    save_for_hf(timm_net(), "snapshot")
    for load in (load_encoder, load_model_folder):
        with pytest.raises(RRCMError, match=r"^snapshot/config.json: of timm or transformers, .* finetune.timm.model"):
            load("snapshot")


@pytest.mark.thorough
def test_a_snapshot_is_certified_and_its_classes_name_the_folders(monkeypatch):
    network = timm_net()
    save_for_hf(network, "snapshot", model_config={"label_names": ["cat", "dog", "fox"]}, safe_serialization=True)
    for k, name in enumerate(("cat", "dog", "fox")):
        Path("images", name).mkdir(parents=True)
        noise = np.random.default_rng(k).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(noise).save(f"images/{name}/a.png")
    few = ["--n", "60", "--n0", "10", "--batch-size", "70", "--stopping", "fixed"]
    answer = CliRunner().invoke(app, ["certify", "images", "--model", "snapshot/", "--sigma", "0.5", *few])
    assert answer.exit_code == 0, answer.output
    rows = [line.split("\t") for line in Path("certificates.tsv").read_text().splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    inputs = torch.stack([torch.from_numpy(np.array(Image.open(f"images/{n}/a.png"))) for n in ("cat", "dog", "fox")])
    classifier = load_base_classifier("snapshot").classifier
    expected = SmoothedClassifier(classifier, 0.5, 3, batch_size=70).certify(
        inputs.permute(0, 3, 1, 2).float() / 255, stopping="fixed", n0=10, n=60
    )
    assert [int(row["label"]) for row in table] == [0, 1, 2]
    assert [int(row["predict"]) for row in table] == [each.prediction for each in expected]


@pytest.mark.parametrize("where", ["snapshot/", "~/snapshot", "hf-hub:group/net"])
def test_fine_tuning_starts_from_a_snapshot(hub, where):
    network = timm_net()
    save_for_hf(network, "snapshot")
    if where.startswith("hf"):
        hub("snapshot")
    overrides = ["data.image_size=16", "data.channels=3", "methods=[timm]", f"finetune.timm.model='{where}'"]
    config = load_config(compose(Path("params.yaml").absolute(), *overrides))
    encoder = load_initial_encoder("timm", 1.0, Path("nowhere"), config.finetune, config.model, config.data)
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("model", "weights", "path"),
    [
        ("test_vit", None, None),
        ("hf-hub:group/net", None, None),
        ("test_vit", "a.bin", "a.bin"),
        ("test_vit", "~/a.bin", "{home}/a.bin"),
        ("snapshot", None, "snapshot"),
        ("local-dir:snapshot", None, "snapshot"),
        ("~/snapshot", None, "{home}/snapshot"),
    ],
)
def test_dvc_watches_the_snapshot(model, weights, path, tmp_path):
    Path("snapshot").mkdir()
    settings = {"timm": {"model": model, "weights": weights}, "initial_weights": "~/start"}
    path = path and path.format(home=tmp_path)
    assert watched_weights("timm", settings, {}) == path
    assert watched_weights("rrcm", settings, {}) == f"{tmp_path}/start"
    denoised = {"model": model}
    assert watched_weights("dds", settings, denoised) == (path if "snapshot" in model else None)


@pytest.mark.parametrize(("rows", "classes"), [(1000, 1000), (1001, 1000), (7, 7)])
def test_a_background_class_is_read_off_the_weights(monkeypatch, rows, classes):
    """Of some networks timm drops the first of 1001 classes. A file that timm itself saved no longer has it."""
    config = dataclasses.replace(timm.get_pretrained_cfg("test_vit"), label_offset=1)
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: config)
    monkeypatch.setattr("timm.models._builder.get_pretrained_cfg", lambda name: config)
    weights = timm_net(num_classes=rows).state_dict()
    save_file(weights, "weights.safetensors")
    network = load_timm("test_vit", "weights.safetensors")
    assert network.num_classes == classes
    assert torch.equal(network.head.weight, weights["head.weight"][rows - classes :])


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "vit_tiny_patch16_224"])
def test_weights_for_images_of_another_size_are_not_resampled(name):
    """timm resamples position embeddings without a word, and some models do so for any image."""
    network = timm.create_model(name, img_size=96, num_classes=3).eval()
    save_for_hf(network, "snapshot", safe_serialization=True)
    with pytest.raises(RRCMError, match=r"pos_embed has shape .*; give a snapshot folder") as error:
        load_base_classifier(name, weights=Path("snapshot/model.safetensors"))
    assert "\n" not in str(error.value)
    loaded = load_base_classifier("snapshot")
    assert loaded.image_size == 96  # the configuration says another
    x = (pixels(96) - loaded.classifier.mean) / loaded.classifier.std
    assert torch.equal(loaded.classifier(pixels(96)), network(x))
    change_config(model_args={"img_size": 128})
    with pytest.raises(RRCMError, match=r"pos_embed has shape .*; give a snapshot folder"):
        load_base_classifier("snapshot")


@pytest.mark.parametrize("load", [in_a_timm_file, in_a_snapshot, in_an_authors_file])
def test_weights_that_are_no_numbers_are_refused(load):
    tensors = of_the_authors(ours()) if load is in_an_authors_file else timm_net().state_dict()
    name = list(tensors)[3]
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    with pytest.raises(RRCMError, match=rf"{name} has numbers that are NaN or infinite"):
        load(tensors)
