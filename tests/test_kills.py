"""`benchmarks/kills.py`: it finds what is lost, and nothing is lost in a few kills of pre-training."""

import importlib.util
import json
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest

from benchmarks import kills
from rrcm.utils.errors import RRCMError
from rrcm.utils.progress import Progress

COMMAND = kills.Command("made", ["made.py"], ["folder", "file.tsv"], ["live"])


@pytest.fixture
def finished(tmp_path) -> kills.Disturbance:
    """A command that has finished in its folder."""
    folder = tmp_path / "place"
    for name in ("folder/a", "folder/b", "file.tsv", "live/rows", "input"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "timings").mkdir()
    (folder / "timings/made.json").write_text('{"seconds": 1.25, "samples": 3}')
    return kills.Disturbance(COMMAND, kills.Place(folder), kills.contents(folder), seed=0)


def test_a_finished_command_has_left_what_it_should(finished):
    (finished.place.folder / "timings/made.json").write_text('{"seconds": 1e-05, "samples": 3}')
    assert finished.check_finished() == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("file.tsv", "other", "file.tsv differs"),
        ("timings/made.json", '{"seconds": 1.25, "samples": 4}', "timings/made.json differs"),
        ("folder/.c.tmp", "", "folder/.c.tmp is left over"),
        ("runs/made-0123/lock", "", "runs is left over"),
        ("file.tsv", None, "file.tsv is missing"),
    ],
)
def test_what_a_finished_command_must_not_leave_is_named(finished, name, text, line):
    path = finished.place.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink() if text is None else path.write_text(text)
    assert line in finished.check_finished()


def test_half_an_output_is_found_after_a_kill(finished):
    folder = finished.place.folder
    assert finished.check_killed() == []
    finished.place.delete(["file.tsv", "live"])
    (folder / ".file.tsv.tmp").write_text("fil")
    assert finished.check_killed() == []
    (folder / "folder/b").unlink()
    (folder / "file.tsv").write_text("fil")
    assert finished.check_killed() == ["folder is half-written", "file.tsv is half-written"]


@pytest.mark.thorough  # starts a server of forks
def test_a_run_that_cannot_be_continued_is_found(finished, tmp_path):
    script = tmp_path / "made.py"
    script.write_text("raise SystemExit('state is damaged')")
    finished.command = COMMAND._replace(words=[str(script)])
    tally = finished.run(1, seconds=1000, progress=Progress(1, "kills", "kills", quiet=True))
    assert tally.kills == 0 and tally.lost == ["hangs or cannot be continued: state is damaged"]


def test_the_lock_file_is_compared_without_the_hashes_of_what_was_measured():
    def lock(timing: str, model: str, *names: str) -> object:
        outs = [{"path": "timings/a.json", "md5": timing, "size": 1}, {"path": "models/a", "md5": model}]
        text = json.dumps({"stages": {name: {"cmd": "run", "outs": outs} for name in names}})
        return kills._comparable("dvc.lock", text.encode())

    assert lock("1", "2", "a", "b") == lock("3", "2", "a", "b")
    assert lock("1", "2", "a", "b") != lock("1", "3", "a", "b")
    assert lock("1", "2", "a", "b") != lock("1", "2", "b", "a")


@pytest.mark.parametrize("count", [1, 5, 9, 80])
def test_every_command_gets_its_share_of_the_kills(count):
    found = kills.shares(count, {"short": 0.1, "long": 3.0, "longer": 6.0})
    assert sum(found.values()) == count
    if count == 80:
        assert found["short"] >= kills.FEW and found["longer"] > found["long"] > found["short"]


def test_a_loss_is_named_and_ends_with_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kills.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(kills, "disturb", lambda *_: {"plot": kills.Tally(kills=3, lost=["reports is missing"])})
    with pytest.raises(RRCMError, match="plot"):
        kills.measure(3)
    printed = capsys.readouterr()
    assert "plot: reports is missing" in printed.err and "1 lost, 3 kills" in printed.out
    with pytest.raises(RRCMError, match="must be one of shard-data"):
        kills.measure(3, only=["nothing"])


@pytest.mark.thorough
def test_nothing_is_lost_in_three_kills_of_pretraining(capsys, monkeypatch, tmp_path):
    get_temp_dir()  # of multiprocessing, which would be made in the new place and left there until the tests end
    monkeypatch.setattr(kills.tempfile, "tempdir", str(tmp_path))
    kills.measure(3, seed=1, only=["pretrain"])
    printed = capsys.readouterr().out
    assert "0 lost, 3 kills" in printed and "pretrain" in printed
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("name", kills.PRELOAD.split())
def test_preloaded_modules_exist(name):
    assert importlib.util.find_spec(name)
