"""Two real processes (gloo) with half the batch each take the same step as one process with the whole batch."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY, compose
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu import together
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.data import shards as shards_module
from rrcm.data.shards import ShardedDataset
from rrcm.data.verification import verify_shards
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.encoders import build_encoder
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.objectives.base import StepRandomness, build_objective
from rrcm.objectives.rrcm import RRCMInputs, RRCMLevels, rrcm_loss
from rrcm.training.budget import build_pretraining_objective
from rrcm.training.finetune import WrappedClassifier, finetune
from rrcm.training.plan import Files, plan_training
from rrcm.training.pretrain import pretrain
from rrcm.training.teacher import with_teacher
from rrcm.utils import distributed
from rrcm.utils.distributed import (
    DistEnv,
    SyncBatchNorm1d,
    WorkQueue,
    all_reduce_sum,
    explain_lost_processes,
    init_distributed,
    native_precision,
    pick_device,
    resolve_precision,
    set_threads,
    sync_batch_norm,
)
from rrcm.utils.errors import RRCMError


def one_step(folder: Path, num_chunks: int = 1) -> None:
    """A pre-training step on this process's part of a fixed batch of 12; rank 0 writes loss and gradients."""
    torch.manual_seed(0)
    student = EncoderWithProjector(
        NoiseConditionedViT(16, 3, 4, embed_dim=48, depth=2, num_heads=3), hidden=64, out=16
    ).train()
    teacher = EncoderWithProjector(
        NoiseConditionedViT(16, 3, 4, embed_dim=48, depth=2, num_heads=3), hidden=64, out=16
    ).train()
    teacher.requires_grad_(False)
    batch = torch.randn(4, 12, 3, 16, 16)
    with init_distributed("cpu") as env:
        size = 12 // env.world_size
        part = batch[:, env.rank * size : (env.rank + 1) * size]
        forward = DistributedDataParallel(student, broadcast_buffers=False) if env.world_size > 1 else student
        terms = rrcm_loss(forward, teacher, RRCMInputs(*part), RRCMLevels(1.7, 1.1), num_chunks=num_chunks)
        terms.total.mean().backward()
        found = {f"grad.{name}": p.grad for name, p in student.named_parameters()}
        found |= {f"student.{name}": b.float() for name, b in student.named_buffers()}
        found |= {f"teacher.{name}": b.float() for name, b in teacher.named_buffers()}
        found["loss"] = all_reduce_sum(terms.total.mean().detach()) / env.world_size
        if env.is_main:
            save_file(found, folder / f"{env.world_size}-{num_chunks}.safetensors")


@pytest.mark.slow
def test_a_step_of_two_processes_is_the_step_of_one(tmp_path):
    together(one_step, tmp_path, world_size=1)
    together(one_step, tmp_path, world_size=2)
    one, two = load_file(tmp_path / "1-1.safetensors"), load_file(tmp_path / "2-1.safetensors")
    assert one.keys() == two.keys() and sum("running" in name for name in one) == 8
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-6)
        assert (one[name] - two[name]).abs().max() <= 1e-4 * scale, name


def one_step_each(folder: Path) -> None:
    """A step of every pre-training objective on this process's part of a batch of 12; rank 0 writes the results."""
    config = load_config(folder / "params.yaml")
    torch.manual_seed(1)
    with init_distributed("cpu") as env:
        size = 12 // env.world_size
        positions = range(env.rank * size, (env.rank + 1) * size)
        batch = dict(zip(("image", "view1", "view2"), torch.rand(3, 12, 1, 8, 8), strict=True))
        part = {key: each[list(positions)] for key, each in batch.items()}
        for name in PRETRAINING:
            objective = build_pretraining_objective(config, name)
            torch.manual_seed(0)
            student, teacher = objective.build_student_and_teacher(build_encoder(config.model, config.data))
            forward = DistributedDataParallel(student, broadcast_buffers=False) if env.world_size > 1 else student
            losses = objective(
                SimpleNamespace(student=forward, teacher=teacher), part, StepRandomness(0, 3, positions, 12, CPU)
            )
            losses["loss"].backward()
            found = {f"gradient.{key}": p.grad for key, p in student.named_parameters()}
            found |= {key: all_reduce_sum(value.detach()) / env.world_size for key, value in losses.items()}
            if env.is_main:
                save_file({key: x.clone() for key, x in found.items()}, folder / f"{name}-{env.world_size}.safetensors")


@pytest.mark.slow
def test_a_step_of_two_processes_is_the_step_of_one_for_every_objective(tmp_path):
    compose(tmp_path / "params.yaml")
    for count in (1, 2):
        together(one_step_each, tmp_path, world_size=count)
    for name in PRETRAINING:
        one, two = (load_file(tmp_path / f"{name}-{count}.safetensors") for count in (1, 2))
        for key, value in one.items():
            assert (two[key] - value).abs().max() <= 1e-4 * value.abs().max().clamp_min(1e-3), (name, key)


def finetuning_steps(folder: Path) -> None:
    """Loss and gradients of every fine-tuning objective, attacks included, on this process's part of a batch of 8."""
    settings = load_config(folder / "params.yaml").finetune.settings("gaussian", 0.5).model_dump()
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.rand(8, 1, 8, 8, generator=generator), "target": torch.eye(5)[torch.arange(8) % 5]}
    batch["soft_label"] = torch.rand(8, 5, generator=generator).softmax(1)
    with init_distributed("cpu") as env:
        rows = range(env.rank * 8 // env.world_size, (env.rank + 1) * 8 // env.world_size)
        wrap = (
            partial(DistributedDataParallel, broadcast_buffers=False) if env.world_size > 1 else lambda module: module
        )
        found = {}
        for name in FINETUNING:
            torch.manual_seed(0)
            classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, 32, depth=2, num_heads=2), 5, t=1.0)
            torch.nn.init.normal_(classifier.head.weight)
            classify = WrappedClassifier(classifier, SimpleNamespace(wrap_ddp=wrap, autocast=nullcontext), num_chunks=1)
            own = {key: value for key, value in settings["objectives"].get(name, {}).items() if value is not None}
            own = settings | own | {"sigma": 0.5}
            random = StepRandomness(0, 3, rows, 8, CPU, epoch=20.0)
            part = {key: value[list(rows)] for key, value in batch.items()}
            objective = build_objective(FINETUNING, name, own)
            if hasattr(objective, "teacher"):
                objective = with_teacher(objective, lambda noisy: noisy.flatten(1)[:, :5])
            loss = objective(classify, part, random)["loss"]
            loss.backward()
            found |= {f"{name} {key}": p.grad for key, p in classifier.named_parameters()}
            found[f"{name} loss"] = all_reduce_sum(loss.detach()) / env.world_size
        if env.is_main:
            save_file(found, folder / f"{env.world_size}.safetensors")


@pytest.mark.slow
def test_every_fine_tuning_objective_of_two_processes_is_that_of_one(tmp_path):
    compose(tmp_path / "params.yaml")
    for world_size in (1, 2):
        together(finetuning_steps, tmp_path, world_size=world_size)
    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-6)
        assert (one[name] - two[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.thorough
def test_a_step_of_two_processes_in_chunks_is_the_undivided_step(tmp_path):
    together(one_step, tmp_path)
    whole = load_file(tmp_path / "2-1.safetensors")
    for num_chunks in (2, 4, 8):
        together(one_step, tmp_path, num_chunks)
        for name, value in load_file(tmp_path / f"2-{num_chunks}.safetensors").items():
            assert (value - whole[name]).norm() <= 1e-5 * whole[name].norm(), (num_chunks, name)


def batch_norm_of_images(folder: Path) -> None:
    """Outputs, gradients and running averages of this process's part of a batch; rank 0 writes them."""
    torch.manual_seed(0)
    norm, batch = sync_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(3))), 3 * torch.randn(8, 3, 4, 5) + 2
    with init_distributed("cpu") as env:
        part = batch.chunk(env.world_size)[env.rank].requires_grad_()
        out = norm(part)
        out.pow(3).sum().backward()
        found = {"out": out.detach(), "grad": part.grad} | {name: b.float() for name, b in norm.named_buffers()}
        found = {name: value.contiguous() for name, value in found.items()}
        save_file(found, folder / f"{env.world_size}-{env.rank}.safetensors")


@pytest.mark.slow
def test_batch_norm_of_images_sees_the_global_batch(tmp_path):
    for world_size in (1, 2):
        together(batch_norm_of_images, tmp_path, world_size=world_size)
    whole, *halves = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), whole[name], rtol=1e-4, atol=1e-4)
    for name in whole.keys() - {"out", "grad"}:
        torch.testing.assert_close(halves[0][name], whole[name])


def test_batch_norm_of_one_process_is_torchs():
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm1d(5), torch.nn.BatchNorm1d(5)
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn(7, 5)
        (ours(a) * weights).sum().backward()
        (theirs(b) * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def verify_twice(folder: Path, shards: Path) -> None:
    """Check the shards, then the damaged copy in `folder`; write which ones this process checked, and its error."""
    checked, check = [], shards_module._check
    shards_module._check = lambda path, entry: [checked.append(path.name), check(path, entry)]
    for _ in range(2):  # a second connection of the same processes does not see the first one's queue
        with init_distributed("cpu") as env:
            checked.clear()
            verify_shards([ShardedDataset(shards, split) for split in ("train", "val")], env)
    (folder / f"checked-{env.rank}").write_text("\n".join(name for name in checked if name.endswith(".tar")))
    try:
        with init_distributed("cpu") as env:
            verify_shards([ShardedDataset(folder / "damaged", "train")], env)
    except RRCMError as error:
        (folder / f"error-{env.rank}").write_text(str(error))


@pytest.mark.slow
def test_processes_share_the_hashing_and_all_learn_of_damage(tmp_path, tiny_shards):
    shutil.copytree(tiny_shards, tmp_path / "damaged")
    damaged = sorted((tmp_path / "damaged").glob("train-*.tar"))[1:3]
    for path in damaged:
        path.write_bytes(b"")
    together(verify_twice, tmp_path, tiny_shards)
    checked = [name for rank in range(2) for name in (tmp_path / f"checked-{rank}").read_text().splitlines()]
    tars = [path.name for split in ("train", "val") for path in tiny_shards.glob(f"{split}-*.tar")]
    assert sorted(checked) == sorted(tars)
    (error,) = {(tmp_path / f"error-{rank}").read_text() for rank in range(2)}
    assert error.startswith(f"{damaged[0]}: has 0 bytes, ") and error.endswith("(and 1 other shards)")


def lose_the_other(folder: Path, rank_that_ends: int) -> None:
    try:
        with init_distributed("cpu") as env:
            if env.rank == rank_that_ends:
                os._exit(0)  # it has printed why, perhaps while the other one is still joining
            with explain_lost_processes():
                all_reduce_sum(torch.ones(2))
    except RRCMError as error:
        (folder / "said").write_text(str(error))
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_peer_has_died_says_so_in_one_line(tmp_path, rank):
    together(lose_the_other, tmp_path, rank)
    said = (tmp_path / "said").read_text()
    assert said.startswith("another process of this run has ended; its message says why (") and "\n" not in said


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), explain_lost_processes():
        raise RuntimeError("a bug")


class SlowStore(dist.HashStore):
    """A store on which the first process does not appear for a long time."""

    polls = 20_000

    def check(self, keys: list[str]) -> bool:
        self.polls -= 1
        return self.polls < 0

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        raise RuntimeError(f"timed out after {timeout}")


@pytest.mark.slow
def test_a_process_waits_for_the_first_one_without_a_limit(monkeypatch):
    slept = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    WorkQueue(DistEnv(1, 2, CPU, SlowStore()), "work").start()
    assert sum(slept) > 5 * 3600


def train(folder: Path, shards: Path, world_size: int) -> None:
    os.environ["RRCM_RUNS"] = str(folder / "runs")
    config = load_config(folder / "params.yaml")
    encoders = folder / f"pretrain{world_size}"
    pretrain(config, "rrcm", shards, encoders / "rrcm", folder / "timing.json")
    files = Files(shards, encoders, folder / f"tuned{world_size}", folder / "timing.json")
    finetune(plan_training(config, "rrcm", 0.5, files))


@pytest.mark.thorough
def test_whole_trainings_of_one_and_two_processes_agree(tmp_path, tiny_shards):
    """Ten steps each, with the same images, augmentation and noise: only the order of sums differs."""
    compose(tmp_path / "params.yaml", "pretrain.steps=10", "finetune.epochs=2")
    for world_size in (1, 2):
        together(train, tmp_path, tiny_shards, world_size, world_size=world_size)
    for name in ("pretrain", "tuned"):
        inside = "rrcm/" if name == "pretrain" else ""
        one, two = (load_file(tmp_path / f"{name}{n}/{inside}model.safetensors") for n in (1, 2))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-3, rtol=0, msg=f"{name} {key}")
    assert not dist.is_initialized()


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "bf16", "native", "explicit"),
    [
        (CPU, True, "bf16", "bf16"),
        (CPU, False, "fp32", "bf16"),
        (GPU, True, "bf16", "bf16"),
        (GPU, False, "fp16", "fp16"),
    ],
)
def test_the_native_precision_of_a_device(monkeypatch, device, bf16, native, explicit):
    """Devices with and without instructions for bfloat16, simulated."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": bf16}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert native_precision(device) == resolve_precision(device, "auto") == native
    assert resolve_precision(device, "bf16") == explicit
    assert [resolve_precision(device, name) for name in ("fp32", "fp16")] == ["fp32", "fp16"]
    if device == CPU:
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        smoothed = SmoothedClassifier(network, 0.5, 3, precision="auto")
        assert smoothed.precision == native
        assert smoothed.network[1].weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_without_torchs_capabilities_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert native_precision(CPU) == "fp32"


def test_cuda_without_an_index_is_the_gpu_of_the_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(pick_device("cuda")) == str(pick_device("auto")) == "cuda:3"
    assert str(pick_device("cuda:1")) == "cuda:1" and str(pick_device("cpu")) == "cpu"
    with pytest.raises(RRCMError, match="'cuda:4': this machine has 4 CUDA devices"):
        pick_device("cuda:4")
    monkeypatch.setenv("LOCAL_RANK", "4")
    for name in ("auto", "cuda"):
        with pytest.raises(RRCMError, match=f"'{name}': process 5 .* finds 4 CUDA devices; start at most 4 processes"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(pick_device("auto")) == "cpu"
    with pytest.raises(RRCMError, match="'cuda': this machine has 0 CUDA devices"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "cpu", "WORLD_SIZE is 2, but .*MASTER_ADDR.* torchrun"),
        *[({"WORLD_SIZE": text}, "cpu", f"WORLD_SIZE is '{text}', but must") for text in ("two", "0", "-1", "1.0")],
        ({}, "cuda:0", "'cuda:0': one GPU for 2 processes; use cuda"),
    ],
)
def test_processes_that_cannot_work_together(monkeypatch, environment, device, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not environment:
        monkeypatch.setattr(distributed, "connect", lambda name: DistEnv(0, 2, torch.device(name)))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(RRCMError, match=message), init_distributed(device):
        pass


def test_an_empty_number_of_processes_counts_as_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    with init_distributed("cpu") as env:
        assert env.world_size == 1


@pytest.mark.parametrize(
    ("threads", "environment", "wanted"),
    [
        (None, "", 1),
        (None, None, 1),
        (None, "3", 3),
        (2, None, 2),
    ],  # both OMP_NUM_THREADS and the setting are respected
)
def test_a_quota_bounds_the_threads_that_nobody_named(monkeypatch, threads, environment, wanted):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    monkeypatch.setattr(distributed, "available_cores", lambda: 1)
    try:
        torch.set_num_threads(3)
        set_threads(threads)
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.thorough
def test_damage_is_said_without_a_traceback_under_torchrun(project, tiny_shards):
    """A process that torchrun has stopped in the meantime may print nothing."""
    shards = Path(shutil.copytree(tiny_shards, project / "damaged"))
    (shards / "train-00001.tar").write_bytes(b"")
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2"]
    command = [*torchrun, "--log-dir", "logs", "--redirects", "3"]
    command += [REPOSITORY / "stages/pretrain.py", "--shards", shards]
    environment = os.environ | {"RRCM_RUNS": str(project / "runs"), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=project, env=environment, capture_output=True).returncode == 1
    said = [path.read_text() for path in (project / "logs").rglob("stderr.log")]
    assert len(said) == 2 and any(said)
    for text in filter(None, said):
        assert text.startswith(f"error: {shards}/train-00001.tar: has 0 bytes") and text.count("\n") == 1
