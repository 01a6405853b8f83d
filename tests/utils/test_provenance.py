"""The record of what an output was computed with."""

import os
import subprocess
from pathlib import Path

from rrcm.utils import provenance


def test_the_revision_is_read_without_a_lock_that_a_kill_would_leave(tmp_path):
    """`git status` renews an index whose times are old, under a lock."""

    def git(*words: str) -> None:
        options = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *options, *words], cwd=tmp_path, check=True)

    source: Path = tmp_path / "package/__init__.py"
    source.parent.mkdir()
    source.touch()
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "t")
    os.utime(source, (0, 0))
    index = (tmp_path / ".git/index").read_bytes()
    assert provenance._revision(source.parent)["dirty"] is False
    assert (tmp_path / ".git/index").read_bytes() == index
