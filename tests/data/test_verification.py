"""Checking shards in one process; tests/utils/test_distributed.py does it in two."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from rrcm.data import shards
from rrcm.data.shards import ShardedDataset
from rrcm.data.verification import verify_shards
from rrcm.utils.errors import RRCMError


def verify(folder: Path, *splits: str) -> None:
    verify_shards([ShardedDataset(folder, split) for split in splits])


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def test_sound_shards_are_checked_without_a_word(folder, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(shards, "_check", lambda path, entry: checked.append(path.name))
    verify(folder, "train", "val")
    assert capsys.readouterr() == ("", "")
    tars = sorted(path.name for path in folder.glob("*.tar") if not path.name.startswith("test"))
    assert sorted(name for name in checked if name.endswith(".tar")) == tars


def test_the_first_damaged_shard_is_named_and_the_others_are_counted(folder):
    with (folder / "train-00001.tar").open("r+b") as file:
        file.write(b"X")
    (folder / "val-00000.tar").unlink()
    with pytest.raises(RRCMError, match=r"train-00001.tar: does not match its hash .* \(and 1 other shards\)$"):
        verify(folder, "train", "val")
    with pytest.raises(RRCMError, match=r"val-00000.tar: shard is missing; .*dvc pull$"):
        verify(folder, "val")
    verify(folder, "test")


def test_a_shard_that_cannot_be_read_is_one_line(folder, monkeypatch):
    def fails(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    images = ShardedDataset(folder, "val")
    monkeypatch.setattr(shards, "sha256_file", fails)
    with pytest.raises(RRCMError, match=r"val-00000.tar: cannot be read \(Stale file handle\); correct that, or run"):
        verify_shards([images])
