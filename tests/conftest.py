"""Helpers and fixtures: small projects on which the real stages run within seconds, on the real digits."""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pandas as pd
import pytest
import torch
import yaml
from dvc.utils.hydra import compose_and_dump

from rrcm.certification.results import certificates_text, samples_text
from rrcm.config import Config, Data, load_config
from rrcm.data.datasets import RawDataset, read_dataset
from rrcm.data.sharding import identify_images, split_off_test, write_shards
from rrcm.derived import SECTIONS, derived_settings
from rrcm.models.folders import sha256_config
from rrcm.utils.files import read_json, sha256_file, write_json, write_text

REPOSITORY = Path(__file__).parent.parent
COMMANDS = sorted(path.name for path in REPOSITORY.glob("stages/*.py") if "    run_command(" in path.read_text())
os.environ["no_proxy"] = "127.0.0.1"  # where the tests have servers
os.environ["PYTHONPATH"] = str(REPOSITORY)  # all that tests start runs the code of this checkout, not the installed one
hypothesis.settings.register_profile("thorough", max_examples=1000)  # --hypothesis-profile=thorough
TINY = [
    "sigmas=[0.25,0.5]",
    "methods=[rrcm,gaussian_matched]",
    "model.patch_size=4",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.projector_hidden_dim=32",
    "model.projection_dim=16",
    "pretrain.batch_size=64",
    "pretrain.steps=30",
    "pretrain.warmup_steps=4",
    "pretrain.min_levels=20",
    "pretrain.max_levels=80",
    "pretrain.t_max=80",
    "pretrain.temperature=0.2",
    "pretrain.precision=fp32",
    "finetune.precision=fp32",
    "pretrain.log_every=3",
    "pretrain.evaluate_every=10",
    "pretrain.checkpoint_every=5",
    "finetune.epochs=6",
    "finetune.lr=5e-3",
    "finetune.warmup_epochs=1",
    "finetune.batch_size=128",
    "finetune.checkpoint_every=1",
    "certify.n=1000",
    "certify.batch_size=200",
    "certify.every=10",
    "latency.seconds=0.01",
]
CASCADE = ["cascade.methods=[rrcm,rrcm_joint]", "cascade.choose_n=40"]


@cache
def composed(*overrides: str) -> str:
    """The text of params.yaml with these overrides. Hydra takes half a second, so each text is composed once."""
    conf = str(REPOSITORY / "conf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        compose_and_dump(path, conf, None, "config", f"{conf}/plugins", list(overrides))
        return path.read_text(encoding="utf-8")


def compose(path: Path, *overrides: str) -> Path:
    """Write the tiny settings with these overrides to `path`; returns `path`."""
    path.write_text(composed(*TINY, *overrides), encoding="utf-8")
    return path


CLEAN = {"revision": "1" * 40, "dirty": False}
ROWS = 'label,result,method,model,sigma\n"tiny, rRCM",tiny,rrcm,,\n"ImageNet, rRCM-B",,rRCM,rRCM-B,1.0\n'
PERSON = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
PERSON |= {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org"}


class Answer(NamedTuple):
    """Exit status and output of a finished stage."""

    returncode: int  # negative: the signal that killed it
    stdout: str
    stderr: str


# Stages run in processes of their own, forked from a server that has done the slow imports once. It skips names that
# do not exist without a word, so a test in test_layout.py checks them.
PRELOAD = [
    "rrcm.training.pretrain",
    "rrcm.training.finetune",
    "rrcm.certification.certify",
    "rrcm.certification.certify_cascade",
    "rrcm.evaluation.latency",
    "rrcm.evaluation.attack",
    "rrcm.report.build",
    "dvclive",  # trainings import it for their live metrics, with these modules of DVC
    "dvc.repo",
    "dvc.api",
    "dvc.utils.hydra",  # stages import the rest where they need it
    "hydra",
    "sklearn.datasets",
    "timm",
    "webdataset",
    "tests.read_code",
]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOAD)


def _run_stage(folder: Path, name: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)  # tests may run in parallel
    multiprocessing.set_start_method(None, force=True)  # the default again: loader workers would import torch anew
    os.chdir(folder)
    os.environ |= {"RRCM_RUNS": str(folder / "runs"), "XDG_CACHE_HOME": str(folder / ".cache")} | environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for descriptor, log in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [f"{name}.py", *arguments]
    runpy.run_path(str(REPOSITORY / "stages" / f"{name}.py"), run_name="__main__")


def start(folder: Path, name: str, *arguments: str, **environment: str) -> multiprocessing.Process:
    """Start the command of a stage in `folder`; its output goes to the files `stdout` and `stderr` there."""
    process = server.Process(target=_run_stage, args=(folder, name, arguments, environment))
    process.start()
    return process


def start_all(folder: Path, name: str, arguments: list[str], world: int) -> list:
    """Start a stage in `world` processes with the environment that torchrun would give them."""
    if world == 1:
        return [start(folder, name, *arguments)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
    return [start(folder, name, *arguments, RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(world)]


def exit_codes(processes: list) -> list[int]:
    """Wait for all processes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def stage(folder: Path, name: str, *arguments: str, **environment: str) -> Answer:
    """Run a stage and wait for it."""
    process = start(folder, name, *arguments, **environment)
    process.join()
    return Answer(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def kill_when(folder: Path, pattern: str, name: str, *arguments: str, larger_than: int = -1) -> None:
    """Start a stage in `folder`, and kill it once a file that matches `pattern` has more than this many bytes.

    It must not have ended before.
    """
    process = start(folder, name, *arguments)
    while not any(path.stat().st_size > larger_than for path in folder.glob(pattern)):
        assert process.is_alive(), (folder / "stderr").read_text()
        wait([process.sentinel], timeout=0.005)
    process.kill()
    process.join()


def read_with_test(data: Data) -> RawDataset:
    """A raw data set with test images, split off if it has none, as the shards are made from it."""
    dataset = read_dataset(data)
    with ThreadPoolExecutor(1) as pool:
        return split_off_test(dataset, identify_images(dataset, data, pool))[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path and content of every file in a folder and below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """No element differs by more than `bound` times the largest: rounding follows the scale of what is summed."""
    found, expected = found.detach(), expected.detach()
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert found.shape == expected.shape and difference <= bound * scale, f"{difference} is too much for {scale}"


def assert_same_gradients(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Each tensor agrees to 1e-4 of its norm. One that is zero but for rounding may have 1e-5 of the norm of all."""
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-5 * total, f"{name}: {difference} is too much"


def in_own_mounts(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a shell script that may mount what it likes; skip the test where that is not allowed."""
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *map(str, arguments)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if answer.returncode == 77 or "Operation not permitted" in answer.stderr:
        pytest.skip("needs the right to mount")
    return answer


# Fixtures of a session or a module that take long. The first one that a test needs names its group.
SHARED = ("honest", "cascaded", "invented_report", "denoising_report", "committed", "joint", "passing", "parts")
SHARED += ("plugged", "run", "students", "sources")
SLOW = {*SHARED, "trained", "walked"}  # a test that needs one of these is slow


@pytest.hookimpl(tryfirst=True)  # before pytest and pytest-xdist read the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests that need a fixture of `SHARED` on one worker, which then builds it once. Mark slow tests."""
    for item in items:
        if shared := [name for name in SHARED if name in item.fixturenames]:
            item.add_marker(pytest.mark.xdist_group(shared[0]))
        if SLOW & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Shards of the digits, shared by all tests; do not change them."""
    folder = tmp_path_factory.mktemp("tiny")
    config = load_config(compose(folder / "params.yaml"))
    write_shards(config.data, config.seed, folder / "shards")
    return folder / "shards"


def make_project(folder: Path, shards: Path, *overrides: str) -> Path:
    """Give `folder` a `params.yaml` with the tiny settings, and `data/shards`."""
    compose(folder / "params.yaml", *overrides)
    (folder / "data").mkdir()
    (folder / "data" / "shards").symlink_to(shards)
    return folder


@pytest.fixture
def project(tmp_path, tiny_shards) -> Path:
    """A folder with `params.yaml` and `data/shards`, where a test may do as it likes."""
    return make_project(tmp_path, tiny_shards)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_shards) -> Path:
    """A project with a trained and certified rrcm classifier at sigma 0.5, shared by all tests; do not change it."""
    folder = make_project(tmp_path_factory.mktemp("trained"), tiny_shards)
    for command in (["pretrain"], ["finetune", "rrcm", "0.5"], ["certify", "rrcm", "0.5"]):
        answer = stage(folder, *command)
        assert answer.returncode == 0, answer.stderr
    return folder


def change(project: Path, **settings: object) -> None:
    """Change settings in `params.yaml`; a double underscore in a name stands for a dot."""
    values = yaml.safe_load((project / "params.yaml").read_text())
    for name, value in settings.items():
        *parents, key = name.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[key] = value
    (project / "params.yaml").write_text(yaml.safe_dump(with_derived(values)))


def change_model(folder: Path, **values: object) -> None:
    """Set keys of a model folder's config.json, or remove those that are `...`, and make its hashes fit again."""
    config = read_json(folder / "config.json")
    files = {name: sha256_file(folder / name) for name in config["files"] if (folder / name).exists()}
    config = {key: value for key, value in (config | {"files": files} | values).items() if value is not ...}
    write_json(folder / "config.json", config | {"sha256": sha256_config(config)})


def with_derived(values: dict) -> dict:
    """Settings with the derived ones brought up to date, where the others make sense."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        values["derived"] = derived_settings({name: values[name] for name in SECTIONS})
    return values


def run_in(folder: Path, *command: str) -> str:
    """Run a command that must succeed; returns what it prints."""
    answer = subprocess.run(command, cwd=folder, env=os.environ | PERSON, capture_output=True, text=True)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def commit(folder: Path) -> None:
    """Commit everything in a repository."""
    run_in(folder, "git", "add", "-A")
    run_in(folder, "git", "-c", "commit.gpgsign=false", "commit", "-qm", "all")


@pytest.fixture(scope="session")
def cascaded(trained, tiny_shards, tmp_path_factory) -> Path:
    """A project like `trained` with a classifier at sigma 0.25, the cascade of both, and a joint model that is not
    certified, shared by all tests; do not change it.
    """
    folder = make_project(tmp_path_factory.mktemp("cascaded"), tiny_shards, "methods=[rrcm,rrcm_joint]", *CASCADE)
    for name in ("models", "certificates", "timings"):
        shutil.copytree(trained / name, folder / name)
    commands = ["finetune rrcm 0.25", "finetune rrcm_joint joint", "certify rrcm 0.25", "certify_cascade rrcm"]
    for command in commands:
        answer = stage(folder, *command.split())
        assert answer.returncode == 0, answer.stderr
    return folder


def finish_run(trained: Path, folder: Path, **settings: object) -> Path:
    """A repository of git and DVC with a finished run, by default of the one trained model, from committed code."""
    from rrcm.publication.readme import BEGIN, END

    for name in ("models", "certificates", "timings", "params.yaml"):
        (shutil.copytree if (trained / name).is_dir() else shutil.copy)(trained / name, folder / name)
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(trained / "data/shards")
    change(folder, **({"sigmas": [0.5], "methods": ["rrcm"], "latency__n": []} | settings))
    for path in (*folder.glob("timings/**/*.json"), *folder.glob("certificates/*/*.json")):
        record = read_json(path)
        record["environment"]["git"] = CLEAN  # the code of this test may be in no commit
        write_json(path, record)
    (folder / "README.md").write_text(f"# Tiny\n\n{BEGIN}{END}\n")
    (folder / "results").mkdir()
    (folder / "results/readme.csv").write_text(ROWS)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / ".gitignore").write_text("/data\n/models\n/certificates\n/timings\n")
    run_in(folder, "git", "init", "-q")
    run_in(folder, sys.executable, "-m", "dvc", "init", "-q")
    run_in(folder, sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "artifacts", "artifacts")
    commit(folder)
    return folder


@pytest.fixture(scope="session")
def honest(trained, tmp_path_factory) -> Path:
    """A repository with the published and committed result tiny; do not change it."""
    from rrcm.publication import freeze
    from rrcm.publication.readme import write_readme

    folder = finish_run(trained, tmp_path_factory.mktemp("honest"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "measure_flips", partial(freeze.measure_flips, samples=2000))  # it takes long
        freeze.publish(folder, "tiny")
    write_readme(folder)
    commit(folder)
    return folder


@pytest.fixture
def repository(honest, tmp_path) -> Path:
    """A copy of the repository that a test may change."""
    return Path(shutil.copytree(honest, tmp_path / "repository", symlinks=True))


def write_certificates(path: Path, frame: pd.DataFrame) -> None:
    """Write a certificate file, as a test has changed it."""
    write_text(path, certificates_text(frame))


def write_samples(path: Path, frame: pd.DataFrame) -> None:
    """Write a samples file, as a test has changed it."""
    write_text(path, samples_text(frame))


@pytest.fixture(scope="session")
def invented_report(tmp_path_factory) -> tuple[Config, Path]:
    """Settings, and a folder with an invented run and its report; whoever changes a file restores it."""
    from invented_run import make_config, make_report  # in tests/report

    return make_report(make_config(), tmp_path_factory.mktemp("invented"), pdf=True)


@pytest.fixture(scope="session")
def denoising_report(tmp_path_factory) -> tuple[Config, Path]:
    """As `invented_report`, of methods that denoise."""
    from invented_run import denoising_config, make_report

    return make_report(denoising_config(), tmp_path_factory.mktemp("denoising"))
