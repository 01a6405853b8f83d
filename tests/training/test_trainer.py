"""The training loop: chunked batches, kills and SIGTERM, live metrics and monitoring, contrastive pre-training."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, change, exit_codes, files_of, server, stage, start, start_all
from safetensors.torch import load_file
from timm.data import Mixup
from torch import nn

from rrcm.config import load_config
from rrcm.data.augment import mixup_pairs
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.objectives import PRETRAINING
from rrcm.objectives.contrastive import contrastive_loss, info_nce
from rrcm.objectives.rrcm import RRCMInputs, RRCMLevels, rrcm_loss
from rrcm.training import pretrain as pretraining
from rrcm.training.budget import build_pretraining_objective
from rrcm.utils.distributed import autocast
from rrcm.utils.files import read_json

# Chunks and mixed precision


def networks(grad_checkpointing: bool = False) -> tuple[EncoderWithProjector, EncoderWithProjector]:
    torch.manual_seed(0)
    student, teacher = (
        EncoderWithProjector(NoiseConditionedViT(16, 3, 4, embed_dim=48, depth=3, num_heads=3), 64, 16).train()
        for _ in range(2)
    )
    for network in (student, teacher):
        network.encoder.grad_checkpointing = grad_checkpointing
    return student, teacher.requires_grad_(False)


def loss_and_gradients(
    num_chunks: int, grad_checkpointing: bool = False, precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    student, teacher = networks(grad_checkpointing)
    batch = torch.randn(4, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with autocast(torch.device("cpu"), precision):
        terms = rrcm_loss(student, teacher, RRCMInputs(*batch), RRCMLevels(1.7, 1.1), num_chunks=num_chunks)
    terms.total.mean().backward()
    found = {name: p.grad for name, p in student.named_parameters()} | dict(student.named_buffers())
    return found | {"loss": terms.total.detach()}


@pytest.mark.parametrize(
    ("num_chunks", "grad_checkpointing"), [(2, False), (4, False), (8, False), (1, True), (4, True)]
)
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(num_chunks, grad_checkpointing):
    whole, chunked = loss_and_gradients(1), loss_and_gradients(num_chunks, grad_checkpointing)
    for name, value in whole.items():
        assert (chunked[name] - value).float().norm() <= 1e-5 * value.float().norm(), name


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_mixed_precision_gives_every_parameter_its_gradient(num_chunks):
    """Before torch 2.11 autocast's cache reuses weights that were cast under no_grad, and they get no gradient."""
    exact, mixed = loss_and_gradients(1), loss_and_gradients(num_chunks, precision="bf16")
    for name, value in exact.items():
        if value is not None and value.is_floating_point():
            assert (mixed[name] - value).norm() <= 0.3 * value.norm(), name  # rounding alone gives half of that
    with autocast(torch.device("cpu"), "bf16"):
        assert not torch.is_autocast_cache_enabled()


def bytes_kept(num_chunks: int, grad_checkpointing: bool) -> int:
    """Peak memory, in bytes, of what a forward pass through one block keeps for the backward pass."""
    student, teacher = networks(grad_checkpointing)
    batch, kept, peak = torch.randn(4, 64, 3, 16, 16), {}, [0]

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    for block in student.encoder.blocks:

        def measured(*inputs, forward=block.forward):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                answer = forward(*inputs)
            peak[0] = max(peak[0], sum(kept.values()))
            kept.clear()
            return answer

        block.forward = measured
    terms = rrcm_loss(student, teacher, RRCMInputs(*batch), RRCMLevels(1.7, 1.1), num_chunks=num_chunks)
    terms.total.mean().backward()
    return peak[0]


def test_four_chunks_need_a_quarter_of_the_memory():
    assert bytes_kept(4, False) < 0.3 * bytes_kept(1, False)


def test_a_classifier_in_chunks_has_the_gradients_of_the_whole_batch():
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


# Kills and SIGTERM


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of pre-training in `folder`, oldest first."""
    return sorted(folder.glob("runs/pretrain-*/[0-9]*.safetensors"))


def wait_for_checkpoints(folder: Path, count: int, process) -> None:
    """Wait until a running pre-training in `folder` has written `count` checkpoints."""
    while len(checkpoints(folder)) < count:
        assert process.is_alive()
        wait([process.sentinel], timeout=0.01)


def pretrain_and_kill(folder: Path, count: int, objective: str = "rrcm") -> None:
    """Start pre-training and kill it once it has written `count` checkpoints."""
    process = start(folder, "pretrain", objective)
    wait_for_checkpoints(folder, count, process)
    process.kill()
    process.join()


def run_undisturbed(project: Path, name: str, arguments: list[str], world: int) -> dict[str, bytes]:
    """The files that the stage writes to models/ when nothing interrupts it; they are deleted again."""
    assert exit_codes(start_all(project, name, arguments, world)) == [0] * world
    files = files_of(project / "models")
    shutil.rmtree(project / "models")
    return files


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("pretrain", []), pytest.param("finetune", ["gaussian", "0.5"], marks=pytest.mark.thorough)],
)
def test_twenty_kills_at_random_instants_change_no_byte(project, name, arguments, world):
    """All processes are killed at an instant drawn from the time that an undisturbed run takes."""
    change(project, methods=["rrcm", "gaussian"], pretrain__checkpoint_every=1, finetune__epochs=3)
    change(project, pretrain__steps=12, pretrain__max_levels=40, pretrain__batch_size=32, finetune__num_noise=1)
    exit_codes([start_server()])  # its imports would count
    began = time.monotonic()
    expected = run_undisturbed(project, name, arguments, world)
    duration, rng, kills = time.monotonic() - began, random.Random(world), 0
    output = project / "models"
    (finished,) = {(output / name).parent for name in expected}
    while kills < 20:
        processes = start_all(project, name, arguments, world)
        wait([processes[0].sentinel], timeout=rng.uniform(0, duration))
        kills += all(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
        exit_codes(processes)
        if finished.exists():  # models/ alone may be there earlier
            assert files_of(output) == expected
            shutil.rmtree(output)
    assert exit_codes(start_all(project, name, arguments, world)) == [0] * world
    assert files_of(output) == expected


def start_server():
    """A process that does nothing, so that the fork server has started."""
    process = server.Process(target=int)
    process.start()
    return process


@pytest.mark.thorough
@pytest.mark.parametrize("objective", sorted(PRETRAINING.keys() - {"rrcm", "dmae_without_mask"}))  # the second: as dmae
def test_a_killed_pre_training_ends_with_the_same_bytes(project, objective):
    change(project, pretrain__steps=12, pretrain__max_levels=40)
    expected = run_undisturbed(project, "pretrain", [objective], 1)
    pretrain_and_kill(project, 1, objective)
    assert stage(project, "pretrain", objective).returncode == 0
    assert files_of(project / "models") == expected


@pytest.mark.thorough
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0)])
def test_sigterm_saves_and_the_next_run_resumes(project, world, workers):
    change(project, pretrain__checkpoint_every=2)
    expected = run_undisturbed(project, "pretrain", [], world)
    change(project, data__workers=workers)
    processes = start_all(project, "pretrain", [], world)
    wait_for_checkpoints(project, 1, processes[0])
    before = checkpoints(project)[-1]
    loaders = [int(pid) for p in processes for pid in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()]
    assert len(loaders) >= workers
    for pid in [*loaders, processes[-1].pid]:  # clusters signal the data loaders too; only one rank needs a signal
        os.kill(pid, signal.SIGTERM)
    assert exit_codes(processes) == [143] * world
    saved = checkpoints(project)[-1]
    message = (project / "stderr").read_text()
    assert f"after step {int(saved.stem)}" in message and "Traceback" not in message
    assert saved >= before and not (project / "models").exists()
    assert exit_codes(start_all(project, "pretrain", [], world)) == [0] * world
    assert f"after step {int(saved.stem)}" in (project / "stderr").read_text()
    assert files_of(project / "models") == expected


@pytest.mark.thorough
def test_torchrun_passes_sigterm_on(project):
    """As under Slurm: SIGTERM reaches the launcher, and both workers save after the same step and stop."""
    change(project, pretrain__checkpoint_every=2, pretrain__steps=200)
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", REPOSITORY / "stages/pretrain.py"]
    environment = os.environ | {"RRCM_RUNS": str(project / "runs"), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
    while not checkpoints(project):
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"torchrun ended with {launcher.wait(timeout=0.02)}")
    launcher.terminate()
    message = launcher.communicate()[1]
    assert launcher.returncode != 0 and not (project / "models").exists()
    assert message.count(f"after step {int(checkpoints(project)[-1].stem)}") == 2


def test_a_flipped_bit_in_the_newest_checkpoint_is_noticed(project, trained):
    pretrain_and_kill(project, 2)
    newest = checkpoints(project)[-1]
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    result = stage(project, "pretrain")
    assert result.returncode == 0 and f"{newest.name}: damaged checkpoint skipped" in result.stderr
    assert files_of(project / "models/pretrain/rrcm") == files_of(trained / "models/pretrain/rrcm")


@pytest.mark.thorough
def test_a_run_resumed_with_two_processes_gives_similar_weights(project, trained):
    """Images, views and noise are the same. Sums are taken in another order, and the steps amplify the difference."""
    pretrain_and_kill(project, 1)
    assert exit_codes(start_all(project, "pretrain", [], 2)) == [0, 0]
    resumed, straight = (load_file(folder / "models/pretrain/rrcm/model.safetensors") for folder in (project, trained))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-3, rtol=0, msg=name)


# Monitoring


@pytest.mark.slow
def test_live_metrics_are_complete_after_a_kill(project):
    pretrain_and_kill(project, 2)
    (project / "dvclive/pretrain-rrcm/metrics.json").write_text("{")  # as if killed while writing it
    assert stage(project, "pretrain").returncode == 0
    history = pd.read_csv(project / "models/pretrain/rrcm/history.csv")
    live = read_json(project / "dvclive/pretrain-rrcm/metrics.json")
    assert live["step"] == 30 and live["loss"] == pytest.approx(history["loss"].iloc[-1])
    plotted = pd.read_csv(project / "dvclive/pretrain-rrcm/plots/metrics/loss.tsv", sep="\t")
    assert plotted["step"].tolist() == history["step"].tolist()
    assert plotted["loss"].tolist() == pytest.approx(history["loss"].tolist())


@pytest.mark.slow
def test_training_goes_on_without_live_metrics(project):
    (project / "dvclive").write_text("a file where the folder should be")
    change(project, pretrain__steps=6, pretrain__max_levels=40)
    result = stage(project, "pretrain")
    assert result.returncode == 0 and result.stderr.count("live metrics") == 1


def test_representations_are_evaluated_during_pre_training(trained):
    rows = pd.read_csv(trained / "models/pretrain/rrcm/representation.csv")
    assert rows["step"].tolist() == [step for step in (0, 10, 20, 30) for _ in range(4)]
    assert rows["sigma"].tolist() == [0.0, 0.25, 0.5, 1.0] * 4
    clean = rows[rows["sigma"] == 0].set_index("step")
    assert (clean["same_image_cosine"] - 1).abs().max() < 1e-5
    assert clean["knn"].between(0.3, 1).all()


def test_a_collapse_is_reported(project, monkeypatch, capfd):
    monkeypatch.chdir(project)
    monkeypatch.setenv("RRCM_RUNS", str(project / "runs"))
    monkeypatch.setattr(pretraining, "COLLAPSED", -1.0)
    change(project, pretrain__steps=6, pretrain__evaluate_every=5)
    config = load_config(project / "params.yaml")
    output = project / "models/pretrain/rrcm"
    pretraining.pretrain(config, "rrcm", project / "data/shards", output, project / "timing.json")
    messages = [line for line in capfd.readouterr().err.splitlines() if "collapsed" in line]
    assert len(messages) == 3 and "step 5" in messages[1]


# Contrastive pre-training and mixup


def test_the_contrastive_loss_is_info_nce_in_both_directions():
    student, teacher = networks()
    view1, view2, noise1, noise2 = torch.randn(4, 8, 3, 16, 16)
    t1, t2 = torch.linspace(0.1, 2, 8), torch.linspace(1, 0.2, 8)
    x1, x2 = view1 + t1[:, None, None, None] * noise1, view2 + t2[:, None, None, None] * noise2
    loss = contrastive_loss(student, teacher, [x1, x2], [t1, t2], temperature=0.3)
    z1, z2 = (student.projector(student.encoder(x, t)) for x, t in ((x1, t1), (x2, t2)))
    y1, y2 = (teacher.projector(teacher.encoder(x, t)) for x, t in ((x1, t1), (x2, t2)))
    torch.testing.assert_close(loss, info_nce(z1, y2, 0.3) + info_nce(z2, y1, 0.3))
    assert loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ("rrcm_without_consistency", ["contrastive"]),
        ("moco_v3", ["contrastive"]),
        ("dmae", ["reconstruction"]),
        ("rrcm_dmae", ["contrastive", "consistency", "reconstruction"]),
    ],
)
def test_other_pre_trainings_learn_and_log_their_terms(project, objective, terms):
    change(project, pretrain__evaluate_every=30, pretrain__checkpoint_every=30)
    result = stage(project, "pretrain", objective)
    assert result.returncode == 0, result.stderr
    folder = project / "models/pretrain" / objective
    history = pd.read_csv(folder / "history.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert history.columns[1 : 2 + len(terms)].tolist() == ["loss", *terms]
    cost = build_pretraining_objective(load_config(project / "params.yaml"), objective).forwards_per_image
    assert read_json(folder / "config.json")["compute"] == {"pretrain": cost * 64 * 30}


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
        assert ((pixels[::2] >= inside[0] - 1e-3) & (pixels[::2] <= inside[1] + 1e-3)).all()  # from its neighbour only
    assert changed >= 3
