"""Time to write and read a pre-training checkpoint, from the end of a step until the state is safe on disk.

The checkpoint holds the state of the configured network on the CPU: weights, both averages and both moments of AdamW.
It is written, flushed to disk and hashed as in training, and then read back. After SIGTERM a training run finishes its
step and then saves.

    python stages/compose.py profile=imagenet_b --output build/imagenet_b.yaml
    python benchmarks/checkpoint.py params.yaml build/imagenet_b.yaml
"""

import copy
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app, resume_gc
from rrcm.config import Config, load_config
from rrcm.models.encoders import build_encoder
from rrcm.models.vit import EncoderWithProjector
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import DistEnv
from rrcm.utils.resume import RunState

TIMES = 5

resume_gc()


def training_state(config: Config) -> Trainer:
    """A training run of the network in `config` after one step, without data."""
    student = EncoderWithProjector(
        build_encoder(config.model, config.data), config.model.projector_hidden_dim, config.model.projection_dim
    )
    modules = {
        "student": student,
        "teacher": copy.deepcopy(student).requires_grad_(False),
        "ema_encoder": copy.deepcopy(student.encoder).requires_grad_(False),
    }
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "lr_scale": 1.0}], fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return Trainer(
        RunState("benchmark", "checkpoint"),
        DistEnv(0, 1, torch.device("cpu")),
        label="benchmark",
        total_steps=TIMES + 1,
        modules=modules,
        optimizer=optimizer,
        precision="fp32",
        metrics=["loss"],
        checkpoint_every=1,
        describe_step=str,
    )


def main(
    params: Annotated[list[Path], typer.Argument(help="files of settings, such as params.yaml")],
    folder: Annotated[Path | None, typer.Option(help="parent of the temporary folder to write to")] = None,
) -> None:
    """Print the size of a checkpoint and the seconds to save and resume it (median and range of five)."""
    keep_freed_memory()
    rows = []
    for path in params:
        config = load_config(path)
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            os.environ["RRCM_RUNS"] = runs
            training, seconds = training_state(config), {"save": [], "resume": []}
            for step in range(TIMES):
                training.step = step + 1
                for name, action in (("save", training.save), ("resume", training.resume)):
                    start = time.perf_counter()
                    action()
                    seconds[name].append(time.perf_counter() - start)
            size = max(file.stat().st_size for file in training.run_state.folder.glob("*.safetensors"))
            training.run_state.finish()
        shown = [f"{median(times):.2f} ({min(times):.2f} - {max(times):.2f})" for times in seconds.values()]
        rows.append([config.profile, f"{size / 2**20:,.0f}", *shown])
    print(tabulate(rows, ["profile", "MiB", "s to save", "s to resume"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
