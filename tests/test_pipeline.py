"""The whole DAG through DVC at smoke size, in a repository of its own: rebuild, verify from a remote, experiment."""

import csv
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TINY, compose, files_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]  # built once
pytestmark += [pytest.mark.timeout(1200)]  # the first test builds the repository, minutes on a busy machine
pytestmark += [pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="git lists the files to copy")]
SMOKE = [override for override in TINY if not override.startswith("sigmas=")] + ["sigmas=[0.5]"]
STAGES = ["shard-data", "pretrain@rrcm", "clean-accuracy", "latency", "plot"] + [
    f"{kind}@{method}" for method in ("rrcm", "gaussian_matched") for kind in ("finetune", "certify")
]


def run(folder: Path, *command: str, fails: bool = False) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
        "COLUMNS": "400",
    }
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (answer.returncode != 0) == fails, f"{command}\n{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    return answer.stdout if answer.stdout.startswith("Experiment,") else answer.stdout + answer.stderr


def ran(output: str) -> set[str]:
    """Stages that `dvc repro` or stages/repro.py says it ran, without their sigma."""
    names = re.findall(r"^(?:Running stage '(.*)'|(.*): ran,)", output, re.MULTILINE)
    return {(dvc or scheduler).removesuffix("-0.5") for dvc, scheduler in names}


def copy_repository(folder: Path) -> Path:
    """A repository of its own in `folder`, with this working tree's code and without results."""
    for name in run(REPOSITORY, "git", "ls-files", "-co", "--exclude-standard").splitlines():
        if not name.startswith(("artifacts/", "results/", "dvc.lock")) and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    run(folder, "git", "init", "-q")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A repository with this working tree's code in which the pipeline and `dvc push` have been run and committed."""
    folder = copy_repository(tmp_path_factory.mktemp("built") / "repository")
    profile = folder / "conf/profile/digits.yaml"  # experiments compose from conf/: the small size must be there too
    compose(folder / "params.yaml", "sigmas=[0.5]")
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    del settings["derived"]  # conf/config.yaml derives it
    profile.write_text("# @package _global_\n" + yaml.safe_dump(settings))
    (folder / "results").mkdir()
    (folder / "results/readme.csv").write_text("label,result,method,model,sigma\ndigits,digits,rrcm,,\n")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "code")  # what is published must be computed with the code of a commit
    output = run(folder, "python", "stages/repro.py", "--jobs", "2")
    assert ran(output) == set(STAGES)
    assert (folder / "reports/digits/best_sigma.md").read_text() in output
    run(folder, "dvc", "push")
    answer = run(folder, "python", "stages/publish.py", "--models", "rrcm")  # to measure flips takes long
    assert "published: results/digits/seed_0" in answer
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "built")
    return folder


def test_a_second_repro_runs_nothing(built):
    assert "up to date" in run(built, "dvc", "status")
    assert not ran(run(built, "dvc", "repro"))
    stages = len(STAGES) + 1  # and the fingerprints
    assert f"0 ran, 0 restored from the cache, {stages} up to date" in run(built, "python", "stages/repro.py")
    assert not run(built, "git", "status", "--porcelain")


def test_metrics_and_plots_show_something(built):
    metrics = run(built, "dvc", "metrics", "show")
    assert "metrics.json" in metrics and "acr" in metrics
    assert "index.html" in run(built, "dvc", "plots", "show")


@pytest.fixture(scope="module")
def cloned(built, tmp_path_factory) -> Path:
    """A fresh clone whose artifacts came through a real HTTP server."""
    folder = tmp_path_factory.mktemp("cloned") / "repository"
    run(built, "git", "clone", "-q", str(built), str(folder))
    shutil.move(folder / "artifacts", folder.parent / "served")
    handler = partial(SimpleHTTPRequestHandler, directory=folder.parent / "served")
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run(folder, "dvc", "remote", "add", "--local", "web", f"http://127.0.0.1:{server.server_port}")
        run(folder, "dvc", "pull", "-r", "web")
        server.shutdown()
    return folder


def test_a_reviewer_verifies_without_training(cloned):
    assert "up to date" in run(cloned, "dvc", "status")
    assert not ran(run(cloned, "dvc", "repro"))
    assert not run(cloned, "git", "status", "--porcelain", "reports", "dvc.lock")


@pytest.mark.thorough  # `make verify` also draws the report again
def test_a_reviewer_draws_the_same_report(cloned):
    published = files_of(cloned / "reports")
    assert any(name.endswith("report.md") for name in published)
    shutil.rmtree(cloned / "reports")
    assert ran(run(cloned, "dvc", "repro", "--force", "--single-item", "plot")) == {"plot"}
    assert files_of(cloned / "reports") == published
    assert not run(cloned, "git", "status", "--porcelain", "reports", "dvc.lock")


def test_verify_passes_and_finds_what_was_changed(cloned):
    command = ("python", "stages/verify.py", "digits", "--rows", "3", "--seed", "1")
    shutil.move(cloned.parent / "served", cloned / "artifacts")
    output = run(cloned, *command)
    assert "\nverified: results/digits/seed_0" in "\n" + output and "with networks voted again: equal" in output
    assert not run(cloned, "git", "status", "--porcelain", "--untracked-files=no")
    weights = cloned / "results/digits/seed_0/run/models/rrcm/sigma_0.5/model.safetensors"
    content, times = weights.read_bytes(), weights.stat()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # DVC does not look at it
    readme = cloned / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("| digits | ", "| digits | 1", 1))
    output = run(cloned, *command, fails=True)
    assert f"{weights.relative_to(cloned)}: was changed" in output and "\nverified" not in output
    assert "README.md, row 'digits', column 'r = 0': has '1" in output
    weights.write_bytes(content)
    readme.write_text(text)


@pytest.mark.thorough  # test_dvc.py has a test that no stage writes there
def test_an_experiment_touches_nothing_that_is_published(cloned):
    published = files_of(cloned / "results")
    run(cloned, "dvc", "exp", "run", "--name", "other", "-S", "report.radii=[0.0]")
    assert files_of(cloned / "results") == published
    assert not run(cloned, "git", "status", "--porcelain", "results")
    run(cloned, "git", "checkout", "-q", ".")
    run(cloned, "dvc", "checkout")


@pytest.mark.thorough
def test_experiments_rerun_only_what_they_touch(cloned):
    output = run(cloned, "dvc", "exp", "run", "--name", "more", "-S", "certify.n=300", "-S", "sigmas=[0.5]")
    assert ran(output) == {"certify@rrcm", "certify@gaussian_matched", "plot"}
    run(cloned, "dvc", "exp", "run", "--queue", "--name", "queued", "-S", "certify.n=250")
    run(cloned, "dvc", "queue", "start")
    run(cloned, "dvc", "queue", "logs", "queued", "-f")
    shown = run(cloned, "dvc", "exp", "show", "--csv")
    found = {row["Experiment"]: row for row in csv.DictReader(shown.splitlines())}
    for name, n in (("more", "300"), ("queued", "250")):
        assert found[name]["certify.n"] == n and float(found[name]["acr.rrcm.sigma_0_5"]) >= 0


def test_an_unknown_profile_is_refused(cloned):
    assert "profile/nope" in run(cloned, "dvc", "exp", "run", "-S", "profile=nope", fails=True)
