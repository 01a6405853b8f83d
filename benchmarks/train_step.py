"""Time and memory of a pre-training step: rrcm, the authors' formulation, and a limit.

A step is everything between two batches: loss, backward pass, clipping, AdamW and both moving averages. All variants
start from the same weights and get the same images, levels and noise. Their first losses must agree. They alternate in
one process, so that drifting machine speed affects all of them equally. Compare medians over the rounds. Peak memory is
measured over the first steps of a fresh process, minus its memory before them: resident memory on a CPU, allocated
memory on CUDA.

The authors' formulation runs six encoder passes one after the other in float32. The target of the consistency term
keeps its graph, and the last block computes all tokens. The projector runs in every pass. Attention uses explicit
products, as in their code without xformers; on CUDA it uses torch's fused attention. AdamW and the averages are updated
parameter by parameter. This is our own implementation of it. `--reference PATH` runs the authors' network and loss
instead, from `rrcm/vit.py` and `rrcm/rrcm_denoiser.py` of a checkout, and needs the package einops. Their `train.py`
needs CUDA, so our code still does everything after the loss.

The limit is the time for the matrix products of a step alone: same shapes, dtype and order, with operands in memory and
without allocations. A product with a backward pass counts as three.

    python benchmarks/train_step.py --batch 128 --output train_step_128.json
    python benchmarks/train_step.py --variants rrcm_fp32,rrcm_fp32_2,rrcm_fp32_4,rrcm_fp32_8,rrcm_fp32_blocks
    python benchmarks/train_step.py --show train_step_128.json train_step_256.json
"""

import contextlib
import copy
import importlib.util
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from tabulate import tabulate
from torch import nn

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app, resume_gc
from rrcm.models.noise_levels import karras_levels
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT, time_embedding
from rrcm.objectives.contrastive import info_nce
from rrcm.objectives.rrcm import RRCMInputs, RRCMLevels, rrcm_loss
from rrcm.utils.distributed import autocast
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment

LEVELS = karras_levels(81).tolist()
N = 40  # the noise index of every step
TEMPERATURE, RATE, CLIP, TEACHER_EMA, STUDENT_EMA = 0.2, 1e-4, 2.0, 0.99, 0.9999
MEMORY_STEPS = 3
LABELS = {
    "authors_fp32": "(a) the authors' formulation, float32",
    "rrcm_fp32": "(b) rrcm, float32",
    "rrcm_bf16": "(c) rrcm, bfloat16",
    "rrcm_fp32_compiled": "    (b) compiled",
    "rrcm_bf16_compiled": "    (c) compiled",
    "rrcm_fp32_blocks": "    (b) blocks recomputed (grad_checkpointing)",
    "rrcm_fp32_2": "    (b) in 2 chunks",
    "rrcm_fp32_4": "    (b) in 4 chunks",
    "rrcm_fp32_8": "    (b) in 8 chunks",
}

resume_gc()
Step = Callable[[], float]  # takes one step and returns its loss


@dataclass(frozen=True)
class Setting:
    """The measured network, batch and device."""

    image_size: int = 32
    channels: int = 3
    patch_size: int = 4
    embed_dim: int = 192
    depth: int = 6
    num_heads: int = 3
    hidden: int = 512  # of the projector
    projection: int = 128
    batch: int = 128
    device: str = "cpu"
    plain_allocator: bool = False
    reference: str | None = None  # checkout of the authors' code


def build(setting: Setting, variant: str) -> Step:
    """A fresh network and a step that trains it. Weights and inputs are the same for every variant."""
    torch.manual_seed(0)
    encoder = NoiseConditionedViT(
        setting.image_size, setting.channels, setting.patch_size, setting.embed_dim, setting.depth, setting.num_heads
    )
    student = EncoderWithProjector(encoder, setting.hidden, setting.projection).to(setting.device).train()
    shape = (setting.batch, setting.channels, setting.image_size, setting.image_size)
    inputs = RRCMInputs(*(torch.randn(shape).to(setting.device) for _ in range(4)))
    if variant != "authors_fp32":
        _, precision, *how = variant.split("_")
        encoder.grad_checkpointing = "blocks" in how
        num_chunks = next((int(number) for number in how if number.isdigit()), 1)
        return rrcm_step(student, inputs, precision, compiled="compiled" in how, num_chunks=num_chunks)
    if setting.reference:
        return authors_step(*reference(setting, student, inputs))
    teacher = copy.deepcopy(student).requires_grad_(False)
    return authors_step(student, teacher, lambda: formulation(student, teacher, inputs))


def rrcm_step(
    student: EncoderWithProjector, inputs: RRCMInputs, precision: str, compiled: bool, num_chunks: int
) -> Step:
    """The step of rrcm.training.pretrain."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    average = copy.deepcopy(student.encoder).requires_grad_(False)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    if compiled:
        student.encoder.compile(dynamic=False)
        teacher.encoder.compile(dynamic=False)

    def step() -> float:
        with autocast(inputs.image.device, precision):
            terms = rrcm_loss(
                student,
                teacher,
                inputs,
                RRCMLevels(LEVELS[N], LEVELS[N + 1], t_min=LEVELS[-1]),
                temperature=TEMPERATURE,
                num_chunks=num_chunks,
            )
        loss = terms.total.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), parameters, 1 - TEACHER_EMA)
            torch._foreach_lerp_(list(average.parameters()), list(student.encoder.parameters()), 1 - STUDENT_EMA)
        return loss.item()

    return step


def authors_step(student: nn.Module, teacher: nn.Module, losses: Callable[[], torch.Tensor]) -> Step:
    """The authors' loop: torch's defaults, and averages of the whole network, parameter by parameter."""
    average = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)

    def step() -> float:
        optimizer.zero_grad()
        loss = losses().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        for network, rate in ((average, STUDENT_EMA), (teacher, TEACHER_EMA)):
            for mean, parameter in zip(network.parameters(), student.parameters(), strict=True):
                mean.detach().mul_(rate).add_(parameter.detach(), alpha=1 - rate)
        return loss.item()

    return step


def formulation(student: EncoderWithProjector, teacher: EncoderWithProjector, inputs: RRCMInputs) -> torch.Tensor:
    """The authors' loss (B,), one pass after the other."""
    image, view1, view2, noise, _ = inputs
    quiet1, quiet2 = view1 + LEVELS[-1] * noise, view2 + LEVELS[-1] * noise

    def nce(anchors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return info_nce(anchors, targets.detach(), TEMPERATURE)

    z1, _ = plain_network(student, quiet1, LEVELS[-1])
    with torch.no_grad():
        y2, _ = plain_network(teacher, quiet2, LEVELS[-1])
    z2, _ = plain_network(student, quiet2, LEVELS[-1])
    with torch.no_grad():
        y1, _ = plain_network(teacher, quiet1, LEVELS[-1])
    _, louder = plain_network(student, image + LEVELS[N] * noise, LEVELS[N])
    _, quieter = plain_network(student, image + LEVELS[N + 1] * noise, LEVELS[N + 1])  # keeps its graph
    return nce(z1, y2) + nce(z2, y1) + nce(louder, quieter)


def plain_network(
    network: EncoderWithProjector, images: torch.Tensor, level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projection (B, E) and representation (B, D). Computes every token of every block."""
    encoder = network.encoder
    t = torch.full((len(images),), level, device=images.device)
    patches = encoder.patch_embed.proj(images / (level**2 + 0.5**2) ** 0.5).flatten(2).transpose(1, 2)
    time_token = time_embedding(t, encoder.embed_dim)[:, None]
    tokens = torch.cat([encoder.cls_token.expand(len(images), -1, -1), time_token, patches], dim=1) + encoder.pos_embed
    for block in encoder.blocks:
        tokens = tokens + plain_attention(block.attn, block.norm1(tokens))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
    representation = encoder.norm(tokens[:, 0])
    return network.projector(representation), representation


def plain_attention(attention: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """(B, L, D) -> (B, L, D)."""
    q, k, v = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if tokens.is_cuda:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return attention.proj(attended.transpose(1, 2).flatten(2))


def reference(
    setting: Setting, student: EncoderWithProjector, inputs: RRCMInputs
) -> tuple[nn.Module, nn.Module, Callable[[], torch.Tensor]]:
    """The authors' student, teacher and loss, with the weights of `student`."""
    folder = Path(setting.reference) / "rrcm"
    with contextlib.redirect_stdout(sys.stderr):  # their code prints when imported and built
        import_file(
            "rrcm.resample", folder / "resample.py"
        )  # their loss imports it by this name, which rrcm does not have
        denoiser = import_file("authors_denoiser", folder / "rrcm_denoiser.py").RepresentationKarrasDenoiser(
            tau=TEMPERATURE, num_timesteps=len(LEVELS), device=setting.device
        )
        network = import_file("authors_vit", folder / "vit.py").rRCMViT(
            image_size=setting.image_size,
            patch_size=setting.patch_size,
            in_channels=setting.channels,
            embed_dim=setting.embed_dim,
            hidden_dim=setting.hidden,
            output_dim=setting.projection,
            depth=setting.depth,
            num_heads=setting.num_heads,
        )
    weights = student.encoder.state_dict() | student.projector.state_dict(prefix="projection_head.")
    network.load_state_dict(weights)
    network.to(setting.device).train()
    teacher = copy.deepcopy(network).requires_grad_(False)
    indices = torch.full((setting.batch,), N, device=setting.device)

    def losses() -> torch.Tensor:
        terms = denoiser.rRCMloss(
            network,
            inputs.image,
            len(LEVELS),
            indices=indices,
            target_model=teacher,
            noise=inputs.noise,
            x_aug=inputs.view1,
            x_aug2=inputs.view2,
            accelerator=SimpleNamespace(num_processes=1),
        )
        return terms["loss"]

    return network, teacher, losses


def import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RRCMError(f"{path}: no such file; --reference must be a checkout of the authors' repository")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise RRCMError(f"{path}: needs the package {error.name}; install it to use --reference") from None
    return module


class Product(NamedTuple):
    """`count` products of a (rows, inner) and an (inner, columns) matrix.

    `backward` adds the two products of each backward pass.
    """

    count: int
    rows: int
    inner: int
    columns: int
    backward: bool


def products(setting: Setting, authors: bool) -> list[Product]:
    """All matrix products of a step."""
    batch, embed_dim, num_heads = setting.batch, setting.embed_dim, setting.num_heads
    patches = (setting.image_size // setting.patch_size) ** 2
    length = patches + 2

    def encoder(images: int, backward: bool) -> list[Product]:
        def linear(rows: int, inner: int, columns: int) -> Product:
            return Product(1, rows, inner, columns, backward)

        def block(queries: int) -> list[Product]:
            """A block that computes only the first `queries` tokens, which attend to all tokens."""
            some, everything = images * queries, images * length
            qkv = [linear(everything, embed_dim, 3 * embed_dim)]
            if queries < length:
                qkv = [linear(some, embed_dim, embed_dim), linear(everything, embed_dim, 2 * embed_dim)]
            return [
                *qkv,
                Product(images * num_heads, queries, embed_dim // num_heads, length, backward),
                Product(images * num_heads, queries, length, embed_dim // num_heads, backward),
                linear(some, embed_dim, embed_dim),
                linear(some, embed_dim, 4 * embed_dim),
                linear(some, 4 * embed_dim, embed_dim),
            ]

        embedding = linear(images * patches, setting.channels * setting.patch_size**2, embed_dim)
        return [embedding, *block(length) * (setting.depth - 1), *block(length if authors else 1)]

    def projector(backward: bool) -> list[Product]:
        sizes = (embed_dim, setting.hidden, setting.hidden, setting.projection)
        return [Product(1, batch, sizes[i], sizes[i + 1], backward) for i in range(3)]

    similarities = [Product(1, batch, size, batch, True) for size in (setting.projection,) * 2 + (embed_dim,)]
    if authors:
        passes = 3 * encoder(batch, True) + 3 * encoder(batch, False) + 2 * projector(True) + 4 * projector(False)
    else:
        passes = encoder(3 * batch, True) + encoder(2 * batch, False) + encoder(batch, False)
        passes += 2 * projector(True) + 2 * projector(False)
    return passes + similarities


def limit(setting: Setting, authors: bool, precision: str) -> Step:
    """A step that computes only the matrix products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @cache
    def operands(count: int, rows: int, inner: int, columns: int) -> tuple[torch.Tensor, ...]:
        outer = () if count == 1 else (count,)
        shapes = (rows, inner), (columns, inner), (rows, columns), (rows, inner), (columns, inner)
        return tuple(torch.randn(*outer, *shape, device=setting.device, dtype=dtype) for shape in shapes)

    listed = products(setting, authors)

    def step() -> float:
        for *shape, backward in listed:
            x, weight, y, grad_x, grad_weight = operands(*shape)
            torch.matmul(x, weight.mT, out=y)
            if backward:
                torch.matmul(y, weight, out=grad_x)
                torch.matmul(y.mT, x, out=grad_weight)
        return y[0, 0].item()  # waits for a GPU

    return step


def peak_memory(setting: Setting, variant: str) -> int:
    """Peak memory in bytes of the first steps in a fresh process, minus its memory before them."""
    if not setting.plain_allocator:
        keep_freed_memory()
    step = build(setting, variant)
    if on_cuda := setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * os.sysconf("SC_PAGE_SIZE")
    for _ in range(MEMORY_STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - before


def measure(
    show: Annotated[list[Path] | None, typer.Argument(help="with --show: OUTPUT of earlier runs")] = None,
    output: Path = Path("train_step.json"),
    image_size: int = Setting.image_size,
    channels: int = Setting.channels,
    patch_size: int = Setting.patch_size,
    embed_dim: int = Setting.embed_dim,
    depth: int = Setting.depth,
    num_heads: int = Setting.num_heads,
    hidden: int = Setting.hidden,
    projection: int = Setting.projection,
    batch: int = Setting.batch,
    device: str = Setting.device,
    rounds: int = 7,
    variants: str = "authors_fp32,rrcm_fp32,rrcm_bf16",
    plain_allocator: Annotated[bool, typer.Option(help="keep the default memory allocator")] = False,
    reference_code: Annotated[Path | None, typer.Option("--reference", help="checkout of the authors' code")] = None,
    only_show: Annotated[bool, typer.Option("--show", help="print earlier runs and measure nothing")] = False,
) -> None:
    """Measure one setting and write the figures to OUTPUT, or `--show` the figures of earlier runs."""
    if only_show:
        print("\n\n".join(summary(read_json(path)) for path in show or []))
        return
    names = variants.split(",")
    if unknown := [name for name in names if name not in LABELS]:
        raise RRCMError(f"variants {unknown[0]}: unknown; choose from {', '.join(LABELS)}")
    setting = Setting(
        image_size,
        channels,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        hidden,
        projection,
        batch,
        device,
        plain_allocator,
        str(reference_code) if reference_code else None,
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        memory = {name: fresh.submit(peak_memory, setting, name).result() for name in names}
    if not plain_allocator:
        keep_freed_memory()
    steps = {name: build(setting, name) for name in names}
    losses = {name: step() for name, step in steps.items()}  # warm-up, compilation
    for name, loss in losses.items():
        if not abs(loss / losses[names[0]] - 1) < (1e-2 if "bf16" in name else 1e-4):
            raise RRCMError(f"first losses differ: {name} {loss:.5f}, {names[0]} {losses[names[0]]:.5f}")
    steps |= {
        f"limit_{limit_of(name)}": limit(setting, name.startswith("authors"), name.split("_")[1]) for name in names
    }
    seconds = {name: [] for name in steps}
    with Progress(rounds, f"benchmark batch {batch}", "rounds") as progress:
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
            progress.update(1)
    description = asdict(setting) | {"reference": "the authors' code" if reference_code else "our own lines"}
    record = description | {
        "losses": losses,
        "seconds": seconds,
        "memory": memory,
        "environment": describe_environment(device),
    }
    write_json(output, record)
    print(summary(record))


def limit_of(variant: str) -> str:
    return "_".join(variant.split("_")[:2])


def summary(record: dict) -> str:
    """A table of seconds per step (median and range over the rounds), shares of the limit and peak memory."""
    seconds, memory = record["seconds"], record["memory"]
    rows = []
    names = [name for name in LABELS if name in seconds]
    first = names[0]
    for name in names:
        times, limits = seconds[name], seconds[f"limit_{limit_of(name)}"]
        row = {
            "variant": LABELS[name],
            "s per step (range)": f"{median(times):.3f} ({min(times):.3f} - {max(times):.3f})",
            "images/s": f"{record['batch'] / median(times):,.0f}",
            "of the limit": f"{median(limits) / median(times):.2f}",
            "peak memory, MiB": f"{memory[name] / 2**20:,.0f}",
            "faster than the first": f"{median(seconds[first]) / median(times):.2f}x",
            "memory of the first": f"{memory[name] / memory[first]:.2f}x",
        }
        rows.append(row)
    where = record["environment"]["hardware"]
    machine = ", ".join(where["gpus"]) or f"{where['cpu']}, {where['threads']} threads"
    title = (
        f"{record['image_size']}x{record['image_size']}x{record['channels']}, patch {record['patch_size']}, "
        f"D {record['embed_dim']}, depth {record['depth']}, projector {record['hidden']} -> {record['projection']}, "
        f"batch {record['batch']}; {machine}, freed memory {'not ' if record['plain_allocator'] else ''}kept; "
        f"(a) is {record['reference']}"
    )
    return f"{title}\n\n" + tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    app = make_app()  # rrcm.utils.app.run_command would keep freed memory
    app.command()(exit_on_error(measure))
    app()
