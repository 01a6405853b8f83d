"""`make redraw` brings settings and report of a published result up to date, and refuses whatever alters the run."""

import re
import shutil
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import yaml
from conftest import change_model, commit, files_of, kill_when, stage, with_derived

from rrcm.publication.objects import folder_md5, tracked_md5
from rrcm.publication.redraw import finish_killed, redraw
from rrcm.publication.result import Result, hash_files
from rrcm.publication.verify import check_repository, verify_result
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import write_json, write_text
from rrcm.utils.provenance import head

SETTINGS = "results/tiny/seed_0/params.yaml"
NEW = ("finetune", "joint_interval")  # it decides joint trainings alone, and this run has none
DECISIVE = ("finetune", "mixup")


@pytest.fixture
def result(repository) -> Result:
    return Result(repository, "tiny", 0)


def age(result: Result, *lacking: tuple[str, str], old: Mapping = MappingProxyType({}), **certify: object) -> Mapping:
    """Make a result look as if older code had published it; returns the settings as they are today.

    The settings `lacking` did not exist then. The section `report` had the settings `old`. `certify` are what a forger
    has written.
    """
    path = result.root / SETTINGS
    today, values = (yaml.safe_load(path.read_text()) for _ in range(2))
    for section, name in set(lacking) - {NEW}:
        del values[section][name]
    values["report"] |= old
    values["certify"] |= certify
    with_derived(values)
    if NEW in lacking:
        del values[NEW[0]][NEW[1]], values["derived"]["certify"]
    for name, text in (("config", "report: {old: 1, older: 2}\n"), ("profile/digits", "report: {older: 3}\n")):
        write_text(result.root / f"conf/{name}.yaml", text)
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    commit(result.root)
    rehash(result, code={"revision": head(result.root), "dirty": False})
    return today


def rehash(result: Result, **entries: object) -> None:
    """Correct all hashes and some entries of result.json, and commit."""
    values = result.read().model_dump(mode="json") | {"files": hash_files(result.folder)} | entries
    write_json(result.folder / "result.json", values)
    tracked = result.folder / "run.dvc"
    tracked.write_text(tracked.read_text().replace(tracked_md5(result), folder_md5(result.folder / "run")))
    commit(result.root)


def problems_of(result: Result) -> list[str]:
    return verify_result(result, 3, seed=0, shared=check_repository(result.root)).problems


@pytest.mark.thorough
def test_a_result_of_older_settings_is_redrawn_and_verified(result):
    today = age(result, NEW, old={"old": 1, "older": 3})
    assert problems_of(result) == [
        f"{result.root}/{SETTINGS}: the code has other settings (new: finetune.joint_interval; gone: report.old, "
        "report.older); bring the result up to date with `make redraw NAME=tiny`"
    ]
    before = result.read()
    update = redraw(result, lambda _: today)
    assert update.added == {"finetune.joint_interval": None} and update.removed == {"report.old": 1, "report.older": 3}
    record = result.read()
    assert record.redrawn.code.revision == head(result.root) and record.redrawn.added == update.added
    assert record.model_copy(update={"redrawn": None, "files": {}}) == before.model_copy(update={"files": {}})
    assert yaml.safe_load((result.root / SETTINGS).read_text()) == today
    commit(result.root)
    assert problems_of(result) == []
    content = files_of(result.folder)
    assert redraw(result, lambda _: today) is None and files_of(result.folder) == content


@pytest.mark.thorough
def test_a_result_whose_run_only_dvc_has_is_redrawn(result):
    today = age(result, NEW)
    shutil.rmtree(result.folder / "run")
    assert redraw(result, lambda _: today) is not None and not (result.folder / "run").exists()
    commit(result.root)
    assert problems_of(result) == []


@pytest.mark.thorough
def test_another_report_is_drawn_again(result):
    write_text(result.folder / "report/report.md", "as older code drew it")
    (result.folder / "report/index.html").unlink()  # older code wrote none
    write_text(result.root / "rrcm/new.py", "")
    rehash(result, code={"revision": head(result.root), "dirty": False})
    assert problems_of(result)[-1].startswith("results/tiny/seed_0/report: the code has changed since commit ")
    today = yaml.safe_load((result.root / SETTINGS).read_text())
    update = redraw(result, lambda _: today)
    assert not update.added and not update.removed and (result.folder / "report/index.html").exists()
    commit(result.root)
    assert problems_of(result) == []


def refuse(result: Result, message: str, today: Mapping, *confirmed: str) -> None:
    content = files_of(result.folder)
    with pytest.raises(RRCMError, match=message):
        redraw(result, lambda _: today, confirmed)
    assert files_of(result.folder) == content


@pytest.mark.thorough
def test_a_setting_that_is_gone_must_have_had_its_default(result):
    today = age(result, old={"old": 2})
    refuse(result, r"params\.yaml: report\.old = 2: is gone, and this was not its default 1; run and publish", today)
    age(result, old={"old": 1})
    rehash(result, code={"revision": "1" * 40, "dirty": False})
    refuse(result, r"params\.yaml: report\.old: is gone, and its default is unknown", today)


def test_a_new_setting_that_decides_a_training_must_be_confirmed(result):
    today = age(result, DECISIVE)
    refuse(result, r"tiny/seed_0/params\.yaml: certify\.n: is no new setting", today, "certify.n")
    refuse(result, r"finetune\.rrcm\.sigma_0_5: other settings decide it .* -S finetune\.mixup=0\.0 that", today)


def test_a_new_setting_that_no_hash_covers_must_be_confirmed(result):
    today = age(result, ("data", "shard_size"))
    refuse(result, r"data\.shard_size = \d+: is new, and nothing shows .* -S data\.shard_size=\d+ that", today)


def test_changed_settings_are_refused(result):
    refuse(result, r"certificates/rrcm/sigma_0\.5\.json: n is ", age(result, n=20_000))
    path = result.root / SETTINGS
    values = yaml.safe_load(path.read_text())
    values["finetune"]["weight_decay"] = 0.5
    write_text(path, yaml.safe_dump(values))
    refuse(result, r"params\.yaml: was changed: its hash is not", values)
    rehash(result)
    refuse(result, r"finetune\.rrcm\.sigma_0_5: other settings decide it than when it ran; run and publish", values)


@pytest.mark.thorough
def test_a_confirmed_setting_is_accepted_and_recorded(result):
    today = age(result, DECISIVE)
    assert redraw(result, lambda _: today, ["finetune.mixup"]).added == {"finetune.mixup": 0.0}
    assert result.read().redrawn.added == {"finetune.mixup": 0.0}
    commit(result.root)
    assert problems_of(result) == []


def test_forged_certificates_are_refused(result):
    path = result.folder / "run/certificates/rrcm/sigma_0.5.tsv"
    today = age(result, NEW)
    forged = re.sub(r"\t0\.1\d?\t", "\t0.75\t", path.read_text())
    assert forged != path.read_text()
    path.write_text(forged)
    with pytest.raises(RRCMError, match=r"sigma_0\.5\.tsv: was changed"):
        redraw(result, lambda _: today)
    rehash(result)
    with pytest.raises(RRCMError, match=r"certificates/rrcm/sigma_0\.5\.tsv"):
        redraw(result, lambda _: today)


@pytest.mark.thorough
def test_another_network_is_refused(result):
    today = age(result, NEW)
    change_model(result.folder / "run/models/rrcm/sigma_0.5", parameters=1)
    rehash(result)
    with pytest.raises(RRCMError, match=r"model\.sha256 is"):
        redraw(result, lambda _: today)


def test_the_command_names_commits_alone(repository, result):
    age(result, NEW)
    (repository / "rrcm").mkdir()
    (repository / "rrcm/new.py").touch()
    answer = stage(repository, "redraw")
    assert (answer.returncode, answer.stderr) == (1, "error: rrcm/new.py: not committed; commit, and redraw then\n")


@pytest.mark.thorough
def test_a_killed_command_leaves_the_old_or_the_new_result(repository, result):
    age(result, NEW)
    content = files_of(result.folder)
    kill_when(repository, "results/tiny/.seed_0.tmp/.gitignore", "redraw")
    finish_killed(repository)
    assert files_of(result.folder) == content
    answer = stage(repository, "redraw", "tiny")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(
        "redrawn: results/tiny/seed_0, new: finetune.joint_interval = None\nnow run: git add"
    )
    commit(repository)
    assert problems_of(result) == [] and not list(repository.glob("results/tiny/*.tmp"))
    assert stage(repository, "redraw").stdout == "up to date: results/tiny/seed_0\n"


def test_a_swap_that_was_killed_is_finished(repository, result):
    """The old folder has been moved aside, and the new one is complete but has not been moved into place."""
    content = files_of(result.folder)
    result.folder.rename(result.folder.with_name(".seed_0.old.tmp"))
    shutil.copytree(result.folder.with_name(".seed_0.old.tmp"), result.folder.with_name(".seed_0.tmp"))
    result.folder.with_name(".seed_0.ready.tmp").touch()
    finish_killed(repository)
    assert files_of(result.folder) == content and not list(result.folder.parent.glob(".seed_0*.tmp"))


@pytest.mark.thorough
def test_files_that_are_no_longer_published_go_if_methods_are_named(repository, result):
    encoder, models = result.folder / "run/models/pretrain/rrcm/model.safetensors", result.read().models
    encoder.write_bytes(b"an encoder")
    today = age(result)
    redraw(result, lambda _: today, methods=models)
    assert not encoder.exists() and result.read().models == models
    assert (result.folder / "run/models/rrcm/sigma_0.5/model.safetensors").exists()
    assert result.read().files == hash_files(result.folder)


@pytest.mark.thorough
def test_networks_can_be_left_out(repository, result):
    today = age(result, NEW)
    network = "models/rrcm/sigma_0.5/model.safetensors"
    artifacts = files_of(repository / "artifacts")
    gone = (result.folder / "run" / network).read_bytes()
    assert gone in artifacts.values()
    redraw(result, lambda _: today, methods=[])
    assert result.read().models == [] and not (result.folder / "run" / network).exists()
    commit(repository)
    assert problems_of(result) == [
        "results/tiny/seed_0/result.json: includes no network, so no row can be voted on again"
    ]
    left = files_of(repository / "artifacts")
    assert gone not in left.values()
    assert set(files_of(result.folder / "run").values()) <= set(left.values())
    with pytest.raises(RRCMError, match="rrcm: its networks are not in tiny, which has"):
        redraw(result, lambda _: today, methods=["rrcm"])
