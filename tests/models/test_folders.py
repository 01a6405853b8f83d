"""Model folders: hashes reveal any damage, and the entries of config.json have types and bounds."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import change_model
from safetensors.torch import load_file, save_file
from torch import nn

from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.denoised import write_denoised
from rrcm.models.denoiser import EDMDenoiser, PixelViT, UNet, load_denoiser, save_denoiser
from rrcm.models.ensembles import write_ensemble
from rrcm.models.folders import part_of, read_model_config
from rrcm.models.load import load_base_classifier, load_model_folder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json

NAMES = list("abcde")
LENET = {"name": "lenet", "image_size": 16, "channels": 1, "pixel_mean": [0.3], "pixel_std": [0.5]}


def classifier(seed: int = 0) -> NoiseConditionedClassifier:
    torch.manual_seed(seed)
    return NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, 16, 1, 2), 5, 1.0).eval()


def folder_of(kind: str, root: Path) -> Path:
    """A model folder of this kind below `root`, with its parts, and a table of its training."""
    folder = root / kind
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("epoch,loss\n1,2.0\n")
    torch.manual_seed(0)
    if kind == "classifier":
        save_model(folder, classifier(), class_names=NAMES, seed=3)
    elif kind == "encoder":
        save_model(folder, classifier().encoder)
    elif kind == "network":
        save_model(folder, network_classifier(LENET, 5, sigma=0.5).eval(), class_names=NAMES)
    elif kind == "denoiser":
        save_denoiser(folder, EDMDenoiser(PixelViT(NoiseConditionedViT(8, 1, 4, 16, 1, 2))), compute=1)
    elif kind == "ensemble":
        for seed in range(2):
            save_model(folder / f"member_{seed}", classifier(seed), class_names=NAMES)
        write_ensemble(folder, ["member_0", "member_1"], NAMES)
    else:
        folder_of("denoiser", root)
        folder_of("classifier", root)
        parts = {name: part_of(folder, f"../{name}") for name in ("denoiser", "classifier")}
        write_denoised(folder, kind, parts, NAMES, sigma=0.5, settings={})
    return folder


LOADERS = {"encoder": load_encoder, "denoiser": load_denoiser}
FOLDER_KINDS = ["classifier", "encoder", "network", "denoiser", "ensemble", "dds"]


def load(folder: Path) -> nn.Module:
    return LOADERS.get(folder.name, load_base_classifier)(folder)


def refused(folder: Path, said: str = ".") -> None:
    with pytest.raises(RRCMError, match=said) as error:
        load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("kind", FOLDER_KINDS)
def test_every_flipped_bit_is_noticed(tmp_path, kind):
    folder, choice = folder_of(kind, tmp_path), random.Random(22)
    load(folder)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == {"ensemble": 6, "dds": 8}.get(kind, 3)
    for file in 3 * files:
        content = file.read_bytes()
        place, bit = choice.randrange(len(content)), 1 << choice.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        refused(folder)
        file.write_bytes(content)
    load(folder)


def test_the_line_names_the_damaged_file(tmp_path):
    folder = folder_of("classifier", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"head.bias": weights["head.bias"] + 1e-6}, folder / "model.safetensors")
    refused(folder, r"^.*/model.safetensors: is damaged: it does not match its hash")
    save_file(weights, folder / "model.safetensors")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"a"', '"b"', 1))
    refused(folder, r"^.*/config.json: is damaged or was edited")
    (folder / "config.json").write_text(text.replace("\n", "\r\n"))  # as saved on Windows, otherwise unchanged
    (folder / "history.csv").unlink()  # a copy may lack files that loading does not need
    load(folder)


@pytest.mark.parametrize("kind", ["ensemble", "dds"])
def test_a_part_that_was_trained_again_is_another(tmp_path, kind):
    folder = folder_of(kind, tmp_path)
    part = folder / "member_1" if kind == "ensemble" else tmp_path / "classifier"
    save_model(part, classifier(7), class_names=NAMES)
    refused(folder, "is not the part that the model it belongs to names")


def test_a_folder_of_an_older_version_is_read_with_a_note(tmp_path, capsys):
    folder = folder_of("classifier", tmp_path)
    config = read_json(folder / "config.json")
    old = {key: value for key, value in config.items() if key not in ("files", "sha256")}
    write_json(folder / "config.json", old | {"format": 2})
    load(folder)
    load(folder)
    assert capsys.readouterr().err.count("is of an older version, without hashes") == 1
    with pytest.raises(RRCMError, match="is of an older version"):
        part_of(tmp_path, "classifier")
    for lost in ({"format": 3}, {"format": 2, "sha256": config["sha256"]}, {"format": 2, "kind": "ensemble"}):
        write_json(folder / "config.json", old | lost)
        refused(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_no_numbers_are_refused(tmp_path, number, dtype):
    folder = folder_of("classifier", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"][2] = number
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
    change_model(folder)
    refused(folder, r"model.safetensors: head.bias has numbers that are NaN or infinite")


# What config.json says


def in_architecture(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_model(folder, architecture=read_json(folder / "config.json")["architecture"] | values)


def nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000 + "]" * 200_000)


def nested_less(folder: Path) -> None:
    """As deep as the JSON parser allows."""
    lists: list = []
    for _ in range(900):
        lists = [lists]
    change_model(folder, class_names=lists)


def with_config(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_bytes(text) and None


def pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def link(name: str, target: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return replace


ODD = {
    "depth 1.5": ("classifier", in_architecture(depth=1.5), "architecture.depth = 1.5"),
    "depth of ten million": ("classifier", in_architecture(depth=10**7), "architecture.depth = 10000000"),
    "depth of an encoder": ("encoder", in_architecture(depth=10**7), "architecture.depth = 10000000"),
    "depth of a denoiser": ("denoiser", in_architecture(depth=10**7), "depth = 10000000"),
    "another depth": ("classifier", in_architecture(depth=500), "is missing: weights of another network"),
    "negative depth": ("classifier", in_architecture(depth=-1), "architecture.depth = -1"),
    "depth true": ("classifier", in_architecture(depth=True), "architecture.depth = True"),
    "image size as text": ("classifier", in_architecture(image_size="8"), "architecture.image_size = '8'"),
    "huge images": ("classifier", in_architecture(image_size=2**40), "architecture.image_size"),
    "patch 0": ("classifier", in_architecture(patch_size=0), "architecture.patch_size = 0"),
    "patch that does not divide": ("classifier", in_architecture(patch_size=3), "must be a multiple of patch_size 3"),
    "heads that do not divide": ("classifier", in_architecture(num_heads=3), "a multiple of num_heads 3"),
    "two channels": ("classifier", in_architecture(channels=2), "architecture.channels = 2"),
    "as wide as memory": ("classifier", in_architecture(embed_dim=2**40), "has shape|describes no network"),
    "wider than numbers": ("classifier", in_architecture(mlp_dim=10**30), "describes no network"),
    "eps of zero": ("classifier", in_architecture(norm_eps=0), "architecture.norm_eps = 0"),
    "unknown entry": ("classifier", in_architecture(dpeth=2), "architecture.dpeth: unknown key; did you mean depth?"),
    "no list of names": ("classifier", lambda folder: change_model(folder, class_names="abcde"), "class_names"),
    "a long cell": ("classifier", lambda folder: change_model(folder, t="7" * 200_000), "t = '777"),
    "noise of nan": ("classifier", lambda folder: change_model(folder, t=10**400), "t = 1000"),
    "nested lists": ("classifier", nested, "cannot be read as JSON"),
    "less nested lists": ("classifier", nested_less, "class_names"),
    "not UTF-8": ("classifier", with_config(b'{"kind": "\xff"}'), "cannot be read as JSON"),
    "files elsewhere": ("classifier", lambda f: change_model(f, files={"../../x": "0" * 64}), "files"),
    "config is a pipe": ("classifier", pipe("config.json"), "not a regular file"),
    "config is endless": ("classifier", link("config.json", "/dev/zero"), "not a regular file"),
    "weights are a pipe": ("classifier", pipe("model.safetensors"), "not a regular file"),
    "weights are endless": ("classifier", link("model.safetensors", "/dev/zero"), "not a regular file"),
    "huge LeNet": ("network", in_architecture(image_size=4096), "checkpoint of another architecture"),
    "mean of three": (
        "network",
        in_architecture(pixel_mean=[0.1, 0.2, 0.3]),
        "pixel_mean has 3 numbers for 1 channels",
    ),
    "deviation of zero": ("network", in_architecture(pixel_std=[0.0]), "architecture.pixel_std.0 = 0.0"),
    "no such trunk": ("network", in_architecture(name="lenot"), "must be vit, lenet, resnet110 or a timm name"),
    "a number for a name": ("network", in_architecture(name=3), "architecture.name = 3"),
    "no such denoiser": ("denoiser", in_architecture(network="gan"), "architecture.network = 'gan'"),
    "conditional denoiser": ("denoiser", in_architecture(condition_dim=3), "condition_dim = 3"),
    "denoiser of another kind": ("denoiser", in_architecture(network="unet"), "base_channels: missing"),
    "settings of another": ("dds", lambda folder: change_model(folder, settings={"runs": 2}), "runs: unknown key"),
    "parts in a list": ("dds", lambda folder: change_model(folder, parts=[]), r"parts = \[\]"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders_are_refused_in_one_line(tmp_path, name):
    kind, harm, said = ODD[name]
    folder = folder_of(kind, tmp_path)
    harm(folder)
    refused(folder, said)


def test_a_denoiser_of_an_earlier_version_is_read(tmp_path):
    """Its config.json has a null where a conditional denoiser had a number."""
    folder = folder_of("denoiser", tmp_path)
    in_architecture(condition_dim=None)(folder)
    load(folder)


@pytest.mark.parametrize("entry", ["layers_per_block", "channel_mults"])
def test_sizes_of_other_denoisers_are_bounded(tmp_path, entry):
    """They are refused before any network is built."""
    save_denoiser(tmp_path / "denoiser", EDMDenoiser(UNet(8, 1, 8, (1, 2), 1, ())))
    load(tmp_path / "denoiser")
    in_architecture(**{entry: [1] * 10**5 if "channel" in entry else 10**7})(tmp_path / "denoiser")
    refused(tmp_path / "denoiser", entry)


@pytest.mark.parametrize(
    "path", ["/proc/self", "/dev/zero", "pipe", "nothing", "a\0b", "x" * 5000, ".", "loop", "", "a\nb", "\ud800"]
)
def test_a_member_that_is_no_model_is_refused(tmp_path, path):
    folder = folder_of("ensemble", tmp_path)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    members = read_json(folder / "config.json")["members"]
    change_model(folder, members=[members[0], members[1] | {"path": path}])
    refused(folder)


@pytest.mark.parametrize("outer", ["ensemble", "dds"])
def test_a_model_is_no_part_of_its_own_kind(tmp_path, outer):
    """Nor can it be a part of itself, since no content can include its own hash."""
    inner = folder_of(outer, tmp_path)
    folder = tmp_path / "outer"
    folder.mkdir()
    part = part_of(folder, f"../{inner.name}")
    if outer == "ensemble":
        write_ensemble(folder, [f"../{inner.name}"] * 2, NAMES)
    else:
        parts = {"denoiser": part_of(folder, "../denoiser"), "classifier": part}
        write_denoised(folder, "dds", parts, NAMES, sigma=0.5, settings={})
    with pytest.raises(RRCMError, match="a part of it is itself a"):
        load_model_folder(folder)


def test_a_long_chain_of_parts_is_one_line(tmp_path):
    """Each model of the chain classifies for the next, and has a name instead of a hash."""
    folder_of("dds", tmp_path)
    config = read_json(tmp_path / "dds/config.json")
    part = {"model": str(tmp_path / "dds"), "sha256": "0" * 64}
    change_model(tmp_path / "dds", parts=config["parts"] | {"classifier": part})
    refused(tmp_path / "dds", "parts within parts")


def test_a_hash_covers_the_parts(tmp_path):
    folder = folder_of("ensemble", tmp_path)
    before = read_model_config(folder)["sha256"]
    shutil.rmtree(folder / "member_1")
    save_model(folder / "member_1", classifier(5), class_names=NAMES)
    write_ensemble(folder, ["member_0", "member_1"], NAMES)
    assert read_model_config(folder)["sha256"] != before
