"""How long a checkpoint of pre-training takes: what lies between the end of a step and a state that is safe on disk.

Weights, both averages and both moments of AdamW of the network that the settings describe, on the CPU; written, flushed
to disk and hashed as in training, and read back. After SIGTERM a training takes the step that it is at and this.

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
from rrcm.models.vit import EncoderWithProjector, build_encoder
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import Process
from rrcm.utils.resume import Run

TIMES = 5

resume_gc()


def state_of(config: Config) -> Trainer:
    """A training of this network after one step, with nothing but its state."""
    student = EncoderWithProjector(
        build_encoder(config.model, config.data), config.model.projector_hidden_dim, config.model.projection_dim
    )
    modules = {
        "student": student,
        "teacher": copy.deepcopy(student).requires_grad_(False),
        "average": copy.deepcopy(student.encoder).requires_grad_(False),
    }
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "factor": 1.0}], fused=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return Trainer(
        Run("benchmark", "checkpoint"),
        Process(0, 1, torch.device("cpu")),
        label="benchmark",
        steps=TIMES + 1,
        modules=modules,
        optimizer=optimizer,
        precision="fp32",
        metrics=["loss"],
        checkpoint_every=1,
        suspects=str,
    )


def main(
    params: Annotated[list[Path], typer.Argument(help="settings, as params.yaml")],
    folder: Annotated[Path | None, typer.Option(help="where to write; else a temporary folder")] = None,
) -> None:
    """Print the size of a state, and the seconds to save and to resume it, medians of five."""
    keep_freed_memory()
    rows = []
    for path in params:
        config = load_config(path)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            os.environ["RRCM_RUNS"] = place
            training, seconds = state_of(config), {"save": [], "resume": []}
            for step in range(TIMES):
                training.done = step + 1
                for name, action in (("save", training.save), ("resume", training.resume)):
                    start = time.perf_counter()
                    action()
                    seconds[name].append(time.perf_counter() - start)
            size = max(file.stat().st_size for file in training.run.folder.glob("*.safetensors"))
            training.run.finish()
        shown = [f"{median(times):.2f} ({min(times):.2f} - {max(times):.2f})" for times in seconds.values()]
        rows.append([config.profile, f"{size / 2**20:,.0f}", *shown])
    print(tabulate(rows, ["profile", "MiB", "s to save", "s to resume"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
