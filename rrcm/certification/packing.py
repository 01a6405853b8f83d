"""The loop that certifies many images in rounds, for smoothed classifiers and for cascades of them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


@dataclass(frozen=True)
class SampleRequest:
    """Samples start..stop of an image for one purpose, a constant of noise.py."""

    image: torch.Tensor
    index: int
    purpose: int
    start: int
    stop: int
    scale: int = 0  # of a cascade: whose classifier votes


class State(Protocol):
    """What the loop needs to know of an image."""

    image: torch.Tensor
    stop_reason: str  # "" until the image is finished
    seconds: float  # share of the computing time


S = TypeVar("S", bound=State)


def vote_in_rounds(
    states: Iterable[S],
    find_room: Callable[[torch.Tensor], int],
    next_samples: Callable[[S, int], SampleRequest],
    vote: Callable[[list[S], list[SampleRequest]], None],
    *,
    at_once: int | None = None,
) -> Iterator[list[S]]:
    """Finish all states, in whatever state they are, and yield after each round those that changed.

    `find_room` says how many samples a round has for images like the given one, and `next_samples` which samples an
    image needs next, at most as many as there is room for. `vote` counts the samples of a round and updates the states.
    A state is taken from the iterable when a round has room for it. At most `at_once` images are in progress.
    """
    source, active = iter(states), deque()
    while True:
        chosen, requests, room = [], [], None
        waiting = len(active)
        while room is None or room > 0:
            if waiting:
                state, waiting = active.popleft(), waiting - 1
            elif (at_once is not None and len(chosen) >= at_once) or (state := next(source, None)) is None:
                break
            elif state.stop_reason:
                continue
            if room is None:
                room = find_room(state.image)
            request = next_samples(state, room)
            chosen.append(state)
            requests.append(request)
            room -= request.stop - request.start
        if not chosen:
            return
        vote(chosen, requests)
        yield chosen
        active.extendleft(reversed([state for state in chosen if not state.stop_reason]))
