"""Bad input to the stages: one line that says what is wrong and where, exit status 1, and nothing overwritten."""

import os
import pickle
import resource
import runpy
import shutil

import pytest
import torch
from conftest import REPOSITORY, Answer, change, files_of, server, stage
from PIL import Image

from rrcm import load_authors_checkpoint
from rrcm.utils.errors import RRCMError


def assert_error(answer: Answer, *parts: str) -> None:
    """The stage failed with one line, the last one on stderr, that contains all `parts`."""
    lines = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert answer.returncode == 1 and len(lines) == 1, answer.stderr
    assert answer.stderr.splitlines()[-1] == lines[0] and "Traceback" not in answer.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.slow
def test_unknown_profile_or_key(tmp_path):
    assert_error(stage(tmp_path, "compose", "profile=mnist"), "profile/mnist", "digits, fashion_mnist")
    assert_error(stage(tmp_path, "compose", "+certify.nn=3"), "certify.nn: unknown key; did you mean n?")
    assert not (tmp_path / "params.yaml").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("certify.nn=3", "Could not override 'certify.nn'. To append to your config use +certify.nn=3"),
        ("finetune.layer_decay={sigma_0.5: 1}", "use +finetune.layer_decay={sigma_0.5: 1}"),
        ("sigmas=0.5", "conf: sigmas = 0.5: should be a valid list, such as [0.5]"),
        ("certify={n: 3", "no viable alternative at input '{n: 3'"),
        ("certify.n=${n}", "Interpolation key 'n' not found"),
    ],
)
def test_overrides_that_cannot_be_composed(tmp_path, override, said):
    compose = runpy.run_path(str(REPOSITORY / "stages/compose.py"))["compose"]
    with pytest.raises(RRCMError) as caught:
        compose([override], tmp_path / "params.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value) and "conf/profile has" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "latin-1"])
def test_settings_that_hydra_cannot_read(tmp_path, encoding):
    (tmp_path / "good.yaml").write_bytes(b"a: 1\r\n")
    check_encoding = runpy.run_path(str(REPOSITORY / "stages/compose.py"))["check_encoding"]
    check_encoding(tmp_path)
    (tmp_path / "mine.yaml").write_text("a: 1 # é", encoding=encoding)
    with pytest.raises(RRCMError, match=r"mine\.yaml: must be UTF-8 without a byte order mark"):
        check_encoding(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shard_data", "pretrain", "plot"])
def test_every_stage_checks_all_settings_first(project, name):
    change(project, report__radii=[0.333])
    assert_error(stage(project, name), "params.yaml", "report.radii 0.333 must be a multiple of certify.radius_step")
    change(project, report__radii=[0.5], sigmas=[-1.0])
    assert_error(stage(project, name), "sigmas.0 = -1.0", "greater than 0")


@pytest.mark.slow
def test_a_sigma_that_is_not_in_the_settings(project):
    assert_error(stage(project, "finetune", "rrcm", "0.7"), "rrcm at sigma 0.7", "[0.25, 0.5]")


@pytest.mark.slow
def test_a_folder_without_git(tmp_path):
    """A copy of the files alone, in which no `make` has configured DVC to work without git."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    assert_error(stage(tmp_path, "repro"), "not a git repository; `make install` tells DVC to do without git")


@pytest.fixture
def pictures(project):
    """An image folder: two classes of six 8x8 images."""
    for label in ("cat", "dog"):
        (project / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), 20 * i).save(project / "pictures" / label / f"{i}.png")
    change(project, data__source="imagefolder", data__root="pictures")
    (project / "data/shards").unlink()
    return project / "pictures"


@pytest.mark.slow
def test_a_missing_dataset_folder(project, pictures):
    shutil.rmtree(pictures)
    assert_error(stage(project, "shard_data"), "pictures")


@pytest.mark.slow
def test_a_class_folder_without_images(project, pictures):
    (pictures / "emu").mkdir()
    assert_error(stage(project, "shard_data"), "emu")
    assert not (project / "data/shards").exists()


@pytest.mark.slow
def test_one_unreadable_image(project, pictures):
    (pictures / "dog" / "3.png").write_bytes(b"not a picture")
    answer = stage(project, "shard_data")
    progress = ("compare images", "shard-data")
    named, error = [line for line in answer.stderr.splitlines() if not line.startswith(progress)]
    assert answer.returncode == 1 and "3.png: cannot be decoded" in named
    assert error.startswith("error: 1 of 12 images cannot be read")
    assert not (project / "data/shards").exists()
    (pictures / "dog" / "3.png").unlink()
    assert stage(project, "shard_data").returncode == 0


@pytest.fixture
def own_shards(project):
    """A private copy of the shards, to be damaged."""
    link = project / "data/shards"
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    return link


@pytest.mark.slow
def test_a_truncated_shard(project, own_shards):
    shard = own_shards / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert_error(stage(project, "pretrain"), "train-00001.tar")


@pytest.mark.slow
def test_a_shard_of_another_data_set(project, own_shards):
    change(project, seed=1)
    other = project / "other"
    assert stage(project, "shard_data", "--output", str(other)).returncode == 0
    shutil.copy(other / "train-00000.tar", own_shards / "train-00000.tar")
    assert_error(stage(project, "pretrain"), "train-00000.tar")


@pytest.fixture
def with_encoder(project, trained):
    """A project with a pre-trained encoder."""
    shutil.copytree(trained / "models/pretrain/rrcm", project / "models/pretrain/rrcm")
    return project


def test_a_checkpoint_of_another_architecture(with_encoder):
    change(with_encoder, model__embed_dim=48)
    assert_error(stage(with_encoder, "finetune", "rrcm", "0.5"), "another architecture", "embed_dim is 32", "want 48")


def test_a_truncated_checkpoint(with_encoder):
    weights = with_encoder / "models/pretrain/rrcm/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_error(stage(with_encoder, "finetune", "rrcm", "0.5"), "model.safetensors", "truncated")


@pytest.mark.slow
def test_a_missing_checkpoint(project):
    assert_error(stage(project, "finetune", "rrcm", "0.5"), "models/pretrain/rrcm/config.json", "no such file")
    assert_error(stage(project, "certify", "rrcm", "0.5"), "models/rrcm/sigma_0.5/config.json", "no such file")


class Payload:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_pickle_with_code_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module.pos_embed": Payload()}, "bad.pth")
    with pytest.raises(RRCMError, match="holds more than tensors") as caught:
        load_authors_checkpoint("bad.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "owned").exists()
    torch.load("bad.pth", weights_only=False)  # the payload does run without our check
    assert (tmp_path / "owned").exists()
    (tmp_path / "worse.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(RRCMError):
        load_authors_checkpoint("worse.pth")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"a": torch.zeros(3)}, "no ViT with a time token"),
        ([torch.zeros(3)], "not a state dict"),
        (b"PK\x03\x04 half a zip", "truncated or not a torch checkpoint"),
    ],
)
def test_files_that_are_not_an_authors_checkpoint(tmp_path, content, part):
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RRCMError) as caught:
        load_authors_checkpoint(path)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite(project, trained):
    change(project, pretrain__lr=1e30, pretrain__warmup_steps=1)
    assert_error(
        stage(project, "pretrain"), "is not finite at step", "images of train-00000.tar", "No state had been saved yet"
    )
    assert not (project / "models").exists()
    shutil.copytree(trained / "models/pretrain/rrcm", project / "models/pretrain/rrcm")
    change(project, finetune__lr=1e30, finetune__warmup_epochs=0)
    assert_error(stage(project, "finetune", "rrcm", "0.5"), "is not finite at step", "images of train-")
    assert not (project / "models/rrcm").exists()


def _limited(folder, limit, name, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from conftest import _run_stage

    _run_stage(folder, name, arguments, {})


def test_a_full_disk_while_an_output_is_written(project, trained):
    """The system itself makes the write fail: a limit on the size of files stands in for the full disk."""
    shutil.copytree(trained / "models/pretrain/rrcm", project / "models/pretrain/rrcm")
    before = files_of(project / "models/pretrain/rrcm")
    change(project, pretrain__checkpoint_every=1000)
    process = server.Process(target=_limited, args=(project, 40_000, "pretrain"))
    process.start()
    process.join()
    answer = Answer(process.exitcode, "", (project / "stderr").read_text())
    assert_error(answer, "cannot write it", "nothing was overwritten")
    assert files_of(project / "models/pretrain/rrcm") == before
    assert [path.name for path in (project / "models").iterdir()] == ["pretrain"]


def test_a_full_disk_while_certifying(project, trained):
    shutil.copytree(trained / "models/rrcm", project / "models/rrcm")
    process = server.Process(target=_limited, args=(project, 3000, "certify", "rrcm", "0.5"))
    process.start()
    process.join()
    answer = Answer(process.exitcode, "", (project / "stderr").read_text())
    assert_error(answer, "runs/certify-0.5-", "cannot write it", "run it again to continue")
    assert stage(project, "certify", "rrcm", "0.5").returncode == 0
    assert files_of(project / "certificates") == files_of(trained / "certificates")


def test_a_long_message_keeps_its_start_and_its_end():
    message = str(RRCMError(f"a.tsv, line 2: label '{'x' * 200_000}': must be a whole number; correct it"))
    assert len(message) <= 1000 and message.startswith("a.tsv, line 2: label 'xxx")
    assert "x ... (200,0" in message and message.endswith("x': must be a whole number; correct it")
    assert str(RRCMError("y" * 1000)) == "y" * 1000 and str(RRCMError(message)) == message
