"""The driver finishes states of any kind: here each image counts votes at two sigmas, as a cascade does."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from rrcm.certification.driver import finish_states
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.utils.distributed import DistEnv, WorkQueue
from rrcm.utils.errors import RRCMError
from rrcm.utils.resume import RunState

N = 30  # samples of each sigma


@dataclass
class TwoSigmas:
    index: int
    counts: list[int] = field(default_factory=lambda: [0, 0])  # by sigma
    samples: int = 0
    stop_reason: str = ""


class Engine:
    """Draws ten samples of a sigma at a time. `drawn` has the index and the sigma of each draw."""

    def __init__(self, interrupt_after: int | None = None):
        self.drawn, self.interrupt_after = [], interrupt_after

    def stream(self, states: Iterator[TwoSigmas], *, at_once: int | None) -> Iterator[list[TwoSigmas]]:
        assert at_once is None
        for state in states:
            while not state.stop_reason:
                if len(self.drawn) == self.interrupt_after:
                    raise KeyboardInterrupt
                sigma = 0 if state.counts[0] < N else 1
                self.drawn.append((state.index, sigma))
                state.counts[sigma] += 10
                state.samples += 10
                state.stop_reason = ALL_SAMPLES if state.samples == 2 * N else ""
                yield [state]


def finish(folder, states: list[TwoSigmas], engine: Engine, mark: str = "mark") -> RunState:
    run, queue = RunState("run", mark, folder), WorkQueue(DistEnv(0, 1, torch.device("cpu")), "images")
    finish_states(states, engine.stream, run, lambda saved: sum(saved["counts"]) == saved["samples"], queue, "vote")
    return run


def test_an_interrupted_run_continues_in_the_middle_of_an_image(tmp_path, capsys):
    engine = Engine(interrupt_after=9)
    with pytest.raises(KeyboardInterrupt, match="1 of 3 images are finished; the same command continues from there"):
        finish(tmp_path, [TwoSigmas(index) for index in range(3)], engine)
    states, again = [TwoSigmas(index) for index in range(3)], Engine()
    run = finish(tmp_path, states, again)
    assert "resuming: 1 of 3 images are finished" in capsys.readouterr().err
    assert [(state.counts, state.samples, state.stop_reason) for state in states] == [([N, N], 2 * N, ALL_SAMPLES)] * 3
    whole = [(index, sigma) for index in range(3) for sigma in (0, 0, 0, 1, 1, 1)]
    assert engine.drawn + again.drawn == whole
    with pytest.raises(RRCMError, match="locked by another process"):
        finish(tmp_path, states, Engine())
    run.finish()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_draws_nothing_and_another_run_everything(tmp_path):
    for mark, drawn in (("one", 12), ("other", 12)):
        engine = Engine()
        run = finish(tmp_path, [TwoSigmas(0), TwoSigmas(1)], engine, mark)
        assert len(engine.drawn) == drawn
        run._lock.close()
        again = Engine()
        finish(tmp_path, [TwoSigmas(0), TwoSigmas(1)], again, mark)
        assert not again.drawn
