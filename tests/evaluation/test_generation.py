"""Frechet distance against closed forms and scipy, the nearest image by brute force, and the stage on the digits."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, compose, exit_codes, files_of, make_project, stage, start_all
from safetensors.torch import load_file
from scipy.linalg import sqrtm

from rrcm.config import Config, load_config
from rrcm.data.sharding import write_shards
from rrcm.evaluation.generation import (
    Gaussian,
    Moments,
    frechet_distance,
    generate,
    nearest_images,
    sampler_levels,
    to_pixels,
    trajectory,
)
from rrcm.models.checkpoints import save_model
from rrcm.models.condition import load_condition
from rrcm.models.denoiser import load_denoiser
from rrcm.models.noise_levels import karras_levels
from rrcm.models.sampler import heun
from rrcm.models.vit import build_encoder
from rrcm.training.denoiser import train_denoiser
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

CPU = torch.device("cpu")


def random_gaussian(dim: int, rank: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(dim, generator=generator, dtype=torch.float64), factor @ factor.T)


def test_frechet_distance_in_closed_form():
    """Equal Gaussians: 0. Shifted: the squared shift. Commuting covariances: squared differences of deviations."""
    one = random_gaussian(7, 7, seed=0)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    shift = torch.arange(7.0, dtype=torch.float64)
    assert frechet_distance(one, Gaussian(one.mean + shift, one.covariance)) == pytest.approx(91, rel=1e-12)
    basis, _ = torch.linalg.qr(one.covariance)
    deviations = torch.tensor([[0, 0, 1, 2, 3, 4, 5], [0, 3, 1, 0, 5, 2, 7]], dtype=torch.float64)
    first, second = (Gaussian(one.mean, basis * d.square() @ basis.T) for d in deviations)
    expected = (deviations[0] - deviations[1]).square().sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-12)  # singular


def test_frechet_distance_against_scipy():
    one, other = random_gaussian(12, 20, seed=1), random_gaussian(12, 20, seed=2)
    root = sqrtm(one.covariance.numpy() @ other.covariance.numpy()).real
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace()
    assert frechet_distance(one, other) == pytest.approx(float(expected) - 2 * np.trace(root), rel=1e-10)


def test_frechet_distance_is_symmetric_and_does_not_depend_on_the_axes():
    one, other = random_gaussian(9, 5, seed=3), random_gaussian(9, 14, seed=4)
    distance = frechet_distance(one, other)
    turn, _ = torch.linalg.qr(random_gaussian(9, 9, seed=5).covariance)
    turned = [Gaussian(turn @ g.mean + 3, turn @ g.covariance @ turn.T) for g in (one, other)]
    assert frechet_distance(other, one) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-7)


def test_moments_are_those_of_all_batches():
    rows = 5 + torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for batch in rows.split(13):
        moments.add(batch)
    mean, covariance = moments.gaussian()
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_the_nearest_images_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr("rrcm.evaluation.generation.BATCH", 4)
    generator = torch.Generator().manual_seed(0)
    bank, images = (torch.randint(0, 256, (n, 3, 5, 5), dtype=torch.uint8, generator=generator) for n in (50, 9))
    bank[30] = bank[11] = images[2]  # copies, of which the first is found
    found = nearest_images(images, bank.split(7))
    distances = (images[:, None].double() - bank[None].double()).flatten(2).norm(dim=2) / 255
    assert found.row.tolist() == distances.argmin(1).tolist() and found.row[2] == 11
    torch.testing.assert_close(found.distance, distances.min(1).values, rtol=1e-12, atol=0)
    assert found.distance[2] == 0


def test_pixels_are_rounded_and_clipped():
    images = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 1.0, 7.0]).view(1, 1, 1, 6)
    assert to_pixels(images).flatten().tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize(("steps", "total"), [(2, 8), (18, 24), (24, 24)])
def test_the_sampler_visits_the_grid_of_the_pre_training(tmp_path, steps, total):
    overrides = ["pretrain.min_levels=2", "pretrain.max_levels=8", "pretrain.t_max=5"]
    settings = load_config(compose(tmp_path / "params.yaml", *overrides)).pretrain
    levels = sampler_levels(settings, steps)
    assert len(levels) == total + 1 and levels[-1] == 0
    grid = karras_levels(9, t_min=settings.t_min, t_max=5, rho=settings.rho).tolist()
    assert levels[:: total // 8][:-1] == pytest.approx(grid[:-1], rel=1e-12)


def test_the_trajectory_is_the_way_of_the_sampler():
    """With the exact denoiser of standard normal data, x_t on the way is x_T (1 + t^2)^(1/2) / (1 + T^2)^(1/2)."""
    levels = [*torch.linspace(3, 0.05, 200).tolist(), 0.0]
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return x / (1 + t**2)

    way = list(trajectory(denoise, start, levels))
    assert len(way) == len(levels) and torch.equal(way[0], start)
    assert torch.equal(way[-1], heun(denoise, start, levels))
    middle = start * math.sqrt((1 + levels[100] ** 2) / 10)
    assert_close(way[100], middle, 1e-4)


def save_encoder(folder: Path, config: Config, seed: int) -> None:
    """A model folder with an encoder of random weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_model(folder, build_encoder(config.model, config.data))


SMALL = ["model.embed_dim=16", "model.num_heads=2", "model.depth=1", "model.patch_size=4", "data.workers=0"]
SMALL += ["denoiser.batch_size=64", "denoiser.warmup_steps=5", "denoiser.lr=2e-2", "denoiser.ema_decay=0.8"]
SMALL += ["denoiser.log_every=10", "denoiser.evaluate_every=1000", "denoiser.precision=fp32", "generate.steps=6"]
SMALL += ["pretrain.min_levels=2", "pretrain.max_levels=4", "pretrain.t_max=4"]


@pytest.mark.slow
def test_a_denoiser_uses_its_condition(tmp_path, monkeypatch):
    """Eight patterns under noise that hides them: what is told the pattern draws it, what is not draws their mean."""
    from rrcm.data import datasets
    from rrcm.data.datasets import RawDataset, RawSplit

    rng = np.random.default_rng(0)
    patterns = rng.choice([0, 254], (8, 8, 8)).astype(np.uint8)
    labels = np.arange(160) % 8
    train, test = (RawSplit(patterns[labels] + rng.integers(0, 2, (160, 8, 8), np.uint8), labels) for _ in range(2))
    monkeypatch.setitem(datasets.DATASETS, "patterns", lambda data: RawDataset([*"abcdefgh"], train, test))
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    overrides = ["data.source=patterns", "denoiser.noise_mean=3.0", "denoiser.noise_std=0.3", "sigmas=[10.0]"]
    config = load_config(compose(tmp_path / "params.yaml", *SMALL, *overrides, "denoiser.steps=150"))
    write_shards(config.data, 0, tmp_path / "shards")
    save_encoder(tmp_path / "encoder", config, seed=0)
    errors = {}
    for name, encoder in (("alone", None), ("told", tmp_path / "encoder")):
        train_denoiser(config, tmp_path / "shards", tmp_path / name, tmp_path / f"{name}.json", encoder)
        (row,) = csv.DictReader((tmp_path / name / "denoising.csv").open())
        errors[name] = float(row["mean_squared_error"])
    assert errors["told"] < 0.2 < 0.6 < errors["alone"]

    denoiser, condition = load_denoiser(tmp_path / "told"), load_condition(config, tmp_path / "encoder", CPU)
    assert read_json(tmp_path / "told/config.json")["condition"] == condition.identity
    clean = 2 * torch.from_numpy(patterns)[:, None].float() / 255 - 1
    noisy = clean + 20 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        swapped = denoiser(noisy, 20.0, condition(clean.roll(1, 0)))
    assert (swapped - clean.roll(1, 0)).square().mean() < 0.2 < (swapped - clean).square().mean()
    train_denoiser(config, tmp_path / "shards", tmp_path / "again", tmp_path / "again.json", tmp_path / "encoder")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "told")


@pytest.fixture(scope="module")
def generated(tiny_shards, tmp_path_factory):
    """A project in which images were generated with a random encoder."""
    settings = [*SMALL, "generate.objectives=[rrcm]", "denoiser.steps=20"]
    folder = make_project(tmp_path_factory.mktemp("generated"), tiny_shards, *settings)
    config = load_config(folder / "params.yaml")
    save_encoder(folder / "models/pretrain/rrcm", config, seed=0)
    for command in (["denoiser", "rrcm"], ["generate", "rrcm"]):
        answer = stage(folder, *command)
        assert answer.returncode == 0, answer.stderr
    return folder


@pytest.mark.slow
def test_the_stage_measures_and_draws(generated):
    folder = generated / "generated/rrcm"
    files = files_of(folder)
    assert set(files) == {"frechet_distance.csv", "summary.json"} | {
        f"{name}{suffix}" for name in ("frechet_distance", "samples") for suffix in (".png", ".svg")
    }
    rows = [
        {key: float(value) for key, value in row.items()}
        for row in csv.DictReader((folder / "frechet_distance.csv").open())
    ]
    assert [row["t"] for row in rows] == pytest.approx(karras_levels(5, t_max=4).tolist())
    summary = read_json(folder / "summary.json")
    floor, found = summary["frechet_distance"]["between_clean_halves"], summary["frechet_distance"]
    assert rows[-1]["noisy"] == pytest.approx(floor["trained"], rel=0.02)  # noise of t_min is no noise
    assert rows[0]["noisy"] > rows[-1]["noisy"] > 0 and found["pure_noise"] == rows[0]["generated"]
    assert summary["images"] == 359 // 2
    nearest = summary["distance_to_nearest_training_image"]
    assert 0 < nearest["test"]["least"] < nearest["test"]["mean"] < nearest["from_noise"]["mean"]
    answer = stage(generated, "generate", "rrcm")
    assert answer.returncode == 0 and files_of(folder) == files
    assert f"mean L2 distance to the nearest training image {nearest['from_test']['mean']:.3g}" in answer.stderr


@pytest.mark.slow
def test_two_processes_train_the_same_denoiser(generated, tmp_path):
    for name in ("params.yaml", "data", "models"):
        (tmp_path / name).symlink_to(generated / name)
    assert exit_codes(start_all(tmp_path, "denoiser", ["rrcm"], world=2)) == [0, 0]
    one, two = (load_file(folder / "generated/denoiser/rrcm/model.safetensors") for folder in (generated, tmp_path))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_a_denoiser_for_another_encoder_is_refused(generated, tmp_path):
    config = load_config(generated / "params.yaml")
    save_encoder(tmp_path / "other", config, seed=1)
    with pytest.raises(RRCMError, match=r"was not trained with .*other; run `dvc repro conditional-denoiser` again"):
        generate(config, "rrcm", generated / "data/shards", tmp_path / "other", generated / "generated/denoiser/rrcm")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["generate.objectives=[dmae]"], r"generate\.objectives \['dmae'\] must be among pretrain\.objectives"),
        (["generate.objectives=[rrcm]", "denoiser.network=unet"], r"need denoiser\.network vit, as unet takes no"),
        (["generate.objectives=[rrcm]", "denoiser.patch_size=3"], r"must be a multiple of denoiser\.patch_size 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, overrides, problem):
    with pytest.raises(RRCMError, match=problem):
        load_config(compose(tmp_path / "params.yaml", *overrides))
