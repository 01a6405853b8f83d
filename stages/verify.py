"""Verify the published results without training: `make verify`. This is no DVC stage, and it changes no tracked file.

1. `dvc pull` fetches the artifacts. Every file is hashed and compared with dvc.lock: DVC trusts what its cache has, and
   files whose time and size it knows. `dvc status` compares the code and the settings with dvc.lock.
2. The report is drawn again and compared byte for byte.
3. A few random images are certified again, with the noise of the published certificates. On the same kind of machine
   with the same PyTorch the answers must be identical. Elsewhere the network rounds differently and a few votes move.
4. Each of these certificates is tested with fresh noise. It says that the class has at least the probability
   Phi(radius / sigma) under noise. It is contradicted if an upper confidence bound from n new samples is below that.
   True certificates pass all of these tests together with probability at least 1 - alpha, as the bounds share alpha.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

import hashlib
import json
import random
import secrets
import subprocess
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
import yaml
from scipy.special import ndtr, ndtri

from rrcm.certification.noise import ESTIMATE
from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.certification.smoothing import Certificate, SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import clopper_pearson_lower
from rrcm.config import Config, load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.ensembles import with_consensus
from rrcm.models.load import load_base_classifier
from rrcm.report.build import write_report
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment


class Found(NamedTuple):
    """What certifying again has shown about one model."""

    problems: list[str]
    certified: int  # images
    identical: int  # of these, equal to the published certificate
    exact: bool  # whether this machine computes as the publishing one did, so that all must be identical


def verify(
    images: Annotated[int, typer.Option(min=1, help="Images to certify again, per model.")] = 8,
    models: Annotated[int, typer.Option(min=1, help="Models to certify again.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Chooses models, images and fresh noise; default: random.")] = None,
) -> None:
    """Pull, draw again, certify again, and compare with what is published. The verdict is the last line."""
    start, root = time.monotonic(), Path()
    seed = secrets.randbelow(2**31) if seed is None else seed
    config = load_config(root / "params.yaml")

    _say("1/4 dvc pull, hashes of all files, dvc status")
    problems = check_artifacts(root)
    _say(f"2/4 draw reports/{config.report.name} again")
    drawn, differences = check_report(config, root)
    problems += differences

    _say(f"3/4 and 4/4 certify again and test with fresh noise (repeat this choice with --seed {seed})")
    choice = random.Random(seed)
    pairs = [(method, sigma) for method in config.methods for sigma in config.sigmas]
    pairs = choice.sample(pairs, min(models, len(pairs)))
    alpha = config.certify.alpha / (len(pairs) * images)  # Bonferroni
    found = [certify_again(config, root, *pair, images, choice.randrange(2**31), alpha) for pair in pairs]
    for model in found:
        problems += model.problems

    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    if problems:
        print(f"NOT verified: {len(problems)} problem{'s' * (len(problems) > 1)}, listed above")
        raise typer.Exit(1)
    certified, identical = (sum(getattr(model, name) for model in found) for name in ("certified", "identical"))
    other = "" if all(model.exact for model in found) else " (published from another machine or PyTorch version)"
    print(
        f"verified: {drawn} files of the report are identical, so are {identical} of {certified} certificates{other}, "
        f"and fresh noise contradicts none ({time.monotonic() - start:.0f} s)"
    )


def check_artifacts(root: Path) -> list[str]:
    """Fetch the artifacts, and name the files and the stages that are not as dvc.lock records them."""
    from dvc.repo import Repo  # slow to import

    pulled = subprocess.run([sys.executable, "-m", "dvc", "pull"], stdout=sys.stderr)
    if pulled.returncode != 0:
        raise RRCMError("dvc pull failed, see above; nothing could be verified")
    with Repo() as repo:
        problems = check_hashes(root, Path(repo.cache.local.path))
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], stdout=subprocess.PIPE, text=True)
    if status.returncode != 0:
        raise RRCMError("dvc status failed, see above; nothing could be verified")
    changes = json.loads(status.stdout)
    return problems + [f"dvc status: {name}: {json.dumps(change)}" for name, change in changes.items()]


def check_hashes(root: Path, cache: Path) -> list[str]:
    """A line for each file of the stages' outputs that does not have its hash in dvc.lock.

    For a folder, dvc.lock has the hash of a list of its files, which DVC keeps in its `cache`. Where that list is
    missing, as for a folder that git keeps, the line names the folder.
    """
    stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"].values()
    problems = []
    for out in (out for stage in stages for out in stage.get("outs", [])):
        path, expected = root / out["path"], out["md5"]
        found, listed = _hashes(path), {".": expected}
        if expected.endswith(".dir"):
            entries = json.dumps([{"md5": md5, "relpath": name} for name, md5 in found.items()])
            if hashlib.md5(entries.encode()).hexdigest() == expected.removesuffix(".dir"):
                continue
            listing = cache / expected[:2] / expected[2:]
            if _hashes(listing) == {".": expected.removesuffix(".dir")}:
                listed = {entry["relpath"]: entry["md5"] for entry in read_json(listing)}
            else:
                found = {}
        wrong = sorted(name for name in found.keys() | listed if found.get(name) != listed.get(name))
        problems += [
            f"{path / name}: is not what dvc.lock has; delete it and .dvc/cache, and pull again" for name in wrong
        ]
    return problems


def _hashes(path: Path) -> dict[str, str]:
    """The MD5 of a file as that of ".", or those of the files in a folder by their names, in DVC's order."""
    if path.is_dir():
        names = sorted(name.as_posix() for name in _files(path) if not fnmatch(name.name, ".*.tmp"))  # see .dvcignore
    else:
        names = ["."] if path.is_file() else []
    return {name: hashlib.md5((path / name).read_bytes()).hexdigest() for name in names}


def check_report(config: Config, root: Path) -> tuple[int, list[str]]:
    """Draw the report of `root` into a scratch folder: (files drawn, differences from the published one)."""
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / config.report.name
        write_report(config, root, drawn)
        return len(_files(drawn)), compare_folders(root / "reports" / config.report.name, drawn)


def compare_folders(published: Path, drawn: Path) -> list[str]:
    """A line for each file that is in only one of two folders or differs by a byte."""
    problems = []
    first, second = _files(published), _files(drawn)
    for name in sorted(first | second):
        if name not in first or name not in second:
            problems.append(f"{published / name}: {'missing' if name not in first else 'is not drawn any more'}")
        elif (published / name).read_bytes() != (drawn / name).read_bytes():
            problems.append(f"{published / name}: differs when drawn again (with the versions of constraints.txt?)")
    return problems


def certify_again(config: Config, root: Path, method: str, sigma: float, images: int, seed: int, alpha: float) -> Found:
    """Certify random images again, with the published noise and with fresh noise from `seed`.

    Labels and image numbers of the whole published file are compared too. `alpha` is the chance, per image, that the
    test with fresh noise contradicts a true certificate.
    """
    settings, model = config.certify, f"{method}/{sigma_name(sigma)}"
    path = root / f"certificates/{model}.tsv"
    published = read_certificates(path).join(read_samples(path.with_suffix(".samples.tsv")).set_index("idx"), on="idx")
    record = read_json(root / f"timings/certify/{model}.json")
    device = pick_device(config.device)
    torch.set_num_threads(record["environment"]["hardware"]["threads"])

    split = ShardedDataset(str(root / "data/shards"), "test")
    limits = settings.max_images, config.denoised.max_images.get(method)
    pixels, labels, indices = read_split(split, config.data.image_size, settings.every, *limits)
    if published["idx"].tolist() != list(indices) or published["label"].tolist() != labels.tolist():
        return Found([f"{path}: its images or labels are not those of the test split"], 0, 0, False)

    network = load_base_classifier(str(root / f"models/{model}")).classifier.to(device)
    network = with_consensus(network, settings.consensus)
    options = {name: getattr(settings, name) for name in ("batch_size", "memory_gib", "precision", "compile")}
    smoothed = SmoothedClassifier(network, sigma, len(split.classes), seed=config.seed, **options)
    fresh = SmoothedClassifier(network, sigma, len(split.classes), seed=seed, **options)
    exact = same_computation(
        record, describe_environment(device), smoothed.precision, smoothed.find_batch_size(pixels[0])
    )

    problems, identical = [], 0
    rows = sorted(random.Random(seed).sample(range(len(published)), min(images, len(published))))
    with Progress(len(rows), f"certify {model} again", "images") as progress:
        for row in rows:
            image, claim = pixels[row].to(device).float() / 255, published.iloc[row]
            (again,) = smoothed.certify(image[None], labels[row : row + 1], indices=[claim["idx"]], **settings.rule)
            identical += is_identical(claim, again)
            if exact and not is_identical(claim, again):
                problems.append(f"{path}: image {claim['idx']} is published as {_text(claim)}, is now {again}")
            if claim["radius"] > 0:
                (votes,) = fresh.count_votes([SampleRequest(image, claim["idx"], ESTIMATE, 0, settings.n)])
                hits, others = int(votes[claim["predict"]]), np.delete(votes, claim["predict"])
                if is_contradicted(claim["radius"], sigma, hits, others, settings.n, alpha, settings.bound):
                    won = f"class {claim['predict']} wins {hits} of {settings.n} new samples"
                    problems.append(f"{path}: image {claim['idx']}: {won}, too few for the radius {claim['radius']}")
            progress.update()
    return Found(problems, len(rows), identical, exact)


def is_identical(published: pd.Series, again: Certificate) -> bool:
    """Whether class, radius, number of samples and reason to stop are the same."""
    claim = (published["predict"], published["radius"], published["samples"], published["stop_reason"])
    return claim == (again.prediction, again.radius, again.samples, again.stop_reason)


def is_contradicted(
    radius: float, sigma: float, hits: int, others: np.ndarray, n: int, alpha: float, bound: str
) -> bool:
    """Whether n independent noisy samples refute a radius: `hits` for its class, `others` for each other class.

    For the binary bound, that the class has probability >= Phi(radius / sigma). For the margin bound, that
    sigma / 2 (Phi^-1(p_A) - Phi^-1(p_c)) >= radius for every class c; the bounds on p_c share half of alpha. The
    one-sided Clopper-Pearson bounds err with probability at most alpha together, and so does this.
    """
    if bound == "binary":
        return 1 - clopper_pearson_lower(n - hits, n, alpha) < float(ndtr(radius / sigma))
    upper = 1 - clopper_pearson_lower(n - hits, n, alpha / 2)
    lower = clopper_pearson_lower(int(others.max()), n, alpha / 2 / len(others))
    return sigma / 2 * float(ndtri(upper) - ndtri(lower)) < radius


def same_computation(record: dict, here: dict, dtype: str, batch_size: int) -> bool:
    """Whether this machine computes as the one that wrote `record` did: then every vote is the same."""
    there = record["environment"]
    names = ("cpu", "instructions", "gpus")
    same_hardware = all(there["hardware"].get(name) == here["hardware"][name] for name in names)
    same_torch = there["software"]["packages"]["torch"] == here["software"]["packages"]["torch"]
    return same_hardware and same_torch and (record["dtype"], record["batch_size"]) == (dtype, batch_size)


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _text(claim: pd.Series) -> str:
    return ", ".join(f"{name}={claim[name]!r}" for name in ("predict", "radius", "samples", "stop_reason"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(verify)
