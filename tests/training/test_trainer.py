"""The training engine: batches in parts, how a run ends before its time, what is watched, and what is compared."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, change, files_of, stage, start
from safetensors.torch import load_file
from timm.data import Mixup
from torch import nn

from rrcm.config import load_config
from rrcm.data.augment import mixup_pairs
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.objectives.contrastive import info_nce
from rrcm.objectives.moco import moco_noise_loss
from rrcm.objectives.rrcm import rrcm_loss
from rrcm.training import pretrain as pretraining
from rrcm.utils.distributed import autocast
from rrcm.utils.files import read_json

# Parts


def networks(grad_checkpointing: bool = False) -> tuple[EncoderWithProjector, EncoderWithProjector]:
    torch.manual_seed(0)
    options = {"embed_dim": 48, "depth": 3, "num_heads": 3, "grad_checkpointing": grad_checkpointing}
    student, teacher = (
        EncoderWithProjector(NoiseConditionedViT(16, 3, 4, **options), 64, 16).train() for _ in range(2)
    )
    return student, teacher.requires_grad_(False)


def loss_and_gradients(
    num_chunks: int, grad_checkpointing: bool = False, precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    student, teacher = networks(grad_checkpointing)
    batch = torch.randn(4, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with autocast(torch.device("cpu"), precision):
        terms = rrcm_loss(student, teacher, *batch, t=1.7, t_next=1.1, num_chunks=num_chunks)
    terms.total.mean().backward()
    found = {name: p.grad for name, p in student.named_parameters()} | dict(student.named_buffers())
    return found | {"loss": terms.total.detach()}


@pytest.mark.parametrize(
    ("num_chunks", "grad_checkpointing"), [(2, False), (4, False), (8, False), (1, True), (4, True)]
)
def test_a_step_in_parts_is_the_undivided_step(num_chunks, grad_checkpointing):
    whole, divided = loss_and_gradients(1), loss_and_gradients(num_chunks, grad_checkpointing)
    for name, value in whole.items():
        assert (divided[name] - value).float().norm() <= 1e-5 * value.float().norm(), name


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_mixed_precision_reaches_every_parameter(num_chunks):
    """Weights cast first where there is no gradient must not stay without one (autocast's cache before torch 2.11)."""
    exact, mixed = loss_and_gradients(1), loss_and_gradients(num_chunks, precision="bf16")
    for name, value in exact.items():
        if value is not None and value.is_floating_point():
            assert (mixed[name] - value).norm() <= 0.3 * value.norm(), name  # rounding is half of that
    with autocast(torch.device("cpu"), "bf16"):
        assert not torch.is_autocast_cache_enabled()


def bytes_kept(num_chunks: int, grad_checkpointing: bool) -> int:
    """The most that any pass through a block keeps at a time for the backward pass."""
    student, teacher = networks(grad_checkpointing)
    batch, kept, most = torch.randn(4, 64, 3, 16, 16), {}, [0]

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    for block in student.encoder.blocks:

        def measured(*inputs, forward=block.forward):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                answer = forward(*inputs)
            most[0] = max(most[0], sum(kept.values()))
            kept.clear()
            return answer

        block.forward = measured
    rrcm_loss(student, teacher, *batch, t=1.7, t_next=1.1, num_chunks=num_chunks).total.mean().backward()
    return most[0]


def test_a_quarter_of_the_batch_keeps_a_quarter_of_the_memory():
    assert bytes_kept(4, False) < 0.3 * bytes_kept(1, False)


def test_fine_tuning_in_parts_is_the_undivided_step():
    gradients = []
    for num_chunks in (1, 4):
        torch.manual_seed(0)
        encoder = NoiseConditionedViT(16, 1, 4, embed_dim=32, depth=2, num_heads=2)
        classifier = NoiseConditionedClassifier(encoder, 10, t=1.0)
        nn.init.normal_(classifier.head.weight)
        classifier(torch.randn(32, 1, 16, 16), num_chunks=num_chunks).square().sum().backward()
        gradients.append({name: p.grad for name, p in classifier.named_parameters()})
    for name, value in gradients[0].items():
        assert (gradients[1][name] - value).norm() <= 1e-5 * value.norm(), name


# Ends


def crew(folder: Path, name: str, arguments: list[str], world: int) -> list:
    """Start a stage on `world` processes that find each other as torchrun's do."""
    if world == 1:
        return [start(folder, name, *arguments)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
    return [start(folder, name, *arguments, RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(world)]


def wait_for(folder: Path, count: int, process) -> None:
    """Until a running pre-training in `folder` has written `count` checkpoints."""
    while len(list(folder.glob("runs/pretrain-*/[0-9]*.safetensors"))) < count:
        assert process.is_alive()
        wait([process.sentinel], timeout=0.01)


def ended(init_distributed: list) -> list[int]:
    for process in init_distributed:
        process.join()
    return [process.exitcode for process in init_distributed]


def undisturbed(project: Path, name: str, arguments: list[str], world: int) -> dict[str, bytes]:
    """What the stage leaves in models/ when nothing happens to it; removed again."""
    assert ended(crew(project, name, arguments, world)) == [0] * world
    files = files_of(project / "models")
    shutil.rmtree(project / "models")
    return files


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "arguments"), [("pretrain", []), ("finetune", ["gaussian", "0.5"])])
def test_twenty_kills_at_random_instants_change_no_byte(project, name, arguments, world):
    """Every process is killed, at an instant between its start and the time that the whole run takes."""
    change(project, methods=["rrcm", "gaussian"], pretrain__checkpoint_every=2, pretrain__steps=24)
    expected, rng, killed = undisturbed(project, name, arguments, world), random.Random(world), 0
    output = project / "models"
    (finished,) = {(output / name).parent for name in expected}
    while killed < 20:
        init_distributed = crew(project, name, arguments, world)
        wait([init_distributed[0].sentinel], timeout=rng.uniform(0.3, 2.5))  # the instant: nothing is waited for
        caught = all(process.is_alive() for process in init_distributed)
        for process in init_distributed:
            process.kill()
        ended(init_distributed)
        killed += caught
        if finished.exists():  # a folder for it may be there before
            assert files_of(output) == expected
            shutil.rmtree(output)
    assert ended(crew(project, name, arguments, world)) == [0] * world
    assert files_of(output) == expected


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_the_run_goes_on_from_there(project, world):
    change(project, pretrain__checkpoint_every=2, data__workers=1)
    expected = undisturbed(project, "pretrain", [], world)
    init_distributed = crew(project, "pretrain", [], world)
    wait_for(project, 1, init_distributed[0])
    before = max(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    workers = [
        int(pid) for p in init_distributed for pid in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
    ]
    for pid in [*workers, init_distributed[-1].pid]:  # one of the processes is told, and all readers, as clusters do it
        os.kill(pid, signal.SIGTERM)
    assert ended(init_distributed) == [143] * world
    said = (project / "stderr").read_text()
    assert "as told; run it again to go on" in said and "Traceback" not in said
    saved = max(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    assert saved >= before and not (project / "models").exists()
    assert ended(crew(project, "pretrain", [], world)) == [0] * world
    assert f"after step {int(saved.stem)}" in (project / "stderr").read_text()
    assert files_of(project / "models") == expected


def test_torchrun_passes_sigterm_on(project):
    """As Slurm's: the launcher is told, both workers end after the same step, and running again continues."""
    change(project, pretrain__checkpoint_every=2, pretrain__steps=200)
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", REPOSITORY / "stages/pretrain.py"]
    environment = os.environ | {"RRCM_RUNS": str(project / "runs"), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(project.glob("runs/pretrain-*/[0-9]*.safetensors")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"torchrun ended with {launcher.wait(timeout=0.02)}")
    launcher.terminate()
    said = launcher.communicate()[1]
    assert launcher.returncode != 0 and said.count("as told; run it again to go on") == 2
    saved = max(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    assert f"stopped after step {int(saved.stem)} " in said


def test_a_flipped_bit_in_the_newest_checkpoint_is_noticed(project, trained):
    process = start(project, "pretrain")
    wait_for(project, 2, process)
    process.kill()
    process.join()
    newest = max(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    answer = stage(project, "pretrain")
    assert answer.returncode == 0 and f"{newest.name}: damaged checkpoint skipped" in answer.stderr
    ours, theirs = (files_of(folder / "models/pretrain") for folder in (project, trained))
    assert ours == theirs


def test_a_run_resumed_on_two_processes_agrees(project, trained):
    """The same images, views and noise: sums are taken in another order, and 20 steps of training make that grow."""
    process = start(project, "pretrain")
    wait_for(project, 1, process)
    process.kill()
    process.join()
    assert ended(crew(project, "pretrain", [], 2)) == [0, 0]
    ours, theirs = (load_file(folder / "models/pretrain/model.safetensors") for folder in (project, trained))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=0, msg=name)


# What is to be watched


def test_live_metrics_are_there_and_go_on_after_a_kill(project):
    process = start(project, "pretrain")
    wait_for(project, 2, process)
    process.kill()
    process.join()
    (project / "dvclive/pretrain/metrics.json").write_text("{")  # killed while writing it
    assert stage(project, "pretrain").returncode == 0
    history = pd.read_csv(project / "models/pretrain/history.csv")
    live = read_json(project / "dvclive/pretrain/metrics.json")
    assert live["step"] == 30 and live["loss"] == pytest.approx(history["loss"].iloc[-1])
    drawn = pd.read_csv(project / "dvclive/pretrain/plots/metrics/loss.tsv", sep="\t")
    assert drawn["step"].tolist() == history["step"].tolist()
    assert drawn["loss"].tolist() == pytest.approx(history["loss"].tolist())


def test_live_metrics_that_cannot_be_written_stop_nothing(project):
    (project / "dvclive").write_text("a file in their place")
    answer = stage(project, "pretrain")
    assert answer.returncode == 0 and answer.stderr.count("no live metrics in dvclive/: ") == 1


def test_looks_at_the_representations(trained):
    looks = pd.read_csv(trained / "models/pretrain/representation.csv")
    assert looks["step"].tolist() == [step for step in (0, 10, 20, 30) for _ in range(4)]
    assert looks["sigma"].tolist() == [0.0, 0.25, 0.5, 1.0] * 4
    clean = looks[looks["sigma"] == 0].set_index("step")
    assert (clean["cosine"] - 1).abs().max() < 1e-6
    assert clean["knn"].between(0.3, 1).all()


def test_collapse_is_said(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    monkeypatch.setenv("RRCM_RUNS", str(project / "runs"))
    monkeypatch.setattr(pretraining, "COLLAPSED", -1.0)
    change(project, pretrain__steps=6, pretrain__evaluate_every=5)
    config = load_config(project / "params.yaml")
    pretraining.pretrain(config, project / "data/shards", project / "models/pretrain", project / "timing.json")
    said = [line for line in capfd.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 3 and "collapsed at step 5: different images have a mean cosine of 0." in said[1]


# What is compared


def test_the_loss_of_moco_with_noise():
    student, teacher = networks()
    view1, view2, noise1, noise2 = torch.randn(4, 8, 3, 16, 16)
    t1, t2 = torch.linspace(0.1, 2, 8), torch.linspace(1, 0.2, 8)
    terms = moco_noise_loss(student, teacher, view1, view2, noise1, noise2, t1=t1, t2=t2, temperature=0.3)
    x1, x2 = view1 + t1[:, None, None, None] * noise1, view2 + t2[:, None, None, None] * noise2
    z1, z2 = (student.projector(student.encoder(x, t)) for x, t in ((x1, t1), (x2, t2)))
    y1, y2 = (teacher.projector(teacher.encoder(x, t)) for x, t in ((x1, t1), (x2, t2)))
    torch.testing.assert_close(terms.contrastive, info_nce(z1, y2, 0.3) + info_nce(z2, y1, 0.3))
    assert not terms.consistency.any() and terms.total.requires_grad


def test_pre_training_with_moco_noise(project):
    change(project, pretrain__objective="moco_noise")
    answer = stage(project, "pretrain")
    assert answer.returncode == 0, answer.stderr
    history = pd.read_csv(project / "models/pretrain/history.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and (history["consistency"] == 0).all()
    assert read_json(project / "models/pretrain/config.json")["compute"] == {"pretrain": 8 * 64 * 30}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixup_does_not_depend_on_the_number_of_processes(mixup, cutmix):
    mix = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=5)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 5
    changed = 0
    for seed in range(5):
        whole = mixup_pairs(mix, images, labels, seed)
        shares = [mixup_pairs(mix, images[rows], labels[rows], seed) for rows in (slice(0, 4), slice(4, 16))]
        for one, several in zip(whole, zip(*shares, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))
        pixels = whole[0]
        changed += not torch.equal(pixels, images.float())
        inside = torch.minimum(images[::2], images[1::2]), torch.maximum(images[::2], images[1::2])
        assert ((pixels[::2] >= inside[0] - 1e-3) & (pixels[::2] <= inside[1] + 1e-3)).all()  # of its neighbour alone
    assert changed >= 3
