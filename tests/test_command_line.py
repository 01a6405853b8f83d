"""The command `rrcm` itself: closed streams, completion in a shell, and its version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from rrcm import __version__
from rrcm.cli import app


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "error: standard output: No space left on device; check permissions and disk\n"),
    ],
)
def test_standard_output_closed_or_full(streams, status, said):
    """The figure is written all the same, and no file gets the number of a closed stream."""
    Path("a.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0\n")
    command = f"{sys.executable} -m rrcm.cli compare A=a.tsv {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)
    with Image.open("compare.png") as image:
        image.load()


def completions(words: str) -> list[str]:
    """What a shell offers in place of the last word."""
    environment = {"_RRCM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    answer = CliRunner(env=environment).invoke(app, [], prog_name="rrcm")
    assert not answer.stderr
    return answer.stdout.split()


def test_a_shell_completes_paths_methods_and_choices():
    Path("models/rrcm").mkdir(parents=True)
    Path("models/rrcm/config.json").touch()
    Path("models/.hidden").touch()
    Path("photos").mkdir()
    Path("a.tsv").touch()
    assert completions("rrcm certify p") == ["photos/"]
    assert completions("rrcm certify photos --model mo") == ["models/", "models/rrcm/", "models/rrcm/config.json"]
    assert completions("rrcm certify photos --model none/") == []
    assert completions("rrcm certify photos --bound m") == ["margin"]
    assert completions("rrcm audit ") == ["a.tsv", "models/", "photos/"]
    assert completions("rrcm train p") == completions("rrcm predict p") == ["photos/"]
    assert completions("rrcm train photos --start mo") == ["models/", "models/rrcm/", "models/rrcm/config.json"]
    models = ["models/", "models/rrcm/", "models/rrcm/config.json"]
    assert completions("rrcm export mo") == completions("rrcm predict photos --model mo") == models
    assert completions("rrcm export models/rrcm --format torch") == ["torch-export", "torchscript"]
    assert completions("rrcm predict photos --output ph") == completions("rrcm export m --check ph") == ["photos/"]
    names = ["rrcm_cat_rs=", "rrcm_cat_rs_joint=", "rrcm_cat_rs_joint_third=", "rrcm_cat_rs_joint_pass="]
    assert completions("rrcm compare rrcm_cat") == names
    assert completions("rrcm compare mine=a") == ["mine=a.tsv"] and completions("rrcm compare mine = a") == ["a.tsv"]
    endings = ("", "_joint", "_joint_third", "_joint_pass")
    names = [f"cat_rs{matched}{ending}" for matched in ("", "_matched") for ending in endings]
    assert sorted(completions("rrcm compare --reference cat")) == sorted(names)


def test_the_version_is_that_of_the_package():
    answer = CliRunner().invoke(app, ["--version"])
    assert answer.exit_code == 0 and answer.stdout == f"rrcm {__version__}\n" and re.match(r"\d+\.\d+", __version__)
