"""Checks that need a GPU, and measurements of the cost of noise and precision there.

    python benchmarks/gpu.py                  # on the GPUs of this machine, two minutes
    python benchmarks/gpu.py --device cpu     # the same checks with gloo and small networks, as in the tests

Each row is one check with its result and the bound that it must keep. The exit status is 1 if a check fails. Training
and certification use a small digits profile and the code of the stages, in a temporary folder.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tabulate import tabulate

from rrcm.utils.app import run_command
from rrcm.certification.certify import certify_split
from rrcm.certification.noise import ESTIMATE, counter_normal
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.config import Config, load_config
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.architectures import build_network
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.kinds import load_model_folder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives.base import StepRandomness
from rrcm.training.budget import build_finetuning_objective, build_pretraining_objective
from rrcm.training.finetune import finetune
from rrcm.training.optim import build_optimizer
from rrcm.training.plan import Files, plan_training
from rrcm.training.pretrain import pretrain, start_networks
from rrcm.utils import philox
from rrcm.utils.distributed import (
    all_gather_cat,
    all_reduce_sum,
    autocast,
    barrier,
    init_distributed,
    native_precision,
    pick_device,
    world_size,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.philox import fused_uniforms, philox4x32, uniforms
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, pack_state, unpack_state

REPOSITORY = Path(__file__).resolve().parent.parent
SIGMA = 0.5
CPU = torch.device("cpu")


class Row(NamedTuple):
    """One line of the table. `passed` is None for a mere measurement."""

    what: str
    result: str
    bound: str = ""
    passed: bool | None = None


def at_most(what: str, value: float, bound: float, unit: str = "") -> Row:
    return Row(what, f"{value:.3g}{unit}", f"at most {bound:g}{unit}", value <= bound)


@dataclass
class Bench:
    """What the checks share."""

    device: torch.device
    processes: int
    folder: Path
    config: Config  # digits, one sigma
    votes: int
    shards: Path = field(init=False)

    def __post_init__(self) -> None:
        self.shards = self.folder / "shards"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of `run()` including the work of the device, after two warm-up calls."""
        times = []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            run()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return median(times[2:])


def small_config(device: str) -> Config:
    """The default profile with one sigma, two methods and short trainings."""
    config = load_config(REPOSITORY / "params.yaml")
    data = config.data.model_copy(update={"source": "digits"})
    steps = {"steps": 30, "warmup_steps": 5, "evaluate_every": 30, "checkpoint_every": 10, "log_every": 10}
    return config.model_copy(
        update={
            "device": device,
            "threads": None,
            "sigmas": [SIGMA],
            "methods": ["rrcm", "consistency"],
            "data": data,
            "pretrain": config.pretrain.model_copy(update=steps),
            "finetune": config.finetune.model_copy(update={"epochs": 5, "warmup_epochs": 1}),
            "certify": config.certify.model_copy(update={"n": 1000, "every": 6}),
        }
    )


def check_devices(bench: Bench) -> Iterator[Row]:
    """`auto` and `cuda` without an index name a GPU that can be selected. One process too many is refused."""
    names = ["auto", "cuda"] if bench.on_gpu else ["cpu"]
    devices = {str(pick_device(name)) for name in names}
    if bench.on_gpu:
        for name in names:
            torch.cuda.set_device(pick_device(name))
    yield Row(" and ".join(names), ", ".join(devices), "one device", len(devices) == 1)
    if bench.on_gpu:
        os.environ["LOCAL_RANK"] = str(torch.cuda.device_count())
        try:
            message = str(pick_device("auto"))
        except RRCMError as error:
            message = str(error)
        del os.environ["LOCAL_RANK"]
        refused = "start at most" in message
        yield Row("one process too many", "refused" if refused else message, "refused", refused)


def check_noise(bench: Bench) -> Iterator[Row]:
    """Philox and its uniform numbers have the same bits on both devices and in the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2**32, (3, 512, 1), generator=generator)
    counter, key = (torch.arange(768), *rows), (0xDEADBEEF, 0x7FFFFFFF)
    there = tuple(word.to(bench.device) for word in counter)
    pairs = {
        f"Philox words, {bench.device.type} against cpu": (philox4x32(counter, key), philox4x32(there, key)),
        f"uniform numbers, {bench.device.type} against cpu": (uniforms(counter, key), uniforms(there, key)),
        "uniform numbers, fused against eager": (uniforms(there, key), fused_uniforms(bench.device)(there, key)),
    }
    for what, (ours, theirs) in pairs.items():
        different = sum(int((a.cpu() != b.cpu()).sum()) for a, b in zip(ours, theirs, strict=True))
        yield Row(what, f"{different} of {4 * ours[0].numel():,} differ", "0", different == 0)
    rows = rows[:, :, 0]
    here = counter_normal((3, 32, 32), 0, *rows)
    other = counter_normal((3, 32, 32), 0, *rows.to(bench.device)).cpu()
    share = (here != other).double().mean().item()
    yield Row(f"normals, {bench.device.type} against cpu", f"{100 * share:.2g} % differ")
    yield at_most("  largest difference", (here - other).abs().max().item(), 2e-6)


def check_noise_time(bench: Bench) -> Iterator[Row]:
    """Seconds to draw the noise of one batch, and the network's forward pass in its fast precision."""
    size, patch, width, depth, heads, batch = (224, 16, 768, 12, 12, 1024) if bench.on_gpu else (32, 8, 96, 2, 3, 64)
    encoder = NoiseConditionedViT(size, 3, patch, width, depth, heads)
    classifier = NoiseConditionedClassifier(encoder, 1000, 2 * SIGMA).to(bench.device)
    precision = "bf16" if native_precision(bench.device) == "bf16" else "fp32"
    smoothed = SmoothedClassifier(classifier, SIGMA, 1000, precision=precision, batch_size=batch)
    pixels = torch.rand(batch, 3, size, size, device=bench.device)
    rows = torch.arange(3 * batch, device=bench.device).view(3, batch)
    with torch.no_grad():
        voter = smoothed.network
        network = bench.seconds(lambda: voter(pixels))
    yield Row(
        f"ViT, width {width}, depth {depth}, {size} pixels, batch {batch}, {precision}", f"{1e3 * network:.1f} ms"
    )
    threshold = philox.FUSE_FROM
    try:
        for name, value in (("eager", 2**62), ("fused", 0)):
            philox.FUSE_FROM = value
            seconds = bench.seconds(lambda: counter_normal((3, size, size), 0, *rows))
            share = f"{1e3 * seconds:.2f} ms, {100 * seconds / network:.1f} % of the network's time"
            yield Row(f"  noise, {name}" if bench.on_gpu else "  noise", share)
            if not bench.on_gpu:
                break  # a CPU has another kernel, which noise.py measures
    finally:
        philox.FUSE_FROM = threshold
    image = torch.rand(3, size, size)
    request = [SampleRequest(image, 0, ESTIMATE, 0, 4 * batch)]
    seconds = bench.seconds(lambda: smoothed.count_votes(request), rounds=3)
    yield Row("  certification, noise and votes included", f"{4 * batch / seconds:,.0f} samples/s")
    automatic = SmoothedClassifier(classifier, SIGMA, 1000, precision=precision)
    yield Row("  batch size chosen for the free memory", str(automatic.find_batch_size(image)))


class RandomnessOnCPU(StepRandomness):
    """The randomness of a training step, drawn on the CPU for every device, since devices draw different noise."""

    def normal(self, name: str, shape: tuple[int, ...], copies: int | None = None) -> torch.Tensor:
        on_cpu = StepRandomness(self.seed, self.step, self.positions, self.batch_size, CPU, self.epoch)
        return on_cpu.normal(name, shape, copies).to(self.device)


def pretraining_gradient(bench: Bench, device: torch.device, precision: str) -> torch.Tensor:
    """The gradient of rRCM's loss in one fixed step, flat, float64 on the CPU."""
    objective = build_pretraining_objective(bench.config, "rrcm")
    networks = start_networks(objective, bench.config.model, bench.config.data, bench.config.seed, device)
    generator = torch.Generator().manual_seed(0)
    size, channels = bench.config.data.image_size, bench.config.data.channels
    views = ("image", "view1", "view2")
    batch = {name: (2 * torch.rand(64, channels, size, size, generator=generator) - 1).to(device) for name in views}
    random = RandomnessOnCPU(0, 5, list(range(64)), 64, device)
    with autocast(device, precision):
        loss = objective(networks, batch, random)["loss"]
    return flat_gradient(loss, networks.student, device, precision)


def finetuning_gradient(bench: Bench, device: torch.device, precision: str, name: str) -> torch.Tensor:
    """The gradient of a fine-tuning objective in one fixed step, flat, float64 on the CPU."""
    torch.manual_seed(0)
    size, channels = bench.config.data.image_size, bench.config.data.channels
    network = NoiseConditionedClassifier(NoiseConditionedViT(size, channels, 4, 48, 2, 3), 10, 2 * SIGMA)
    torch.nn.init.normal_(network.head.weight, std=0.1)  # before moving it, since devices draw different numbers
    network.to(device).train()
    objective = build_finetuning_objective(bench.config.finetune.settings(name, SIGMA), name, SIGMA)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(64, channels, size, size, generator=generator).to(device),
        "target": torch.eye(10)[torch.randint(0, 10, (64,), generator=generator)].to(device),
    }

    def classify(noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        with autocast(device, precision):
            return network(noisy).float()

    loss = objective(classify, batch, RandomnessOnCPU(0, 5, list(range(64)), 64, device, 2.0))["loss"]
    return flat_gradient(loss, network, device, precision)


def flat_gradient(loss: torch.Tensor, module: torch.nn.Module, device: torch.device, precision: str) -> torch.Tensor:
    """The gradient from a scaled backward pass, as in training."""
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=precision == "fp16")
    scaler.scale(loss).backward()
    gradients = [p.grad.flatten().double().cpu() for p in module.parameters() if p.grad is not None]
    return torch.cat(gradients) / (1024.0 if precision == "fp16" else 1.0)


def check_gradients(bench: Bench) -> Iterator[Row]:
    """Relative difference (norm) of the gradients of one step in every precision from float32 on the CPU."""
    # by default torch computes convolutions on a GPU, and so the patch embedding, with ten bits of mantissa in float32
    bounds = {"fp32": 0.02, "bf16": 0.2, "fp16": 0.05} if bench.on_gpu else {"fp32": 1e-6, "bf16": 0.2}
    for name in ("rrcm", "consistency", "smoothadv"):

        def gradient(device: torch.device, precision: str, name: str = name) -> torch.Tensor:
            if name == "rrcm":
                return pretraining_gradient(bench, device, precision)
            return finetuning_gradient(bench, device, precision, name)

        exact = gradient(CPU, "fp32")
        for precision, bound in bounds.items():
            difference = (gradient(bench.device, precision) - exact).norm() / exact.norm()
            yield at_most(f"gradient of {name}, {precision}, against float32 on the CPU", difference.item(), bound)


def trained(bench: Bench, precision: str, **changes: object) -> tuple[Path, dict]:
    """The folder of a new pre-training run, and the last row of its history."""
    name = "-".join([precision, *map(str, changes.values())])
    settings = bench.config.pretrain.model_copy(update={"precision": precision, **changes})
    config, folder = bench.config.model_copy(update={"pretrain": settings}), bench.folder / f"pretrain-{name}"
    pretrain(config, "rrcm", bench.shards, folder / "rrcm", folder / "rrcm.json")
    return folder, pd.read_csv(folder / "rrcm" / "history.csv").iloc[-1].to_dict()


def check_trainings(bench: Bench) -> Iterator[Row]:
    """Pre-training and fine-tuning by the code of the stages in every precision, with chunks and torch.compile."""
    exact = None
    for precision in ("fp32", "bf16", "fp16") if bench.on_gpu else ("fp32", "bf16"):  # CPUs only emulate fp16
        folder, row = trained(bench, precision)
        exact = exact or row["loss"]
        yield at_most(f"pre-training, {precision}: loss against fp32", abs(row["loss"] - exact) / exact, 0.05)
        config = bench.config.model_copy(
            update={"finetune": bench.config.finetune.model_copy(update={"precision": precision})}
        )
        output = bench.folder / f"finetune-{precision}" / "rrcm"
        files = Files(bench.shards, folder, output, output.with_suffix(".json"))
        finetune(plan_training(config, "rrcm", SIGMA, files))
        accuracy = pd.read_csv(output / "history.csv")["val_accuracy"].max()
        yield Row(
            f"fine-tuning, {precision}: validation accuracy", f"{100 * accuracy:.1f} %", "above 30 %", accuracy > 0.3
        )
    _, row = trained(bench, "fp32", num_chunks=4)
    yield at_most("pre-training in 4 chunks: loss", abs(row["loss"] - exact) / exact, 1e-2)
    if bench.on_gpu:
        _, row = trained(bench, "fp32", compile=True)
        yield at_most("pre-training, compiled: loss", abs(row["loss"] - exact) / exact, 1e-2)


Training = tuple[torch.nn.Module, torch.optim.Optimizer]


def resume_lenet(device: torch.device, optimizer: str, folder: Path) -> tuple[Training, Training]:
    """A LeNet after two steps, and another that was resumed between the steps from a checkpoint in `folder`."""

    def training() -> Training:
        torch.manual_seed(0)
        network = build_network("lenet", 28, 1, 10).to(device)
        return network, build_optimizer([(1.0, list(network.parameters()))], lr=0.01, weight_decay=0.0, name=optimizer)

    def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(torch.linspace(0, 1, 784, device=device).view(1, 1, 28, 28)).square().sum().backward()
        optimizer.step()

    state, undisturbed, resumed = RunState("resume", optimizer, folder), training(), training()
    step(*undisturbed)
    state.lock()
    state.save(1, pack_state({"network": undisturbed[0]}, undisturbed[1]), {})
    unpack_state(state.load()[1], {"network": resumed[0]}, resumed[1])
    for run in (undisturbed, resumed):
        step(*run)
    return undisturbed, resumed


def check_resume(bench: Bench) -> Iterator[Row]:
    """A resumed run takes the same step as an undisturbed one. Weights of convolutions also have a memory layout."""
    for name in ("adamw", "sgd"):
        runs = resume_lenet(bench.device, name, bench.folder)
        pairs = zip(*(network.parameters() for network, _ in runs), strict=True)
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        yield at_most(f"weights of a resumed LeNet, {name}", difference, 1e-5)


def check_votes(bench: Bench) -> Iterator[Row]:
    """Votes that change between float32 on the CPU, the device, its fast precision, and the compiled network."""
    loaded = load_model_folder(bench.folder / "finetune-fp32" / "rrcm")
    split = ShardedDataset(bench.shards, "test")
    pixels, _, _ = read_split(split, loaded.image_size, max(1, len(split) // 20), 20)
    each = bench.votes // len(pixels)
    requests = [SampleRequest(image.float() / 255, i, ESTIMATE, 0, each) for i, image in enumerate(pixels)]

    def count(device: torch.device, **options: object) -> torch.Tensor:
        classifier = load_model_folder(bench.folder / "finetune-fp32" / "rrcm").classifier.to(device)
        smoothed = SmoothedClassifier(classifier, SIGMA, loaded.num_classes, batch_size=1000, **options)
        return torch.from_numpy(smoothed.count_votes(requests))

    exact, total = count(CPU), each * len(pixels)
    low = "bf16" if native_precision(bench.device) == "bf16" or not bench.on_gpu else "fp32"
    there, fast = count(bench.device), count(bench.device, precision=low)
    compiled = count(bench.device, precision=low, compile=True)
    for what, one, other, bound in (
        (f"fp32 on {bench.device.type} against the CPU", exact, there, 1e-4),
        (f"{low} against fp32", there, fast, 0.02),
        (f"{low}, compiled against eager", fast, compiled, 0.02),
    ):
        changed = int((one - other).abs().sum()) / 2  # a vote that changes leaves one class and joins another
        count_changed = f"{changed:.0f} of {total:,}"
        yield Row(
            f"net changes of votes, {what}", count_changed, f"at most {bound * total:.0f}", changed <= bound * total
        )


def check_certificates(bench: Bench) -> Iterator[Row]:
    """Certificates of a split on the device, also with a compiled network, against certificates from the CPU."""
    tables = {}
    variants = {"cpu": ("cpu", False), bench.device.type: (bench.config.device, False)}
    if bench.on_gpu:
        variants["compiled"] = (bench.config.device, True)
    for name, (device, compile) in variants.items():
        settings = bench.config.certify.model_copy(update={"compile": compile, "precision": "fp32"})
        config = bench.config.model_copy(update={"device": device, "certify": settings})
        output = bench.folder / "certificates" / f"{name}.tsv"
        certify_split(
            config, SIGMA, bench.shards, bench.folder / "finetune-fp32" / "rrcm", output, output.with_suffix(".json")
        )
        tables[name] = pd.read_csv(output, sep="\t")
    exact = tables.pop("cpu")
    for name, table in tables.items():
        different = int(((exact["predict"] != table["predict"]) | (exact["radius"] != table["radius"])).sum())
        bound = max(1, len(exact) // 20)
        yield Row(
            f"certificates, {name} against cpu",
            f"{different} of {len(exact)} differ",
            f"at most {bound}",
            different <= bound,
        )


def check_processes(bench: Bench) -> Iterator[Row]:
    """Collectives and a pre-training run over all GPUs, or over one rank of nccl if there is only one GPU."""
    count, backend = bench.processes, "nccl" if bench.on_gpu else "gloo"
    output = bench.folder / "processes"
    output.mkdir()
    together(collectives, bench.config.device, output, world_size=count)
    wrong = sum(int((output / f"{rank}").read_text()) for rank in range(count))
    yield Row(f"collectives of {backend}, {count} process{'es' * (count > 1)}", f"{wrong} wrong", "0", wrong == 0)
    if count == 1:
        yield Row("one training by several processes", "not checked, since there is only one GPU")
        return
    places = bench.shards, output / "rrcm", output / "rrcm.json"
    together(train_together, bench.config.device, *places, world_size=count)
    weights = [load_file(path / "model.safetensors") for path in (bench.folder / "pretrain-fp32/rrcm", output / "rrcm")]
    difference = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    yield at_most(f"weights trained by {count} processes against one", difference, 1e-2)


def together(target: Callable, *arguments: object, world_size: int = 2) -> None:
    """Run target(*arguments) in `world_size` processes with torchrun's environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # forks a process that has not used CUDA
    processes = [
        context.Process(target=enter, args=(rank, world_size, port, target, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RRCMError(f"{target.__name__}: a process failed; its message is above")


def enter(rank: int, world_size: int, port: int, target: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(*arguments)


def collectives(device: str, output: Path) -> None:
    """Write the number of wrong results on this rank."""
    with init_distributed(device) as env:
        alone = env.world_size == 1
        if alone:  # `init_distributed` makes no group for one process, but nccl should be tested all the same
            backend = "cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        mine = torch.full((3,), float(env.rank), device=env.device)
        total = mine.clone()
        dist.all_reduce(total)
        gathered = [torch.empty_like(mine) for _ in range(env.world_size)]
        dist.all_gather(gathered, mine)
        ranks = torch.arange(env.world_size).float()
        wrong = int((total.cpu() != ranks.sum()).any()) + int((torch.stack(gathered).cpu() != ranks[:, None]).any())
        if not alone:
            wrong += int((all_gather_cat(mine)[0].cpu() != ranks.repeat_interleave(3)).any())
            wrong += int((all_reduce_sum(mine).cpu() != ranks.sum()).any()) + int(world_size() != env.world_size)
            barrier()
        (output / f"{env.rank}").write_text(str(wrong))
        if alone:
            dist.destroy_process_group()


def train_together(device: str, shards: Path, output: Path, timing: Path) -> None:
    config = small_config(device)  # a `Config` cannot be sent to another process
    settings = config.pretrain.model_copy(update={"precision": "fp32"})
    pretrain(config.model_copy(update={"pretrain": settings}), "rrcm", shards, output, timing)


CHECKS = [
    check_devices,
    check_noise,
    check_noise_time,
    check_gradients,
    check_trainings,
    check_resume,
    check_votes,
    check_certificates,
    check_processes,  # last, since it compares with a run of `check_trainings`
]


def main(device: str = "auto", votes: int = 1_000_000) -> None:
    """Check DEVICE (auto, cpu, cuda) and print a table. VOTES is the number of votes to compare."""
    chosen = pick_device(device)
    processes = torch.cuda.device_count() if chosen.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as name:
        os.environ["RRCM_RUNS"] = f"{name}/runs"
        bench = Bench(chosen, processes, Path(name), small_config(device), votes)
        write_shards(bench.config.data, bench.config.seed, bench.shards)
        rows: list[Row] = []
        with Progress(len(CHECKS), "gpu", "checks") as progress:
            for check in CHECKS:
                start = time.monotonic()
                rows += check(bench)
                rows.append(Row(f"  ({check.__name__.replace('_', ' ')})", f"{time.monotonic() - start:.0f} s"))
                progress.update(1)
    hardware = describe_environment(chosen)["hardware"]
    print(f"{', '.join(hardware['gpus']) or hardware['cpu']}; torch {torch.__version__}\n")
    words = {True: "ok", False: "FAILED", None: ""}
    print(
        tabulate([(*row[:3], words[row.passed]) for row in rows], ["check", "result", "bound", ""], tablefmt="github")
    )
    if failed := [row.what for row in rows if row.passed is False]:
        raise RRCMError(f"{len(failed)} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
