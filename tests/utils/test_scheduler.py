"""The scheduler's decisions: which stage starts next, and how long the work takes."""

import pytest

from rrcm.utils.scheduler import (
    RAN,
    UNCHANGED,
    Scheduler,
    Stage,
    chain_seconds,
    default_jobs,
    expected_seconds,
    last_progress,
    ready_stages,
    reported_seconds_left,
    skip_unchanged,
    start_order,
    visible_gpus,
)


def diamond(*changed: str) -> dict[str, Stage]:
    """first -> left and right -> last, of which the given stages have changed."""
    upstream = {"first": [], "left": ["first"], "right": ["first"], "last": ["left", "right"]}
    return {name: Stage(name, f"echo > {name}", above, name in changed) for name, above in upstream.items()}


@pytest.mark.slow
def test_what_has_not_changed_is_skipped_unless_something_upstream_ran():
    stages = diamond("left")
    skip_unchanged(stages)
    assert [name for name, stage in stages.items() if stage.outcome] == ["first", "right"]
    assert [stage.name for stage in ready_stages(stages)] == ["left"]
    stages["left"].pid = 1
    assert not ready_stages(stages)
    stages["left"].pid, stages["left"].outcome = 0, RAN
    skip_unchanged(stages)
    assert [stage.name for stage in ready_stages(stages)] == ["last"]


@pytest.mark.slow
def test_after_a_stage_that_wrote_the_same_bytes_nothing_runs():
    stages = diamond("first")
    skip_unchanged(stages)
    assert [stage.name for stage in ready_stages(stages)] == ["first"]
    stages["first"].outcome = UNCHANGED
    skip_unchanged(stages)
    assert all(stage.outcome == UNCHANGED for stage in stages.values())


@pytest.mark.slow
def test_the_longest_chain_of_work_starts_first_and_deferred_stages_last():
    stages = diamond(*diamond())
    chains = chain_seconds(stages, {"first": 1.0, "left": 2.0, "right": 5.0, "last": 3.0})
    assert chains == {"first": 9.0, "left": 5.0, "right": 8.0, "last": 3.0}
    assert [stage.name for stage in start_order(stages.values(), chains)] == ["first", "right", "left", "last"]
    stages["first"].deferred = True
    assert start_order(stages.values(), chains)[-1].name == "first"


def test_seconds_come_from_an_earlier_run_of_the_stage_or_else_of_its_group():
    earlier = {"train@a": 10.0, "train@b": 20.0, "plot": 1.0}
    assert expected_seconds("train@a", earlier) == 10.0
    assert expected_seconds("train@c", earlier) == 15.0
    assert expected_seconds("certify@a", earlier) is None


def test_the_time_left_is_what_the_last_progress_report_states():
    log = "loading\npretrain: 1/9 steps, 2/s, 4 s left\npretrain: 5/9 steps, 2/s, 2 s left  loss 0.1\nsaved\n"
    assert last_progress(log) == "5/9 steps, 2/s, 2 s left  loss 0.1"
    assert reported_seconds_left(last_progress(log)) == 2.0
    assert last_progress("loading\n") == "starting" and reported_seconds_left("starting") is None


@pytest.mark.slow
def test_nothing_runs_beside_an_exclusive_stage(tmp_path):
    """This one is ready at once, but others go first because it is deferred, and then it takes every slot."""
    stages = [Stage("latency", "", [], changed=True, exclusive=True, deferred=True)]
    stages += [Stage(name, "", [], changed=True) for name in ("one", "two", "three")]
    scheduler, started = Scheduler(stages, 2, [], tmp_path, execute=int, read_outcome=str), []

    def start(stage, slots):
        started.append((stage.name, slots))
        (tmp_path / f"{stage.name}.log").touch()
        stage.pid, stage.slots, scheduler.free = 1, scheduler.free[:slots], scheduler.free[slots:]

    def finish(name):
        stage = scheduler.stages[name]
        stage.pid, stage.outcome = 0, RAN
        scheduler.free += stage.slots

    scheduler._start = start
    scheduler._start_ready()
    finish("one")
    scheduler._start_ready()
    assert started == [("one", 1), ("two", 1), ("three", 1)]
    finish("two")
    scheduler._start_ready()
    assert len(started) == 3  # a slot is free, but the third stage still runs
    finish("three")
    scheduler._start_ready()
    assert started[3:] == [("latency", 2)]


@pytest.mark.parametrize(
    ("gpus", "threads", "jobs"),
    [
        ([], [1], 8),
        ([], [3], 2),
        ([], [8], 1),
        ([], [16], 1),
        ([], [None], 1),
        ([], [None, "1"], 8),
        ([], [4, "1"], 2),  # the setting comes before the environment
        *[([], [value], 1) for value in ("", "0", 0, "all", [1])],
        (["0", "1", "2"], [1], 3),
    ],
)
def test_by_default_stages_and_their_threads_fill_the_machine(gpus, threads, jobs):
    assert default_jobs(gpus, 8, *threads) == jobs


@pytest.mark.parametrize(("visible", "gpus"), [("3,7", ["3", "7"]), ("", []), ("-1", []), ("GPU-1a", ["GPU-1a"])])
def test_only_visible_gpus_are_used(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == gpus
