"""`stages/verify.py`: what was published passes; a changed certificate or report does not."""

import configparser
import hashlib
import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from scipy.stats import binom, norm

from rrcm.certification.results import read_certificates, write_certificates
from rrcm.config import load_config

verify = runpy.run_path(str(REPOSITORY / "stages/verify.py"))
SIGMA = 0.5
EVERY_IMAGE = 1000


@pytest.fixture
def published(trained, tmp_path) -> Path:
    """The trained project with certificates and records that a test may change."""
    for name in ("certificates", "timings"):
        shutil.copytree(trained / name, tmp_path / name)
    for name in ("models", "data", "params.yaml"):
        (tmp_path / name).symlink_to(trained / name)
    return tmp_path


def certify_again(folder: Path, images: int = EVERY_IMAGE):
    config = load_config(folder / "params.yaml")
    return verify["certify_again"](config, folder, "rrcm", SIGMA, images, seed=1, alpha=1e-5)


def change(folder: Path, **columns) -> None:
    """Replace columns of the published certificates; each value is a function of the frame."""
    path = folder / "certificates/rrcm/sigma_0.5.tsv"
    frame = read_certificates(path).assign(**columns)
    write_certificates(path, frame.assign(correct=(frame["predict"] == frame["label"]).astype(int)))


def pretend_another_machine(folder: Path) -> None:
    path = folder / "timings/certify/rrcm/sigma_0.5.json"
    record = json.loads(path.read_text())
    record["environment"]["hardware"]["cpu"] = "abacus"
    path.write_text(json.dumps(record))


def test_what_was_published_passes(published):
    found = certify_again(published)
    assert found.exact and not found.problems
    assert found.identical == found.certified == len(read_certificates(published / "certificates/rrcm/sigma_0.5.tsv"))
    pretend_another_machine(published)
    found = certify_again(published, images=3)
    assert not found.exact and not found.problems and found.certified == 3


def test_on_the_same_machine_the_smallest_change_is_found(published):
    """A smaller radius: still a true certificate, but not the one that was computed."""
    change(published, radius=lambda frame: frame["radius"].where(frame["radius"] < frame["radius"].max(), 0.01))
    found = certify_again(published)
    assert found.problems and all("is published as" in problem for problem in found.problems)


@pytest.mark.parametrize(
    "columns",
    [
        {"radius": lambda frame: np.where(frame["radius"] > 0, 3.0 * SIGMA, 0.0)},
        {"predict": lambda frame: np.where(frame["radius"] > 0, (frame["predict"] + 1) % 10, frame["predict"])},
    ],
    ids=["larger radius", "other class"],
)
def test_elsewhere_fresh_noise_contradicts_a_false_certificate(published, columns):
    claims = (read_certificates(published / "certificates/rrcm/sigma_0.5.tsv")["radius"] > 0).sum()
    change(published, **columns)
    pretend_another_machine(published)
    found = certify_again(published)
    assert len(found.problems) == claims > 0
    assert all("new samples, too few for the radius" in problem for problem in found.problems)


def test_certificates_of_other_images_are_found(published):
    change(published, label=lambda frame: (frame["label"] + 1) % 10)
    assert "not those of the test split" in certify_again(published).problems[0]


@pytest.mark.parametrize("p", [0.6, 0.9, 0.999])
def test_a_true_certificate_is_contradicted_with_probability_at_most_alpha(p):
    n, alpha, radius = 1000, 0.01, SIGMA * norm.ppf(p)
    for bound in ("binary", "margin"):  # of two classes, so that the radii are the same
        contradicted = np.array(
            [
                verify["is_contradicted"](radius, SIGMA, hits, np.array([n - hits]), n, alpha, bound)
                for hits in range(n + 1)
            ]
        )
        assert 0 < binom.pmf(np.arange(n + 1), n, p)[contradicted].sum() <= alpha


def test_every_byte_and_every_file_of_the_report_counts(tmp_path):
    compare = verify["compare_folders"]
    for name in ("published", "drawn"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/a.png").write_bytes(b"abc")
        (tmp_path / name / "b.md").write_bytes(b"b")
    folders = tmp_path / "published", tmp_path / "drawn"
    assert compare(*folders) == []
    (tmp_path / "published/sub/a.png").write_bytes(b"abd")
    (tmp_path / "published/b.md").unlink()
    (tmp_path / "published/c.csv").write_bytes(b"")
    problems = compare(*folders)
    assert ["missing" in problems[0], "not drawn" in problems[1], "sub/a.png: differs" in problems[2]] == [True] * 3


def test_dvc_checks_what_it_pulls():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / ".dvc/config")
    assert config["'remote \"artifacts\"'"].getboolean("verify")


def md5(text: bytes) -> str:
    return hashlib.md5(text).hexdigest()


@pytest.fixture
def locked(tmp_path) -> Path:
    """A repository with two model folders, a file and a folder that git keeps, as dvc.lock has them."""
    folders = {f"models/{name}": {"a.json": name, "sub/weights": f"weights of {name}"} for name in ("rrcm", "gaussian")}
    outs = []
    for folder, files in (folders | {"report": {"page.md": "text"}}).items():
        for name, text in files.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        listing = json.dumps([{"md5": md5(text.encode()), "relpath": name} for name, text in files.items()])
        outs.append({"path": folder, "md5": f"{md5(listing.encode())}.dir"})
        if folder != "report":
            path = tmp_path / "cache" / outs[-1]["md5"][:2] / outs[-1]["md5"][2:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(listing)
    (tmp_path / "timing.json").write_text("{}")
    outs.append({"path": "timing.json", "md5": md5(b"{}")})
    lock = {"stages": {"all": {"outs": outs}, "none": {}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    return tmp_path


def flip(path: Path) -> None:
    """One bit of the file, whose time stays, so that DVC does not look at it."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        ("models/rrcm/sub/weights", flip),
        ("models/gaussian/a.json", flip),
        ("timing.json", flip),
        ("models/rrcm/sub/weights", Path.unlink),
        ("timing.json", Path.unlink),
        ("models/rrcm/more", Path.touch),
        ("models/rrcm/a.json", lambda path: shutil.copy(path.parent.parent / "gaussian/a.json", path)),
    ],
)
def test_a_flipped_bit_in_any_file_is_one_line_that_names_it(locked, named, damage):
    check = verify["check_hashes"]
    (locked / "models/rrcm/.half.tmp").touch()  # DVC ignores it
    assert check(locked, locked / "cache") == []
    damage(locked / named)
    (line,) = check(locked, locked / "cache")
    assert line.startswith(f"{locked / named}: is not what dvc.lock has") and "\n" not in line


@pytest.mark.parametrize("folder", ["report", "models/rrcm"])
def test_a_folder_without_a_sound_list_of_its_files_is_named_itself(locked, folder):
    for listing in (locked / "cache").rglob("*.dir"):
        flip(listing)
    assert verify["check_hashes"](locked, locked / "cache") == []
    flip(next(path for path in (locked / folder).rglob("*") if path.is_file()))
    (line,) = verify["check_hashes"](locked, locked / "cache")
    assert line.startswith(f"{locked / folder}: is not what dvc.lock has")


def test_with_a_damaged_file_nothing_is_called_verified(locked, monkeypatch, capsys):
    """The whole command, with the steps left out that need DVC and a report."""
    flip(locked / "models/gaussian/sub/weights")
    monkeypatch.chdir(locked)
    command = verify["verify"]
    monkeypatch.setitem(command.__globals__, "load_config", lambda path: load_config(REPOSITORY / "params.yaml"))
    monkeypatch.setitem(
        command.__globals__, "check_artifacts", lambda root: verify["check_hashes"](root, Path("cache"))
    )
    monkeypatch.setitem(command.__globals__, "check_report", lambda config, root: (0, []))
    monkeypatch.setitem(command.__globals__, "certify_again", lambda *_: verify["Found"]([], 1, 1, True))
    with pytest.raises(verify["typer"].Exit) as ended:
        command(images=1, models=1, seed=0)
    printed = capsys.readouterr()
    assert ended.value.exit_code == 1 and printed.out == "NOT verified: 1 problem, listed above\n"
    assert "models/gaussian/sub/weights: is not what dvc.lock has" in printed.err
