"""Commands end in one line when the system does not let them read or write."""

import errno
import os
import sys

import pytest
import typer

from rrcm.utils.app import exit_on_error, run_app
from rrcm.cli import app


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_file_that_cannot_be_written_is_named(capsys, number):
    @exit_on_error
    def command() -> None:
        raise OSError(number, os.strerror(number), "runs\n/logs")

    with pytest.raises(typer.Exit) as ending:
        command()
    assert ending.value.exit_code == 1
    expected = f"error: runs\\n/logs: {os.strerror(number)}; check permissions and disk\n"
    assert capsys.readouterr().err == expected


def test_other_system_errors_keep_their_traceback():
    @exit_on_error
    def command() -> None:
        raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    with pytest.raises(OSError, match="reset"):
        command()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trian", ": no such command 'trian'. Did you mean 'train'?; see `"),
        ("train x --hours soon", " train: invalid value for '--hours': "),
        ("train x --hours soon", " train --help`"),
        ("certify --bo\n", " certify: no such option: --bo"),
        ("certify --model m", " certify: missing argument 'folder'; see `"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_in_one_line(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["rrcm", *arguments.split(" ")])
    with pytest.raises(SystemExit) as ending:
        run_app(app)
    printed = capsys.readouterr()
    assert ending.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and said in printed.err


def test_the_exit_status_is_that_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rrcm", "train", "nowhere", "--output", "new"])
    with pytest.raises(SystemExit) as ending:
        run_app(app)
    assert ending.value.code == 1 and "nowhere" in capsys.readouterr().err
