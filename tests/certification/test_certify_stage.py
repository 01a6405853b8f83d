"""The stage `certify`: the certificates of the engine, after kills and with any number of processes."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Answer, change, files_of, stage, start
from scipy.stats import norm
from test_stochastic import GREYS, dithered

from rrcm.certification.journal import is_possible_state, restore_states
from rrcm.certification.results import SAMPLES, VOTES, read_certificates, read_samples
from rrcm.certification.smoothing import ABSTAIN, ImageState, SmoothedClassifier
from rrcm.certification.stopping import (
    ALL_SAMPLES,
    FUTILE,
    WHOLE_GRID,
    WRONG_CLASS,
    clopper_pearson_lower,
    fixed_sample,
    group_sequential,
)
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder

# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(project, trained) -> Path:
    """A project that has the trained classifier but not its certificates."""
    (project / "models").symlink_to(trained / "models")
    return project


def finished(answer: Answer) -> Answer:
    assert answer.returncode == 0, answer.stderr
    return answer


def test_the_stage_writes_the_certificates_of_the_engine(trained):
    config = load_config(trained / "params.yaml")
    frame = read_certificates(trained / "certificates/rrcm/sigma_0.5.tsv")
    assert frame["idx"].tolist() == list(range(0, 360, 10)) and (frame["time"] == 0).all()
    model = load_model_folder(trained / "models/rrcm/sigma_0.5").classifier
    pixels, labels, indices = read_split(ShardedDataset(trained / "data/shards", "test"), 8, every=10)
    smoothed = SmoothedClassifier(model, 0.5, 10, batch_size=200, precision=config.certify.precision)
    answers = smoothed.certify(
        pixels.float() / 255, labels, n=1000, radius_step=config.certify.radius_step, indices=indices
    )
    assert frame["predict"].tolist() == [answer.prediction for answer in answers]
    assert frame["radius"].tolist() == [answer.radius for answer in answers]
    rows = [line.split("\t") for line in (trained / "certificates/rrcm/sigma_0.5.samples.tsv").read_text().splitlines()]
    assert rows[0] == SAMPLES + VOTES
    for i, a, row in zip(indices, answers, rows[1:], strict=True):
        assert row[:4] == [str(i), str(a.samples), a.stop_reason, str(a.binary_samples)]
        for radius, (predict, published) in zip((a.binary_radius, a.margin_radius), (row[4:6], row[6:8]), strict=True):
            assert float(published) == (radius or 0)
            assert a.stop_reason == WRONG_CLASS or (int(predict) == ABSTAIN) == (radius is None)


def test_the_stage_certifies_with_a_fixed_sample_as_well(certified):
    change(certified, certify__stopping="fixed", certify__n=300)
    finished(stage(certified, "certify", "rrcm", "0.5"))
    frame = read_certificates(certified / "certificates/rrcm/sigma_0.5.tsv")
    samples = (certified / "certificates/rrcm/sigma_0.5.samples.tsv").read_text().splitlines()[1:]
    assert all("\t400\tall samples\t400\t" in line for line in samples) and len(samples) == len(frame)
    exact = [0.5 * norm.ppf(max(clopper_pearson_lower(k, 300, 0.001), 0.5)) for k in range(301)]
    assert frame["radius"].max() > 0 and np.abs(frame["radius"].to_numpy()[:, None] - exact).min(1).max() < 1e-9


def crew(folder: Path, world: int = 2) -> list:
    """Processes that find each other as torchrun's do, at the certify stage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [start(folder, "certify", "rrcm", "0.5", **common, **rank) for rank in ranks]


def test_two_processes_write_the_same_bytes(certified, trained):
    processes = crew(certified)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(certified / "certificates") == files_of(trained / "certificates")


@pytest.mark.thorough
def test_margin_certificates_survive_kills_and_any_number_of_processes(certified, trained):
    """The same bytes by one process, and by two after a kill; in them the certificates of the binary bound alone."""
    change(certified, certify__bound="margin", certify__n=400)
    finished(stage(certified, "certify", "rrcm", "0.5"))
    alone = files_of(certified / "certificates")
    shutil.rmtree(certified / "certificates")
    kill_at(certified, 40, [start(certified, "certify", "rrcm", "0.5")])
    processes = crew(certified)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(certified / "certificates") == alone
    samples = read_samples(certified / "certificates/rrcm/sigma_0.5.samples.tsv")
    assert (samples["samples"] > samples["binary_samples"]).any()
    change(certified, certify__bound="binary")
    finished(stage(certified, "certify", "rrcm", "0.5"))
    binary = read_certificates(certified / "certificates/rrcm/sigma_0.5.tsv")
    assert binary["radius"].equals(samples["binary_radius"]) and binary["predict"].equals(samples["binary_predict"])


def kill_at(folder: Path, lines: int, processes: list) -> None:
    """SIGKILL the processes when their journals have this many lines."""
    while sum(path.read_text().count("\n") for path in folder.glob("runs/certify-*/journal-*.txt")) < lines:
        assert any(process.is_alive() for process in processes), "it was done before it could be killed"
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.thorough
def test_killed_three_times_on_any_number_of_processes(certified, trained):
    """As one process, as two, as one again; a half line and a damaged line in a journal; finished by two."""
    kill_at(certified, 30, [start(certified, "certify", "rrcm", "0.5")])
    kill_at(certified, 60, crew(certified))
    (folder,) = certified.glob("runs/certify-*")
    journal = folder / "journal-0.txt"
    *_, last = journal.read_text().splitlines()
    checksum, _, text = last.partition(" ")
    furthest = json.loads(text) | {
        "top_class": 3,
        "counts": {},
        "samples": 10**6,
        "stop_reason": ALL_SAMPLES,
    }  # if it is believed
    with journal.open("a") as file:
        file.write(f'{checksum} {json.dumps(furthest)}\n{line(furthest)}\n12345678 {{"index": 1, "lab')
    kill_at(certified, 80, [start(certified, "certify", "rrcm", "0.5")])
    assert not (certified / "certificates").exists()
    processes = crew(certified)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(certified / "certificates") == files_of(trained / "certificates")
    assert not list((certified / "runs").glob("*"))


@pytest.mark.thorough
@pytest.mark.parametrize("setting", ["certify__max_images", "certify__every"])
def test_a_journal_of_more_or_other_images_serves_the_common_ones(certified, trained, setting):
    """Fewer images, and some that the killed run did not have."""
    kill_at(certified, 60, [start(certified, "certify", "rrcm", "0.5")])
    (journal,) = certified.glob("runs/certify-*/journal-0.txt")
    lines = [line.partition(" ")[2] for line in journal.read_text().splitlines() if line]
    finished_before = {state["index"] for state in map(json.loads, lines) if state["stop_reason"]}
    change(certified, **{setting: 15})
    finished(stage(certified, "certify", "rrcm", "0.5"))
    assert not list((certified / "runs").iterdir())
    frame = read_certificates(certified / "certificates/rrcm/sigma_0.5.tsv")
    before = read_certificates(trained / "certificates/rrcm/sigma_0.5.tsv")
    both = frame.merge(before, on="idx", suffixes=("", "_before"))
    assert len(both) >= 10 and finished_before & set(both["idx"])
    assert both["radius"].equals(both["radius_before"]) and both["predict"].equals(both["predict_before"])


def line(values: dict) -> str:
    text = json.dumps(values)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def reachable_states() -> list[dict]:
    """Everything that a journal may have of a few images, by both rules, from the first samples to the end."""
    states = [ImageState(i, image, label=1 - i % 2) for i, image in enumerate(GREYS)]
    found = []
    for rule in RULES:
        for state in states:
            vars(state).update(vars(ImageState(state.index, state.image, state.label)))
        for changed in dithered(batch_size=10).certify_stream(states, rule, at_once=4):
            found += [
                (rule, {k: v for k, v in copy.deepcopy(vars(state)).items() if k != "image"}) for state in changed
            ]
    return found


RULES = [
    group_sequential(0.5, n0=30, n=400, radius_step=0.1),
    replace(group_sequential(0.5, n0=30, n=400, radius_step=2.0), bound="margin"),
    fixed_sample(0.5, n0=30, n=200),
]
IMPOSSIBLE = {
    "index": [-1, 0.0, "0", True, None, 7],
    "label": [0, "1", None],
    "selection": [{"0": 5}, {"2": 1}, {"-1": 1}, [], None, {"0": -1}, {}],
    "votes": [
        {"0": {"0": 1}},
        {"100": {"0": 99}},
        {"100": {"0": 101, "1": -1}},
        {"101": {"0": 101}},
        [],
        None,
        {"x": 1},
    ],
    "top_class": [-2, 2, 0.0, None, "0", True],
    "test": [0, None],
    "num_drawn": [-1, 10**6, 0.5, None],
    "counts": [{}, {"0": 10**6}, {"0": 0.5}, {"0": -1}, {"x": 1}, [1], None],
    "look": [-1, 10**6, 1.0, None],
    "num_certified": [-1, 10**6, 1.0, None],
    "binary_reason": [0, None],
    "binary_samples": [-1, 10**6, None],
    "margin_certified": [-1, 10**6, True],
    "samples": [-1, 0, 10**6, 100.0, None],
    "stop_reason": ["", "done", WRONG_CLASS, 0, None],
    "seconds": [-1.0, math.nan, math.inf, "1", None],
}


def test_only_possible_lines_of_a_journal_are_restored(tmp_path):
    """Each line has its checksum."""
    everything = reachable_states()
    assert {state["stop_reason"] for _, state in everything} >= {"", ALL_SAMPLES, FUTILE, WHOLE_GRID, WRONG_CLASS}
    assert all(is_possible_state(state, rule, 2) for rule, state in everything)
    rule, last = next((r, s) for r, s in reversed(everything) if r is RULES[0] and s["counts"] and s["label"] == 1)
    assert set(IMPOSSIBLE) == set(last)
    texts = [line(last | {name: value}) for name, values in IMPOSSIBLE.items() for value in values]
    texts += [line(each) for each in ([], None, 3, {}, "text", [last], last | {"more": 1})]
    texts += [line({k: v for k, v in last.items() if k != name}) for name in last]
    texts += [f"{zlib.crc32(b'no json'):08x} no json", "00000000 {}", line(last)[:-1]]
    nothing = torch.empty(0)
    for text in texts:
        state = ImageState(last["index"], nothing, label=1)
        (tmp_path / "journal-0.txt").write_text(text)
        restore_states([state], tmp_path, lambda saved: is_possible_state(saved, rule, 2))
        assert state == ImageState(last["index"], nothing, label=1), text
    (tmp_path / "journal-1.txt").write_text("\n".join([*texts, line(last), *texts]))
    restore_states([state], tmp_path, lambda saved: is_possible_state(saved, rule, 2))
    assert vars(state) == last | {"image": nothing} and len(texts) > 75


@pytest.mark.thorough
def test_samples_in_the_journal_are_not_drawn_again(certified):
    """Samples that a killed run has counted are not drawn anew: a journal that says 999 of them cost a year is kept."""
    kill_at(certified, 40, [start(certified, "certify", "rrcm", "0.5")])
    (journal,) = certified.glob("runs/certify-*/journal-0.txt")
    states = [json.loads(line.partition(" ")[2]) for line in journal.read_text().splitlines() if line]
    before = {state["index"]: state["seconds"] + 1e6 for state in states}
    with journal.open("a") as file:
        for state in {state["index"]: state for state in states}.values():
            text = json.dumps(state | {"seconds": before[state["index"]]})
            file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    finished(stage(certified, "certify", "rrcm", "0.5"))
    timing = json.loads((certified / "timings/certify/rrcm/sigma_0.5.json").read_text())["seconds_by_image"]
    assert all(timing[str(index)] >= seconds for index, seconds in before.items())
    assert sum(seconds < 1e6 for seconds in timing.values()) == len(timing) - len(before)


@pytest.mark.thorough
def test_the_death_of_a_worker_is_reported_and_loses_nothing(certified, trained):
    """Under the real torchrun: one of two workers is killed; the launcher says so, and running again continues.

    The victim is stopped as soon as it exists, so that the other one must do the work and cannot end without it."""
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", REPOSITORY / "stages/certify.py"]
    environment = os.environ | {"RRCM_RUNS": str(certified / "runs"), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [*command, "rrcm", "0.5"], cwd=certified, env=environment, stderr=subprocess.PIPE, text=True
    )

    def still_there() -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=0.02)
        return launcher.poll() is None

    victims = []
    while not victims:
        assert still_there()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child that is gone meanwhile
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            victims = [int(pid) for pid in children if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(victims[0], signal.SIGSTOP)
    while not any(path.stat().st_size > 500 for path in certified.glob("runs/certify-*/journal-0.txt")):
        assert still_there()
    os.kill(victims[0], signal.SIGKILL)
    said = launcher.communicate()[1]
    assert launcher.returncode != 0 and "SIGKILL" in said
    assert not (certified / "certificates").exists()
    finished(stage(certified, "certify", "rrcm", "0.5"))
    assert files_of(certified / "certificates") == files_of(trained / "certificates")
