"""Try settings on validation images: train one method and certify images from the `val` split.

    python benchmarks/trials.py WORK rrcm 1.0 profile=fashion_mnist pretrain.steps=1200 pretrain.ema_decay=0.99

WORK keeps the shards and the pre-trained encoders, so that a second trial with the same pre-training only fine-tunes.
Each trial adds a row to WORK/trials.csv: the overrides, the encoder's k-NN accuracy and cosine, and the certified
accuracy and radii. Column `certificates` names the file with the certificate of each image.
A joint method is trained once for all sigmas of the settings. Each trial certifies it at one sigma.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from rrcm.utils.app import resume_gc
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.derived import training_noise
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy
from rrcm.methods import METHODS, model_name
from rrcm.models.kinds import load_model_folder

resume_gc()
REPOSITORY = Path(__file__).resolve().parent.parent
RADII = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
VOTER = ("gaussian", 0.25)  # its votes are the soft labels, as in `soft_labels` of conf/config.yaml


def stage(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, REPOSITORY / "stages" / f"{name}.py", *arguments], check=True)


def digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def certify_validation(folder: Path, shards: Path, sigma: float, n: int, images: int) -> pd.DataFrame:
    """Certificates of `images` evenly spaced validation images, with a fixed number n of samples."""
    loaded = load_model_folder(folder, sigma=sigma)
    pixels, labels, _ = read_split(ShardedDataset(shards, "val"), loaded.image_size)
    rows = torch.linspace(0, len(pixels) - 1, min(images, len(pixels))).round().long()
    smoothed = SmoothedClassifier(loaded.classifier, sigma, loaded.num_classes, precision="auto")
    outcomes = smoothed.certify(pixels[rows].float() / 255, stopping="fixed", n=n, indices=rows.tolist())
    frame = pd.DataFrame(
        {"label": labels[rows], "predict": [c.prediction for c in outcomes], "radius": [c.radius for c in outcomes]}
    )
    return frame.assign(correct=(frame["label"] == frame["predict"]).astype(int))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("method")
    parser.add_argument("sigma", type=float)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--n", type=int, default=1000, help="samples per image")
    parser.add_argument("--images", type=int, default=400, help="validation images")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    os.environ.setdefault("RRCM_RUNS", str(Path("runs").resolve()))
    methods, sigmas = [given.method], [given.sigma]
    if METHODS[given.method].needs_soft_labels:
        methods, sigmas = [given.method, VOTER[0]], sorted({given.sigma, VOTER[1]})
    joint = METHODS[given.method].joint is not None
    overrides = [*given.overrides, *([] if joint else [f"sigmas={sigmas}"]), f"methods=[{','.join(methods)}]"]
    params = Path(f"params-{digest(overrides)}.yaml")
    stage("compose", *overrides, "--output", str(params))
    config = load_config(params)
    unused = {"workers", "root", "labels_per_class"}  # by the shards
    shards = Path("shards-" + digest(config.data.model_dump(exclude=unused), config.seed))
    if not shards.exists():
        stage("shard_data", "--params", str(params), "--output", str(shards))
    common = ["--params", str(params), "--shards", str(shards)]
    identity = config.model_dump(mode="json", include={"seed", "threads", "model", "pretrain"})
    encoders = Path("pretrain-" + digest(identity, shards.name))
    record = {"method": given.method, "sigma": given.sigma, "overrides": " ".join(given.overrides)}
    if config.finetune.uses_pretraining(given.method):
        for objective in config.pretrain.objectives:
            if not (encoders / objective).exists():
                stage("pretrain", objective, *common, "--models", str(encoders), "--timings", str(encoders / "timings"))
            rows = pd.read_csv(encoders / objective / "representation.csv")
            for row in rows[rows["step"] == rows["step"].max()].to_dict("records"):
                record |= {
                    f"{key} {row['sigma']}": round(row[key], 3) for key in row if "knn" in key or "centred" in key
                }
    models = Path("models-" + digest(overrides))
    timings, soft_labels = models / "timings", models / "soft_labels.safetensors"
    common += ["--models", str(models)]
    finetune = [*common, "--pretrained", str(encoders), "--timings", str(timings)]
    if METHODS[given.method].needs_soft_labels:
        stage("finetune", VOTER[0], str(VOTER[1]), *finetune)
        stage("soft_labels", *common, "--output", str(soft_labels), "--timing", str(timings / "soft_labels.json"))
    folder = models / given.method / model_name(given.method, given.sigma)
    if not (joint and folder.exists()):
        noise = str(training_noise(given.method, given.sigma))
        stage("finetune", given.method, noise, *finetune, "--soft-labels", str(soft_labels))
    frame = certify_validation(folder, shards, given.sigma, given.n, given.images)
    certificates = f"certificates-{digest(given.method, overrides, given.sigma, given.n, given.images)}.csv"
    frame.to_csv(certificates, index=False)
    settings = json.loads((folder / "config.json").read_text())
    record |= {
        "certificates": certificates,
        "epochs": settings["training"]["epochs"],
        "passes": sum(settings["compute"].values()),
    }
    record |= {"val_accuracy": settings["selected"]["val_accuracy"], "ACR": average_certified_radius(frame)}
    record |= {f"r {radius:g}": value for radius, value in zip(RADII, certified_accuracy(frame, RADII), strict=True)}
    table = Path("trials.csv")
    old = [pd.read_csv(table)] if table.exists() else []
    pd.concat([*old, pd.DataFrame([record])]).to_csv(table, index=False)
    print(pd.Series(record).to_string())


if __name__ == "__main__":
    main()
