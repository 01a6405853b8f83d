"""Commands end in one line when the system does not let them read or write."""

import errno
import os

import pytest
import typer

from rrcm.utils.app import exit_on_error


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
