"""Randomized smoothing of any torch classifier: noisy samples of many images in full batches, votes, certificates.

A sample's noise is a function of (seed, image index, sample) alone (noise.py), and the network always sees batches of
one shape, the last one padded. So an image's votes do not depend on its company: not on packing, order, processes or
resumes. For another batch size, thread count, precision or device the network's own rounding differs, and with it the
few votes that were almost ties.
"""

import copy
import math
import operator
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from rrcm.certification.noise import ESTIMATE, FORWARD, PREDICT, SELECT, counter_normal
from rrcm.certification.stopping import (
    ABSTAIN,
    WRONG_CLASS,
    GroupSequential,
    Procedure,
    binomial_test,
    check,
    make_stopping_rule,
)
from rrcm.models.base_classifiers import Classifier
from rrcm.utils.distributed import native_precision
from rrcm.utils.errors import RRCMError

PASSES = 16  # batches between two looks at the counts: the device is waited for once in so many
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Certificate:
    """`predict` is the smoothed classifier's class within the L2 `radius` (pixel units) of the image, or ABSTAIN.

    `samples` were drawn, the ones that chose the class included; `stopped` says why no more (stopping.py). After
    "wrong class" `predict` is the class that was chosen, and nothing is claimed of it: radius 0.
    """

    predict: int
    radius: float
    samples: int
    stopped: str


@dataclass
class ImageState:
    """An image on its way to a certificate. All but `image` is small and JSON-able: a journal of it is a checkpoint."""

    index: int  # names its noise
    image: torch.Tensor = field(repr=False)  # (C, H, W) float32 in [0, 1]
    label: int | None = None  # where known, `sequential` stops as soon as another class is chosen
    selection: dict[str, int] = field(default_factory=dict)  # votes by class of the samples that choose the class
    top: int = -1  # the chosen class
    drawn: int = 0  # samples of the present purpose so far: selection, then estimation
    count: int = 0  # votes for the chosen class among those
    look: int = 0
    level: int = 0  # radii of the grid that are certified
    samples: int = 0  # of both purposes
    stopped: str = ""
    seconds: float = 0.0  # its share of the computing so far; no part of the result


@dataclass(frozen=True)
class SampleRequest:
    """Samples start..stop of an image for one purpose (a constant of rrcm.certification.noise)."""

    image: torch.Tensor
    index: int
    purpose: int
    start: int
    stop: int


class SmoothedClassifier(nn.Module):
    """The smoothed classifier g of any `model` that maps (B, C, H, W) float images in [0, 1] to (B, K) logits.

    `certify` and `predict` are Cohen et al.'s CERTIFY and PREDICT, the first also group-sequentially. As a module it
    maps images to the logarithm of the mean softmax over `samples` noisy copies of each, the same noise at every call:
    differentiable, so that other libraries can wrap and attack it (Salman et al. 2019).

        smoothed = SmoothedClassifier(model, sigma=0.5, num_classes=10)
        for certificate in smoothed.certify(images):
            print(certificate.predict, certificate.radius)

    `model` stays in eval mode (under batch statistics votes would depend on their company), on its device. With
    `precision="bf16"` a copy of it computes in bfloat16; noise is always drawn and added in float32, and a certificate
    is one of the function that was run.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,  # pixel units
        num_classes: int,
        *,
        seed: int = 0,
        samples: int = 16,  # noisy copies a forward pass as a module
        batch_size: int | None = None,  # noisy copies a forward pass of the votes; None: `find_batch_size`
        memory_gib: float | None = None,  # bound for that; None: 1/16 on a CPU (its caches), half the memory of a GPU
        precision: str = "fp32",  # bf16, or auto: bf16 where the model's device has instructions for it
        compile: bool = False,  # torch.compile; with CUDA graphs on a GPU, with frozen weights on a CPU
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise RRCMError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
        if not torch.finfo(torch.float32).tiny <= sigma <= torch.finfo(torch.float32).max:
            raise RRCMError(f"sigma = {sigma}: must be above 0 and finite in float32, in pixel units")
        if num_classes < 2:
            raise RRCMError(f"num_classes = {num_classes}: must be at least 2")
        if samples < 1 or (batch_size is not None and batch_size < 1):
            raise RRCMError(f"samples = {samples}, batch_size = {batch_size}: must be at least 1")
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise RRCMError(f"memory_gib = {memory_gib}: must be above 0 and finite")
        if precision not in ("auto", "fp32", "bf16"):
            raise RRCMError(f"precision = {precision!r}: must be auto, fp32 or bf16")
        self.model = model
        if precision == "auto":
            precision = "bf16" if native_precision(self.device) == "bf16" else "fp32"
        self.model = (copy.deepcopy(model).bfloat16() if precision == "bf16" else model).eval()
        self.sigma, self.num_classes, self.seed, self.samples = sigma, num_classes, seed, samples
        self.batch_size, self.memory_gib, self.precision = batch_size, memory_gib, precision
        self._network = (_compile(self.model, self.device) if compile else self.model,)  # a tuple: no second submodule
        self._batch_size: dict[tuple[int, ...], int] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is, and where all computing is done."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> "SmoothedClassifier":
        """The model stays in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """log of the mean softmax over noisy copies, (B, K) float32; differentiable. Image i has noise i."""
        check_layout(images)
        images = images.float()
        place = torch.arange(len(images), device=images.device)
        sample = torch.arange(self.samples, device=images.device)
        rows = place.repeat_interleave(self.samples)
        noise = counter_normal(
            images.shape[1:], self.seed, torch.full_like(rows, FORWARD), rows, sample.repeat(len(images))
        )
        noisy = images.repeat_interleave(self.samples, 0) + self.sigma * noise
        logits = self._logits(noisy, self.model).float().log_softmax(-1)
        return logits.unflatten(0, (len(images), self.samples)).logsumexp(1) - math.log(self.samples)

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
        indices: Sequence[int] | None = None,
    ) -> list[Certificate]:
        """A certificate an image, each wrong with probability at most alpha.

        images (B, C, H, W) float in [0, 1]. `stopping` "fixed" is Cohen's CERTIFY with its exact bound; "sequential"
        draws as many of the n samples as it takes to know which multiples of `radius_step` (pixel units) are certified.
        With labels "sequential" is done as soon as the chosen class is wrong: for evaluations. `indices` (default 0, 1,
        ...) name the images' noise under the seed. Raises `RRCMError` for impossible settings and images.
        """
        plan = make_stopping_rule(stopping, self.sigma, n0=n0, n=n, alpha=alpha, radius_step=radius_step)
        candidates = self._candidates(images, labels, indices)
        for _ in self.run(candidates, plan):
            pass
        return [certificate(candidate, plan) for candidate in candidates]

    def predict(
        self,
        images: torch.Tensor,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        indices: Sequence[int] | None = None,
    ) -> list[int]:
        """PREDICT: the smoothed classifier's class of each image or ABSTAIN; another class has chance <= alpha."""
        check(self.sigma, 1, n, alpha)
        candidates, answers = self._candidates(images, None, indices), []
        room = PASSES * self.find_batch_size(images[0]) if candidates else 1
        together = max(1, room // n)
        for first in range(0, len(candidates), together):
            some = candidates[first : first + together]
            votes = sum(
                self.vote([SampleRequest(c.image, c.index, PREDICT, start, min(n, start + room)) for c in some])
                for start in range(0, n, room)
            )
            runner_up, top = np.sort(votes, axis=1)[:, -2:].T.tolist()
            for classes, a, b in zip(votes, top, runner_up, strict=True):
                answers.append(int(classes.argmax()) if binomial_test(a, a + b) <= alpha else ABSTAIN)
        return answers

    def run(
        self, candidates: Iterable[ImageState], plan: Procedure, *, at_once: int | None = None
    ) -> Iterator[list[ImageState]]:
        """Certify candidates, whatever state they are in, and yield those that moved on, again and again.

        Candidates are taken from the iterable when there is room for them in the next batches, at most `at_once` at a
        time; samples of as many images as it takes are packed to fill those. What happens to an image depends on it
        alone.
        """
        source, active = iter(candidates), deque()
        while True:
            requests, chosen, room = [], [], None
            waiting = len(active)
            while room is None or room > 0:
                if waiting:
                    candidate, waiting = active.popleft(), waiting - 1
                elif (at_once is not None and len(chosen) >= at_once) or (candidate := next(source, None)) is None:
                    break
                elif candidate.stopped:
                    continue
                if room is None:
                    room = PASSES * self.find_batch_size(candidate.image)
                request = _next_samples(candidate, plan, room)
                requests.append(request)
                chosen.append(candidate)
                room -= request.stop - request.start
            if not requests:
                return
            start, counts = time.monotonic(), self.vote(requests)
            seconds = (time.monotonic() - start) / sum(request.stop - request.start for request in requests)
            for candidate, request, votes in zip(chosen, requests, counts, strict=True):
                _advance(candidate, request, votes, plan)
                candidate.seconds += seconds * (request.stop - request.start)
            yield chosen
            active.extendleft(reversed([candidate for candidate in chosen if not candidate.stopped]))

    @torch.no_grad()
    def vote(self, requests: Sequence[SampleRequest]) -> np.ndarray:
        """SAMPLEUNDERNOISE of many images: how often each class is answered, (len(requests), K) int64.

        Samples are packed into batches of one shape. The device is waited for once, at the end. Raises `RRCMError` when
        the model's answers are not (B, K) or not numbers.
        """
        device, lengths = self.device, [request.stop - request.start for request in requests]
        shape = requests[0].image.shape
        size = self.find_batch_size(requests[0].image)
        total = sum(lengths)
        padded = -(-total // size) * size
        of_row = np.repeat(np.arange(len(requests)), lengths)
        sample = np.concatenate([np.arange(request.start, request.stop) for request in requests])
        rows = np.zeros((4, padded), np.int64)  # request, purpose, image index, sample; the rest pads
        rows[:, :total] = (
            of_row,
            np.array([request.purpose for request in requests])[of_row],
            np.array([request.index for request in requests])[of_row],
            sample,
        )
        rows = torch.from_numpy(rows).to(device)
        real = (torch.arange(padded, device=device) < total).long()
        images = torch.stack([request.image for request in requests]).to(device, torch.float32)
        counts = torch.zeros(len(requests) * self.num_classes, dtype=torch.int64, device=device)
        broken = torch.zeros((), dtype=torch.bool, device=device)
        for batch in range(0, padded, size):
            of, purpose, index, number = rows[:, batch : batch + size]
            noise = counter_normal(shape, self.seed, purpose, index, number)
            logits = self._logits(images[of].add_(noise, alpha=self.sigma), self._network[0])
            counts.index_add_(0, of * self.num_classes + logits.argmax(1), real[batch : batch + size])
            broken |= logits.isnan().any()
        if broken:
            raise RRCMError("the model answers NaN to noisy images: its votes would mean nothing")
        return counts.view(len(requests), self.num_classes).cpu().numpy()

    def find_batch_size(self, image: torch.Tensor) -> int:
        """`batch_size`, or where that is None the largest power of two up to 1024 whose forward pass fits `memory_gib`.

        On a GPU a probe is measured, on a CPU the outputs of all layers are added up. Same device, same answer.
        """
        if self.batch_size is not None:
            return self.batch_size
        key = tuple(image.shape)
        if key not in self._batch_size:
            self._batch_size[key] = self._probe(image)
        return self._batch_size[key]

    @torch.no_grad()
    def _probe(self, image: torch.Tensor) -> int:
        device = self.device
        probe = image.to(device, torch.float32).expand(8, *image.shape)
        if device.type == "cuda":
            limit = (self.memory_gib or torch.cuda.get_device_properties(device).total_memory / 2**31) * 2**30
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._logits(probe, self.model)
            needed = (torch.cuda.max_memory_allocated(device) - before) / len(probe)
        else:
            limit = (self.memory_gib or 1 / 16) * 2**30
            outputs = [probe.numel() * 4]

            def note(layer: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, torch.Tensor):
                    outputs.append(output.numel() * output.element_size())

            hooks = [layer.register_forward_hook(note) for layer in self.model.modules()]
            try:
                self._logits(probe, self.model)
            finally:
                for hook in hooks:
                    hook.remove()
            needed = 4 * max(outputs) / len(probe)  # a layer's input and output, and what lies between
        fits = max(1, int(limit / needed))
        return min(LARGEST_BATCH, 1 << (fits.bit_length() - 1))

    def _logits(self, noisy: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """(B, K) of (B, C, H, W). Our own classifiers round their input themselves, after scaling it."""
        if self.precision == "bf16" and not isinstance(self.model, Classifier):
            noisy = noisy.bfloat16()
        logits = model(noisy)
        if getattr(logits, "shape", None) != (len(noisy), self.num_classes):
            answer = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            must = (len(noisy), self.num_classes)
            raise RRCMError(f"the model answers {answer} to a batch of {len(noisy)}: must be a tensor {must}")
        return logits

    def _candidates(
        self, images: torch.Tensor, labels: Sequence[int] | torch.Tensor | None, indices: Sequence[int] | None
    ) -> list[ImageState]:
        check_images(images)
        names = list(range(len(images))) if indices is None else whole_numbers("indices", indices)
        if len(names) != len(images) or len(set(names)) != len(names):
            raise RRCMError(f"indices: {len(names)} for {len(images)} images; must be one an image, all different")
        if names and not (min(names) >= 0 and max(names) < 2**32):
            raise RRCMError(f"indices from {min(names)} to {max(names)}: must be in [0, 2^32)")
        if labels is None:
            return [ImageState(name, image) for name, image in zip(names, images, strict=True)]
        known = whole_numbers("labels", labels)
        if len(known) != len(images):
            raise RRCMError(f"labels: {len(known)} for {len(images)} images; must be one an image")
        if known and not (min(known) >= 0 and max(known) < self.num_classes):
            raise RRCMError(f"labels from {min(known)} to {max(known)}: must be in [0, {self.num_classes})")
        return [ImageState(name, image, label) for name, image, label in zip(names, images, known, strict=True)]


def certificate(candidate: ImageState, plan: Procedure) -> Certificate:
    """What a finished candidate has come to."""
    if candidate.stopped == WRONG_CLASS:
        return Certificate(candidate.top, 0.0, candidate.samples, WRONG_CLASS)
    radius = plan.radius(candidate.count, candidate.level)
    if radius is None:
        return Certificate(ABSTAIN, 0.0, candidate.samples, candidate.stopped)
    return Certificate(candidate.top, radius, candidate.samples, candidate.stopped)


def _next_samples(candidate: ImageState, plan: Procedure, room: int) -> SampleRequest:
    """Up to the next look, or as far as there is room."""
    purpose, stop = (SELECT, plan.n0) if candidate.top < 0 else (ESTIMATE, plan.looks[candidate.look])
    start = candidate.drawn
    return SampleRequest(candidate.image, candidate.index, purpose, start, min(stop, start + room))


def _advance(candidate: ImageState, request: SampleRequest, votes: np.ndarray, plan: Procedure) -> None:
    """Count the votes; at the end of the selection choose the class, at a look judge."""
    candidate.drawn = request.stop
    candidate.samples += request.stop - request.start
    if request.purpose == SELECT:
        for answer in np.flatnonzero(votes).tolist():  # named by text, as JSON does
            candidate.selection[str(answer)] = candidate.selection.get(str(answer), 0) + int(votes[answer])
        if candidate.drawn == plan.n0:
            candidate.top = min((-votes, int(answer)) for answer, votes in candidate.selection.items())[1]
            candidate.selection, candidate.drawn = {}, 0
            if isinstance(plan, GroupSequential) and candidate.label not in (None, candidate.top):
                candidate.stopped = WRONG_CLASS
        return
    candidate.count += int(votes[candidate.top])
    if candidate.drawn == plan.looks[candidate.look]:
        candidate.level, candidate.stopped = plan.judge(candidate.look, candidate.count, candidate.level)
        candidate.look += 1


def whole_numbers(name: str, numbers: Iterable[int] | torch.Tensor) -> list[int]:
    """As a list. Raises `RRCMError` for anything but whole numbers."""
    try:
        return [operator.index(number) for number in numbers]
    except TypeError:
        raise RRCMError(f"{name}: must be whole numbers, one an image") from None


def check_layout(images: torch.Tensor) -> None:
    """Raises `RRCMError` unless `images` is a (B, C, H, W) float tensor."""
    if not isinstance(images, torch.Tensor):
        raise RRCMError(f"images are a {type(images).__name__}: must be a torch tensor (B, C, H, W)")
    if images.ndim != 4 or 0 in images.shape[1:]:
        hint = "; add a first dimension with image[None]" if images.ndim == 3 else ""
        raise RRCMError(f"images have shape {tuple(images.shape)}: must be (B, C, H, W){hint}")
    if not images.is_floating_point():
        hint = "; divide by 255" if images.dtype == torch.uint8 else ""
        raise RRCMError(f"images are {images.dtype}: must be float, in [0, 1]{hint}")


def check_images(images: torch.Tensor) -> None:
    """Raises `RRCMError` unless `images` is a (B, C, H, W) float tensor of finite values in [0, 1]."""
    check_layout(images)
    if len(images):
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise RRCMError(f"images have values from {low:g} to {high:g}: must be in [0, 1], without NaN")


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return torch.compile(model, mode="reduce-overhead", dynamic=False)
    return torch.compile(model, dynamic=False, options={"freezing": True})
