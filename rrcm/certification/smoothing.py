"""Randomized smoothing of any torch classifier: noisy samples of many images in full batches, votes, certificates.

The noise of a sample depends on (seed, image index, sample) alone (noise.py), and the network always sees batches of
the same shape, of which the last one is padded. The votes for an image therefore do not depend on the other images in
the batch, their order, the number of processes, or restarts. Another batch size, number of threads, precision or device
rounds differently, which can flip votes that are nearly tied.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os import sysconf

import numpy as np
import torch
from torch import nn

from rrcm.certification.networks import (
    attribute,
    batch_limits,
    check_independence,
    check_weights,
    copy_in_bfloat16,
    in_batches,
    kept_buffers,
    largest_output,
    logits_of,
    parts,
    same_objects,
    set_eval,
    switches,
    unwrapped,
    update_copy,
    usual_state,
    without_compilation,
)
from rrcm.certification.noise import ESTIMATE, FORWARD, PREDICT, SELECT, CounterDraw, counter_normal
from rrcm.certification.packing import SampleRequest, State, vote_in_rounds
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.states import Certificate, ImageState, certificate, choose_class, decide
from rrcm.certification.stopping import ABSTAIN, StoppingRule, binomial_test, check_prediction
from rrcm.utils.arguments import real_number, shown, whole_number
from rrcm.utils.distributed import explain_out_of_memory, native_precision
from rrcm.utils.errors import RRCMError, one_line

BATCHES_PER_SYNC = 16  # batches between two reads of the counts; each read waits for the device
LARGEST_BATCH = 1024
# Attributes of a SmoothedClassifier that cannot be changed.
FIXED = ("model", "sigma", "num_classes", "seed", "num_noise", "memory_gib", "precision")
BLACK = 1.01 / 255  # pixels up to the first grey level above black
TOLERANCE = {"fp32": 1e-3, "bf16": 0.03}  # how far the rest of the batch may move logits, relative to the largest


@dataclass
class Voter:
    """The network that votes for a model, and what is known about it; valid while the model has the same parts."""

    switches: list[object]
    parts: list[object]  # of the model; empty if the model itself votes
    network: nn.Module  # the model itself, or its copy in bfloat16
    compiled: nn.Module  # the same network, compiled if `compile` is True
    batch_limits: tuple[int, int]
    checked: set[tuple[int, ...]]  # image shapes for which `check_independence` has passed


class SmoothedClassifier(nn.Module):
    """The smoothed classifier g of any `model` that maps (B, C, H, W) float images in [0, 1] to (B, K) logits.

    `certify` and `predict` are CERTIFY and PREDICT of Cohen et al. 2019. By default `certify` is group-sequential. As a
    module, g maps each image to the logarithm of the mean softmax over `num_noise` noisy copies, with the same noise at
    each call. This is differentiable, so other libraries can wrap and attack it (Salman et al. 2019).

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> smoothed = rrcm.SmoothedClassifier(model, sigma=0.5, num_classes=10)
    >>> images = torch.rand(2, 1, 8, 8)
    >>> certificates = smoothed.certify(images, n=1000)
    >>> all(certificate.radius >= 0 for certificate in certificates)
    True

    `model` stays on its device. Each call puts it into eval mode, since batch statistics would make votes depend on
    other images. Each call uses the weights that the model has at that time, so it may be trained or moved between two
    calls. For another model or another sigma, make another `SmoothedClassifier`.

    The model may be any module, also one that was scripted, traced, compiled or exported. It returns the logits, or an
    object with an attribute `logits`. A program that was exported for certain batch sizes gets batches of these sizes.
    Two attributes of `BaseClassifier` are read if present: `keeps_float32_input` and `stochastic`.

    `precision` alone decides how the network computes: autocast and TF32 are switched off, and the default dtype is
    float32. With "bf16", a copy of the model computes in bfloat16, and the certificate applies to that network.
    Gradients then reach the images but not the weights. Noise is always drawn and added in float32.

    An exception of the model is raised again as an `RRCMError` of one line, with the original as its cause.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,  # pixel units
        num_classes: int,
        *,
        seed: int = 0,
        num_noise: int = 16,  # noisy copies per image in `forward`
        batch_size: int | None = None,  # noisy samples per forward pass when voting; None: `find_batch_size`
        memory_gib: float | None = None,  # limit; None: 1/16 on a CPU (the cache), half of the free memory on a GPU
        precision: str = "fp32",  # or bf16, or auto: bf16 where the model's device has instructions for it
        compile: bool = False,  # torch.compile; with CUDA graphs on a GPU
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            part = {"ExportedProgram": ".module()", "LoadedClassifier": ".classifier"}.get(type(model).__name__)
            hint = f"; pass its {part}" if part else ""
            raise RRCMError(f"model is a {type(model).__name__}: must be a torch.nn.Module{hint}")
        sigma, num_classes = real_number("sigma", sigma), whole_number("num_classes", num_classes)
        if not torch.finfo(torch.float32).tiny <= sigma <= torch.finfo(torch.float32).max:
            raise RRCMError(f"sigma = {sigma}: must be above 0 and finite in float32, in pixel units")
        if num_classes < 2:
            raise RRCMError(f"num_classes = {num_classes}: must be at least 2; let a model of one logit return two")
        memory_gib = None if memory_gib is None else real_number("memory_gib", memory_gib)
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise RRCMError(f"memory_gib = {memory_gib}: must be above 0 and finite")
        if not isinstance(precision, str) or precision not in ("auto", "fp32", "bf16"):
            raise RRCMError(f"precision = {shown(precision)}: must be auto, fp32 or bf16")
        if not isinstance(compile, bool):
            raise RRCMError(f"compile = {shown(compile)}: must be True or False")
        if compile and is_stochastic(model):
            raise RRCMError("compile = True: a stochastic classifier cannot be compiled; set it to False")
        if compile and isinstance(model, torch.jit.ScriptModule):
            raise RRCMError("compile = True: a scripted or traced model cannot be compiled; set it to False")
        self.model = unwrapped(model)
        if precision == "auto":
            precision = "bf16" if native_precision(self.device) == "bf16" else "fp32"
        self.sigma, self.num_classes, self.seed = sigma, num_classes, whole_number("seed", seed)
        self.num_noise, self.batch_size = at_least_one("num_noise", num_noise), batch_size
        self.memory_gib, self.precision, self._is_compiled = memory_gib, precision, compile
        self._batch_sizes: dict[tuple[object, ...], int] = {}  # by image shape and device
        set_eval(self.model)
        self._voter: Voter | None = None
        self._find_voter()  # raises the errors of later calls now

    def __setattr__(self, name: str, value: object) -> None:
        """Raises `RRCMError` for a change of a FIXED attribute, and for an impossible batch size."""
        if name in FIXED and getattr(self, name, value) is not value:
            raise RRCMError(f"{name}: cannot be changed once a model is smoothed; make another SmoothedClassifier")
        if name == "batch_size" and value is not None:
            value = at_least_one(name, value)
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        """The model's device, where everything is computed. A model without tensors computes on the images' device."""
        return self._device(torch.device("cpu"))

    @property
    def network(self) -> nn.Module:
        """The network that votes: the model itself, or a copy in bfloat16 of the weights that the model has now."""
        return self._find_voter().network

    def _device(self, default: torch.device) -> torch.device:
        return next((t.device for t in chain(self.model.parameters(), self.model.buffers())), default)

    def _find_voter(self) -> Voter:
        """The last voter if it is still valid, else a new one. A model with the same switches is not checked again."""
        copied, now, before = self.precision == "bf16", switches(self.model), self._voter
        all_parts = parts(self.model) if copied else []
        unchanged = before is not None and same_objects(before.switches, now)
        kept = unchanged and same_objects(before.parts, all_parts)
        if kept and (not copied or update_copy(before.network, self.model)):
            return before
        network = copy_in_bfloat16(self.model) if copied else self.model
        compiled = _compile(network, self.device) if self._is_compiled else network
        checked = before.checked if unchanged else set()
        self._voter = Voter(now, all_parts, network, compiled, batch_limits(self.model), checked)
        return self._voter

    @contextmanager
    def _ready(self, device: torch.device) -> Iterator[Voter]:
        """The voter for the present state of the model, which is in eval mode. Inside, torch has its usual state.

        `device` has the images.
        """
        check_weights(self.model, self.precision)
        with usual_state(self._device(device)):
            set_eval(self.model)
            yield self._find_voter()

    def train(self, mode: bool = True) -> "SmoothedClassifier":
        """Stay in eval mode."""
        self.training = False
        set_eval(self.model)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logarithm of the mean softmax over noisy copies: (B, C, H, W) float -> (B, K) float32, differentiable.

        Image i of the batch has the noise of index i. Raises `RRCMError` for images of another shape or dtype.
        """
        check_layout(images)
        images = images.float()
        with self._ready(images.device) as voter:
            if len(images):
                self._check_independence(voter, images[0].detach())
            return self._log_mean_softmax(voter, images)

    def _log_mean_softmax(self, voter: Voter, images: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(images), device=images.device).repeat_interleave(self.num_noise)
        sample = torch.arange(self.num_noise, device=images.device).repeat(len(images))
        purpose = torch.full_like(index, FORWARD)
        noise = counter_normal(images.shape[1:], self.seed, purpose, index, sample)
        noisy = images.repeat_interleave(self.num_noise, 0) + self.sigma * noise
        logits = self._logits(voter.network, voter.batch_limits, noisy, (purpose, index, sample))
        logits = logits.float().log_softmax(-1)
        return logits.unflatten(0, (len(images), self.num_noise)).logsumexp(1) - math.log(self.num_noise)

    def certify(
        self,
        images: torch.Tensor,
        labels: Sequence[int] | torch.Tensor | None = None,
        *,
        stopping: str = "sequential",
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        radius_step: float = 0.25,
        bound: str = "binary",
        indices: Sequence[int] | None = None,
    ) -> list[Certificate]:
        """One certificate per image, each wrong with probability at most alpha.

        images (B, C, H, W) float in [0, 1]. `bound` is "binary", as in the tables of all papers, or "margin", which
        also certifies classes with less than half of the votes (margin.py). `stopping` is "fixed" for CERTIFY with its
        exact bound, or "sequential". The latter draws only as many of the n samples as are needed to decide which
        multiples of `radius_step` (pixel units) are certified. Labels are for evaluations: with them, "sequential"
        stops as soon as the chosen class is wrong. `indices` select the images' noise under the seed (default: 0, 1,
        ...). Raises `RRCMError` for impossible settings and images.
        """
        rule = make_stopping_rule(stopping, self.sigma, n0=n0, n=n, alpha=alpha, radius_step=radius_step, bound=bound)
        states = [ImageState(*each) for each in identify(images, labels, indices, self.num_classes)]
        for _ in self.certify_stream(states, rule):
            pass
        return [certificate(state, rule, self.num_classes) for state in states]

    def predict(
        self,
        images: torch.Tensor,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        indices: Sequence[int] | None = None,
    ) -> list[int]:
        """PREDICT (Cohen et al. 2019): the smoothed classifier's class of each image, or ABSTAIN.

        images (B, C, H, W) float in [0, 1]. Another class is returned with probability at most alpha. Raises
        `RRCMError` for impossible settings and images.
        """
        n, alpha = check_prediction(n, alpha)
        identified, predictions = identify(images, None, indices, self.num_classes), []
        together = self.images_per_round(images[0], n) if identified else 1
        for first in range(0, len(identified), together):
            numbers, group, _ = zip(*identified[first : first + together], strict=True)
            counts = self.count_samples(group, numbers, PREDICT, n)
            runner_up, top = np.sort(counts, axis=1)[:, -2:].T.tolist()
            for votes, a, b in zip(counts, top, runner_up, strict=True):
                predictions.append(int(votes.argmax()) if binomial_test(a, a + b) <= alpha else ABSTAIN)
        return predictions

    def images_per_round(self, image: torch.Tensor, n: int) -> int:
        """How many images like this one fill BATCHES_PER_SYNC batches with n samples each, at least one."""
        return max(1, self.find_room(image) // n)

    def count_samples(
        self, images: Sequence[torch.Tensor] | torch.Tensor, indices: Sequence[int], purpose: int, n: int
    ) -> np.ndarray:
        """`count_votes` for the first n samples of each image for one purpose: (len(images), K) int64."""
        room = self.find_room(images[0])
        pairs = list(zip(images, indices, strict=True))
        return sum(
            self.count_votes([SampleRequest(*pair, purpose, start, min(n, start + room)) for pair in pairs])
            for start in range(0, n, room)
        )

    def certify_stream(
        self, states: Iterable[ImageState], rule: StoppingRule, *, at_once: int | None = None
    ) -> Iterator[list[ImageState]]:
        """Certify images from any state on, and yield after each round the states that changed.

        At most `at_once` images are in progress. The samples of several images are packed to fill the batches
        (`vote_in_rounds`). Raises `RRCMError` for a rule with another sigma.
        """
        if rule.sigma != self.sigma:
            raise RRCMError(f"sigma = {rule.sigma} of the stopping rule: must be {self.sigma}, as for the noise")

        def vote(chosen: list[ImageState], requests: list[SampleRequest]) -> None:
            for state, request, votes in zip(chosen, requests, self.count_timed(chosen, requests), strict=True):
                _update(state, request, votes, rule)

        yield from vote_in_rounds(states, self.find_room, partial(_next_samples, rule), vote, at_once=at_once)

    def find_room(self, image: torch.Tensor) -> int:
        """How many samples a round has for images like this one."""
        return BATCHES_PER_SYNC * self.find_batch_size(image)

    def count_timed(self, states: Sequence[State], requests: Sequence[SampleRequest]) -> np.ndarray:
        """`count_votes`. The time is added to the seconds of the states, in proportion to their samples."""
        start, votes = time.monotonic(), self.count_votes(requests)
        seconds = (time.monotonic() - start) / sum(request.stop - request.start for request in requests)
        for state, request in zip(states, requests, strict=True):
            state.seconds += seconds * (request.stop - request.start)
        return votes

    @torch.no_grad()
    @explain_out_of_memory("set batch_size or memory_gib lower")
    def count_votes(self, requests: Sequence[SampleRequest]) -> np.ndarray:
        """SAMPLEUNDERNOISE (Cohen et al. 2019) for many images: votes per class, (len(requests), K) int64.

        Samples are packed into batches of one shape. This waits for the device only once, at the end. Raises
        `RRCMError` if the model does not return (B, K) logits, if it returns NaN or infinity, and if its answer to an
        image depends on the other images.
        """
        with self._ready(requests[0].image.device) as voter:
            self._check_independence(voter, requests[0].image)
            return self._count(voter, requests, self._batch_size(voter, requests[0].image))

    def _count(self, voter: Voter, requests: Sequence[SampleRequest], size: int) -> np.ndarray:
        device, lengths = self._device(requests[0].image.device), [each.stop - each.start for each in requests]
        shape = requests[0].image.shape
        total = sum(lengths)
        padded = -(-total // size) * size
        of_row = np.repeat(np.arange(len(requests)), lengths)
        rows = np.zeros((4, padded), np.int64)  # request, purpose, image index, sample; the rest is padding
        rows[:, :total] = (
            of_row,
            np.array([request.purpose for request in requests])[of_row],
            np.array([request.index for request in requests])[of_row],
            np.concatenate([np.arange(request.start, request.stop) for request in requests]),
        )
        rows = torch.from_numpy(rows).to(device)
        real = (torch.arange(padded, device=device) < total).long()
        images = torch.stack([request.image for request in requests]).to(device, torch.float32)
        counts = torch.zeros(len(requests) * self.num_classes, dtype=torch.int64, device=device)
        meaningless = torch.zeros((), dtype=torch.bool, device=device)
        for first in range(0, padded, size):
            request, purpose, index, sample = rows[:, first : first + size]
            noise = counter_normal(shape, self.seed, purpose, index, sample)
            noisy = images[request].add_(noise, alpha=self.sigma)
            logits = self._logits(voter.compiled, voter.batch_limits, noisy, (purpose, index, sample))
            counts.index_add_(0, request * self.num_classes + logits.argmax(1), real[first : first + size])
            meaningless |= ~logits.amax(1).isfinite().all()  # NaN if a logit is NaN; -inf may exclude a class
        if meaningless:
            raise RRCMError(
                "the model returns NaN or infinite logits for noisy images, so its votes are meaningless; check its "
                "weights"
            )
        return counts.view(len(requests), self.num_classes).cpu().numpy()

    def find_batch_size(self, image: torch.Tensor) -> int:
        """`batch_size`, or if that is None the largest power of two up to 1024 whose forward pass fits `memory_gib`.

        On a GPU, the memory of a small batch and its noise is measured. On a CPU, it is estimated from the largest
        output of a layer. The answer is the same on the same device, unless other programs use its memory and the batch
        is below 1024. The batch sizes that an exported program accepts come first.
        """
        if self.batch_size is not None:
            needed, memory = self.batch_size * 8 * image.numel(), sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
            if needed > memory:  # for the images and their noise alone; Linux would kill the process
                has = f"needs more than {needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}"
                raise RRCMError(f"batch_size = {self.batch_size}: {has}; set it lower, or to None")
            return self.batch_size
        with self._ready(image.device) as voter:
            return self._batch_size(voter, image)

    def _batch_size(self, voter: Voter, image: torch.Tensor) -> int:
        if self.batch_size is not None:
            return self.batch_size
        key = tuple(image.shape), self._device(image.device)
        if key not in self._batch_sizes:
            self._check_independence(voter, image)  # before any other run of the model
            self._batch_sizes[key] = self._largest_batch(voter, image)
        return self._batch_sizes[key]

    @torch.no_grad()
    @explain_out_of_memory("not even eight noisy images fit: free some memory, or use another GPU")
    def _check_independence(self, voter: Voter, image: torch.Tensor) -> None:
        """Run `check_independence` for the model, once for each shape of images."""
        if tuple(image.shape) not in voter.checked:
            probe = image.to(self._device(image.device), torch.float32).repeat(min(8, self.batch_size or 8), 1, 1, 1)
            rows = torch.zeros(3, len(probe), dtype=torch.int64, device=probe.device)
            with without_compilation(), kept_buffers(voter.network):
                check_independence(
                    lambda noisy: self._logits(voter.network, voter.batch_limits, noisy, rows),
                    probe,
                    TOLERANCE[self.precision],
                )
            voter.checked.add(tuple(image.shape))

    @torch.no_grad()
    @explain_out_of_memory("not even eight noisy images fit: free some memory, or use another GPU")
    def _largest_batch(self, voter: Voter, image: torch.Tensor) -> int:
        device = self._device(image.device)
        probe = image.to(device, torch.float32).repeat(8, 1, 1, 1)
        rows = torch.zeros(3, len(probe), dtype=torch.int64, device=device)

        def run() -> torch.Tensor:
            return self._logits(voter.network, voter.batch_limits, probe, rows)

        with without_compilation():
            if device.type == "cuda":
                needed = _peak_memory(lambda: (counter_normal(probe.shape[1:], 0, *rows), run()), device) / len(probe)
                limit = self.memory_gib * 2**30 if self.memory_gib else _free_memory(device) / 2
            else:
                needed = 4 * max(largest_output(voter.network, run), probe.numel() * 4) / len(probe)  # with temporaries
                limit = (self.memory_gib or 1 / 16) * 2**30
        fits = max(1, int(limit / needed))
        smallest, largest = voter.batch_limits
        return max(smallest, min(LARGEST_BATCH, largest, 1 << (fits.bit_length() - 1)))

    def _logits(
        self, network: nn.Module, limits: tuple[int, int], noisy: torch.Tensor, rows: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The logits (B, K) of noisy images (B, C, H, W).

        `rows` has the purpose, the image index and the sample of each row, (B,) int64 each.
        """
        if self.precision == "bf16" and not attribute(self.model, "keeps_float32_input"):
            noisy = noisy.bfloat16()
        try:
            if is_stochastic(self.model):
                logits = logits_of(network(noisy, draw=CounterDraw(self.seed, *rows)))
            else:
                logits = logits_of(in_batches(network, noisy, limits))
        except (RRCMError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # raised by the model itself
            where = f"{len(noisy)} images of {' x '.join(map(str, noisy.shape[1:]))} in {self.precision}"
            hint = "; use precision fp32" if self.precision == "bf16" else ""
            if not hint and any(p.is_floating_point() and p.dtype != torch.float32 for p in self.model.parameters()):
                hint = "; convert the model with .float()"
            raise RRCMError(f"the model fails on {where} ({_reason(error)}){hint}") from error
        _check_logits(logits, (len(noisy), self.num_classes))
        return logits.to(noisy.device)


def identify(
    images: torch.Tensor,
    labels: Sequence[int] | torch.Tensor | None,
    indices: Sequence[int] | None,
    num_classes: int,
) -> list[tuple[int, torch.Tensor, int | None]]:
    """The index, the image and the label of each image. Raises `RRCMError` for impossible ones.

    `indices` None means 0, 1, ..., and `labels` None that no label is known.
    """
    check_images(images)
    indices = list(range(len(images))) if indices is None else whole_numbers("indices", indices)
    if len(indices) != len(images) or len(set(indices)) != len(indices):
        raise RRCMError(f"indices: {len(indices)} for {len(images)} images; must be one per image, all different")
    if indices and not (min(indices) >= 0 and max(indices) < 2**32):
        raise RRCMError(f"indices from {min(indices)} to {max(indices)}: must be in [0, 2^32)")
    labels = [None] * len(images) if labels is None else whole_numbers("labels", labels)
    if len(labels) != len(images):
        raise RRCMError(f"labels: {len(labels)} for {len(images)} images; must be one per image")
    known = [label for label in labels if label is not None]
    if known and not (min(known) >= 0 and max(known) < num_classes):
        raise RRCMError(f"labels from {min(known)} to {max(known)}: must be in [0, {num_classes})")
    return list(zip(indices, images, labels, strict=True))


def is_stochastic(model: nn.Module) -> bool:
    """Whether `model` is a `BaseClassifier` that draws random numbers in its forward pass."""
    return attribute(model, "stochastic")


def at_least_one(name: str, value: int) -> int:
    """`value` as an int. Raises `RRCMError` for anything but a whole number of at least 1."""
    if (value := whole_number(name, value)) < 1:
        raise RRCMError(f"{name} = {value}: must be at least 1")
    return value


def _next_samples(rule: StoppingRule, state: ImageState, room: int) -> SampleRequest:
    """The samples of an image up to its next look, at most `room` of them."""
    purpose, stop = (SELECT, rule.n0) if state.top_class < 0 else (ESTIMATE, rule.looks[state.look])
    start = state.num_drawn
    return SampleRequest(state.image, state.index, purpose, start, min(stop, start + room))


def _update(state: ImageState, request: SampleRequest, votes: np.ndarray, rule: StoppingRule) -> None:
    """Add the votes. Choose the class after the selection, and decide at each look whether to stop."""
    state.num_drawn = request.stop
    state.samples += request.stop - request.start
    counts = state.selection if request.purpose == SELECT else state.counts
    for k in np.flatnonzero(votes).tolist():
        counts[str(k)] = counts.get(str(k), 0) + int(votes[k])
    if request.purpose == SELECT:
        if state.num_drawn == rule.n0:
            choose_class(state, rule)
    elif state.num_drawn == rule.looks[state.look]:
        decide(state, rule, len(votes))


def whole_numbers(name: str, numbers: Iterable[int] | torch.Tensor) -> list[int]:
    """The numbers as a list of int. Raises `RRCMError` for anything but whole numbers."""
    if not isinstance(numbers, Iterable) or isinstance(numbers, Mapping | Set) or getattr(numbers, "ndim", 1) != 1:
        raise RRCMError(f"{name}: must be whole numbers, one per image")
    return [whole_number(f"{name}, place {place}", number) for place, number in enumerate(numbers)]


def _check_logits(logits: object, expected: tuple[int, int]) -> None:
    """Raises `RRCMError` unless the model's answer is a dense tensor (B, K) of real numbers."""
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        hint = "wrap the model so that it returns its logits alone"
        if shape in ((expected[0], 1), expected[:1]):
            hint = "turn a single logit s into two, torch.stack([-s, s], -1), with num_classes = 2"
        elif isinstance(shape, tuple) and len(shape) == 2 and shape[0] == expected[0] and shape[1] > 1:
            hint = f"set num_classes = {shape[1]}"
        raise RRCMError(f"the model returns {shape} for a batch of {expected[0]}: must be a tensor {expected}; {hint}")
    dense = logits.layout == torch.strided and not logits.is_meta
    if not dense or logits.is_quantized or logits.is_complex() or logits.dtype == torch.bool:
        kind = logits.dtype if dense else logits.device if logits.is_meta else logits.layout
        raise RRCMError(f"the model returns logits of kind {kind}: must be a dense tensor of real numbers; convert it")


def check_layout(images: torch.Tensor) -> None:
    """Raises `RRCMError` unless `images` is a (B, C, H, W) float tensor."""
    if not isinstance(images, torch.Tensor):
        raise RRCMError(f"images are a {type(images).__name__}: must be a torch tensor (B, C, H, W)")
    if images.is_nested or images.layout != torch.strided or images.is_meta:
        kind = "nested" if images.is_nested else "on the device meta" if images.is_meta else f"{images.layout}"
        raise RRCMError(f"images are {kind}: must be a dense tensor with values (B, C, H, W)")
    if images.ndim != 4 or 0 in images.shape[1:]:
        hint = "; add a first dimension with image[None]" if images.ndim == 3 else ""
        raise RRCMError(f"images have shape {tuple(images.shape)}: must be (B, C, H, W){hint}")
    if not images.is_floating_point():
        hint = "; divide by 255" if images.dtype == torch.uint8 else ""
        raise RRCMError(f"images are {images.dtype}: must be float, in [0, 1]{hint}")


def check_images(images: torch.Tensor) -> None:
    """Raises `RRCMError` unless `images` is a (B, C, H, W) float tensor of finite values in [0, 1].

    Warns if all images are almost black, as after a second division by 255. This is no error, because it may be meant.
    """
    check_layout(images)
    if len(images):
        values = images.float() if images.element_size() == 1 else images  # float8 has no minimum
        low, high = values.min().item(), values.max().item()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise RRCMError(f"images have values from {low:g} to {high:g}: must be in [0, 1], without NaN")
        if 0 < high < BLACK:
            problem = f"no pixel of the images is above {high:.3g}, so they are all but black"
            warnings.warn(f"{problem}; were they divided by 255 twice?", stacklevel=4)


def _peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run()` allocates at a time. A first call is not measured, because libraries keep memory."""
    run()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the GPU: those that are free, and those that torch keeps unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """The compiled model. Its weights are not frozen, so they may change."""
    return torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)


def _reason(error: Exception) -> str:
    """The exception of a model in one line. The last line of TorchScript's exceptions says what is wrong."""
    lines = str(error).strip().splitlines()
    return one_line(RuntimeError(lines[-1])) if "TorchScript" in str(error) else one_line(error)
