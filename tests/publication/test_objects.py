"""The run of a published result is assembled from the objects that DVC keeps, or pulled from another remote."""

import configparser
import hashlib
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, files_of, run_in

from rrcm.publication.objects import assemble, folder_md5, open_local_run, open_run, tracked_md5
from rrcm.publication.result import Result
from rrcm.publication.verify import verify_result
from rrcm.utils.errors import RRCMError


@pytest.fixture
def fetched(repository) -> Result:
    """A published result as in a fresh clone, where only the objects in artifacts/ have its run."""
    for name in (".dvc/cache", "results/tiny/seed_0/run"):
        shutil.rmtree(repository / name)
    return Result(repository, "tiny", 0)


def object_of(result: Result, name: str) -> Path:
    """The object with the content of a file of the run."""
    with open_run(result) as run:
        content = (run / name).read_bytes()
    return next(
        path for path in (result.root / "artifacts").rglob("*") if path.is_file() and path.read_bytes() == content
    )


def test_a_run_assembled_from_objects_equals_the_original(honest, fetched):
    published = honest / "results/tiny/seed_0/run"
    before = files_of(fetched.root)
    with open_run(fetched) as run:
        assert files_of(run) == files_of(published) and run != fetched.folder / "run"
        assert folder_md5(run) == folder_md5(published) == tracked_md5(fetched)
    assert not run.exists() and files_of(fetched.root) == before
    with open_local_run(fetched, "certificates/") as run:
        assert {name.partition("/")[0] for name in files_of(run)} == {"certificates"}


def test_an_existing_run_folder_is_used_in_place(honest):
    with open_run(Result(honest, "tiny", 0)) as run:
        assert run == honest / "results/tiny/seed_0/run"


def test_a_damaged_object_is_named(fetched):
    path = object_of(fetched, "models/rrcm/sigma_0.5/history.csv")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (problem,) = verify_result(fetched, 1, seed=0).problems
    assert problem == f"{path}: is damaged: its content has another hash than its name; restore it with git"


def test_a_listing_with_paths_outside_the_folder_is_refused(fetched, tmp_path):
    text = b'[{"md5": "0123456789abcdef0123456789abcdef", "relpath": "../../somewhere"}]'
    md5 = hashlib.md5(text).hexdigest()
    (fetched.root / "artifacts/files/md5" / md5[:2]).mkdir(exist_ok=True)
    (fetched.root / "artifacts/files/md5" / md5[:2] / f"{md5[2:]}.dir").write_bytes(text)
    tracked = fetched.folder / "run.dvc"
    tracked.write_text(tracked.read_text().replace(tracked_md5(fetched), f"{md5}.dir"))
    with pytest.raises(RRCMError, match="lists no files of a folder; restore it with git"):
        assemble(fetched, tmp_path / "run")


def test_a_run_is_pulled_from_another_remote(fetched, tmp_path):
    shutil.move(fetched.root / "artifacts", tmp_path / "elsewhere")
    with open_local_run(fetched) as run:
        assert run is None
    with pytest.raises(RRCMError) as refused, open_run(fetched):
        pass
    assert str(refused.value).startswith("results/tiny/seed_0/run: is not here, and DVC could not fetch it (")
    assert "--force" not in str(refused.value)
    run_in(
        fetched.root, sys.executable, "-m", "dvc", "remote", "modify", "artifacts", "url", str(tmp_path / "elsewhere")
    )
    with open_run(fetched) as run:
        assert run == fetched.folder / "run" and folder_md5(run) == tracked_md5(fetched)


@pytest.mark.parametrize("text", ["", "outs: []\n", "outs:\n- md5: 12\n  path: run\n", "outs:\n- path: run\n", "{"])
def test_a_run_dvc_without_a_run_is_refused(fetched, text):
    (fetched.folder / "run.dvc").write_text(text)
    with pytest.raises(RRCMError, match=r"run\.dvc: cannot be read \(.*\); restore it with git"):
        tracked_md5(fetched)
    (fetched.folder / "run.dvc").unlink()
    with pytest.raises(RRCMError, match=r"run\.dvc: no such file; restore it with git, or publish tiny again"):
        tracked_md5(fetched)


def test_dvc_verifies_the_files_it_pulls():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / ".dvc/config")
    assert config["'remote \"artifacts\"'"].getboolean("verify")
