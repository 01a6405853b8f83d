"""The cascade of smoothed classifiers as one deployed classifier: answers, certificates, gradients.

`cascade_radii.py` says what it answers and proves how far, `cascade_rules.py` how votes certify this, and
`cascade_states.py` which samples an image needs. Here are the networks.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from rrcm.certification.cascade_rules import LABEL_AWARE, CascadeRule, check_scales, make_cascade_rule
from rrcm.certification.cascade_states import (
    CascadeCertificate,
    CascadeState,
    add_votes,
    cascade_certificate,
    new_state,
    next_samples,
)
from rrcm.certification.networks import attribute
from rrcm.certification.noise import ESTIMATE, PREDICT, SELECT
from rrcm.certification.packing import SampleRequest, vote_in_rounds
from rrcm.certification.smoothing import SmoothedClassifier, check_layout, identify
from rrcm.utils.arguments import shown, whole_number
from rrcm.utils.errors import RRCMError

SOFTNESS = 0.1  # of the decisions in gradients, relative to sigma
ONLY_0 = sys.float_info.max  # radius_step of a grid whose only radius is 0


class CascadedClassifier(nn.Module):
    """The label-aware cascade F of base classifiers at increasing sigmas, with one certificate for all radii.

    F asks the largest sigma first. Its likeliest class is the answer if sigma Phi^-1(p) reaches the threshold of that
    sigma; otherwise the next smaller sigma is asked. The smallest one always answers. F certifies small radii like a
    small sigma and large radii like a large one (`cascade_radii.py` has the theorem).

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    >>> cascade = rrcm.CascadedClassifier(model, sigmas=[0.25, 0.5], thresholds=[0.0], num_classes=2)
    >>> (certificate,) = cascade.certify(torch.full((1, 1, 8, 8), 0.5), n=1000)
    >>> certificate.samples == sum(certificate.samples_by_sigma)
    True

    `models` has one base classifier for each sigma, or is one that serves all of them. `thresholds` has one number of
    either sign for each sigma but the smallest, in pixel units. Sigmas and thresholds define F: choose them before any
    image is certified that is reported. With `can_pass` the base classifiers of all sigmas but the smallest return one
    more logit, "pass", which is no class.

    Each sigma has a `SmoothedClassifier`, which is made with the `options` (seed, num_noise, batch_size, memory_gib,
    precision, compile). Called as a module, the cascade maps images to log probabilities. The largest belongs to the
    class that F would answer if the mean softmax over the noisy copies took the place of the votes. The gradients come
    from a softened F, in which each sigma accepts by a softmax over the classes and the threshold. They therefore reach
    every base classifier.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        sigmas: Sequence[float],  # pixel units
        thresholds: Sequence[float],  # pixel units
        num_classes: int,
        *,
        can_pass: bool = False,
        **options: object,
    ):
        super().__init__()
        self.sigmas, self.thresholds = check_scales(sigmas, thresholds)
        if not isinstance(can_pass, bool):
            raise RRCMError(f"can_pass = {shown(can_pass)}: must be True or False")
        models, num_classes = _one_per_sigma(models, self.sigmas), whole_number("num_classes", num_classes)
        self.can_pass = can_pass
        self.scales = nn.ModuleList(  # by increasing sigma
            SmoothedClassifier(model, sigma, num_classes + (can_pass and k > 0), **options)
            for k, (model, sigma) in enumerate(zip(models, self.sigmas, strict=True))
        )
        self.num_classes = self.scales[0].num_classes

    def with_thresholds(self, thresholds: Sequence[float]) -> "CascadedClassifier":
        """The same smoothed classifiers with other thresholds. Raises `RRCMError` for impossible ones."""
        cascade = copy(self)
        cascade.sigmas, cascade.thresholds = check_scales(self.sigmas, thresholds)
        return cascade

    def train(self, mode: bool = True) -> "CascadedClassifier":
        """Stay in eval mode."""
        self.training = False
        for scale in self.scales:
            scale.train(mode)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logarithms of probabilities, (B, C, H, W) float -> (B, num_classes) float32, differentiable.

        The values are the log mean softmax of the sigma that accepts, so the largest belongs to the class that F
        answers. The gradients come from `soften`. Raises `RRCMError` for images of another shape or dtype.
        """
        check_layout(images)
        log_p = [scale(images).double() for scale in self.scales]
        thresholds = (-math.inf, *self.thresholds)
        hard = log_p[0][:, : self.num_classes]
        for answer, sigma, threshold in list(zip(log_p, self.sigmas, thresholds, strict=True))[1:]:
            radii = scaled_quantiles(answer, sigma)[:, : self.num_classes]
            accepts = radii.amax(1, keepdim=True) >= threshold
            hard = torch.where(accepts, answer[:, : self.num_classes], hard)
        soft = soften(log_p, self.sigmas, thresholds, self.num_classes)
        return (soft + (hard - soft).detach()).float()

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
        certificates: str = LABEL_AWARE,
        indices: Sequence[int] | None = None,
    ) -> list[CascadeCertificate]:
        """One certificate per image, each wrong with probability at most alpha.

        It takes the arguments of `SmoothedClassifier.certify`. n0 and n are numbers of samples at each sigma that is
        asked. `bound` selects the tests by which a sigma certifies that the class stays ahead of the others.
        `certificates` is "label-aware", or "multi-scale" to compare with Jeong & Shin (NeurIPS 2023). Both are about
        the same F.
        """
        settings = {"n0": n0, "n": n, "alpha": alpha, "radius_step": radius_step, "bound": bound}
        rule = make_cascade_rule(stopping, self.sigmas, self.thresholds, certificates=certificates, **settings)
        return self._certify(images, labels, indices, rule)

    def predict(
        self,
        images: torch.Tensor,
        *,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        indices: Sequence[int] | None = None,
    ) -> list[int]:
        """PREDICT: the class that F answers for each image, or ABSTAIN.

        images (B, C, H, W) float in [0, 1]. Another class is returned with probability at most alpha. These are
        certificates of the radius 0, and sampling stops as soon as that is certified or out of reach. Raises
        `RRCMError` for impossible settings and images.
        """
        settings = {"n0": n0, "n": n, "alpha": alpha, "radius_step": ONLY_0, "bound": "margin"}
        rule = make_cascade_rule("sequential", self.sigmas, self.thresholds, **settings)
        return [certificate.prediction for certificate in self._certify(images, None, indices, rule)]

    def share_batch_size(self, image: torch.Tensor) -> int:
        """Let all sigmas vote in batches of one size, the smallest that `find_batch_size` gives, and return it."""
        size = min(scale.find_batch_size(image) for scale in self.scales)
        for scale in self.scales:
            scale.batch_size = size
        return size

    def votes(self, images: torch.Tensor, n: int, *, indices: Sequence[int] | None = None) -> np.ndarray:
        """Votes for the classes, of n samples at each sigma: (B, K, num_classes) int64, for `choose_thresholds`.

        images (B, C, H, W) float in [0, 1]. No certificate of the same images uses these samples. Raises `RRCMError`
        for impossible images and indices.
        """
        identified = identify(images, None, indices, self.num_classes)
        if not identified:
            return np.zeros((0, len(self.scales), self.num_classes), np.int64)
        indices, given, _ = zip(*identified, strict=True)
        counts = [scale.count_samples(given, indices, PREDICT, n)[:, : self.num_classes] for scale in self.scales]
        return np.stack(counts, axis=1)

    def image_states(
        self,
        images: torch.Tensor,
        labels: Sequence[int] | torch.Tensor | None,
        indices: Sequence[int] | None,
        rule: CascadeRule,
    ) -> list[CascadeState]:
        """States without votes, for `certify_stream`. Raises `RRCMError` for impossible images, labels and indices."""
        return [new_state(*each, rule) for each in identify(images, labels, indices, self.num_classes)]

    def certify_stream(
        self, states: Iterable[CascadeState], rule: CascadeRule, *, at_once: int | None = None
    ) -> Iterator[list[CascadeState]]:
        """Certify images, in whatever state they are, and yield after each round the states that changed.

        At most `at_once` images are in progress. In each round the samples of several images are packed to fill the
        batches of each sigma. Raises `RRCMError` for a rule with other sigmas or thresholds.
        """
        if (rule.sigmas, rule.thresholds) != (self.sigmas, self.thresholds):
            raise RRCMError("the stopping rule has other sigmas or thresholds than the cascade; make one for these")

        def vote(chosen: list[CascadeState], requests: list[SampleRequest]) -> None:
            pairs = list(zip(chosen, requests, strict=True))
            for k in sorted({request.scale for request in requests}):
                at_k = [pair for pair in pairs if pair[1].scale == k]
                counts = self.scales[k].count_timed(*zip(*at_k, strict=True))
                for (state, request), votes in zip(at_k, counts, strict=True):
                    add_votes(state, rule, k, request.purpose == SELECT, votes, self.num_classes)

        request = partial(_next_request, rule, self.num_classes)
        yield from vote_in_rounds(states, self._find_room, request, vote, at_once=at_once)

    def _find_room(self, image: torch.Tensor) -> int:
        return max(scale.find_room(image) for scale in self.scales)

    def _certify(
        self,
        images: torch.Tensor,
        labels: Sequence[int] | torch.Tensor | None,
        indices: Sequence[int] | None,
        rule: CascadeRule,
    ) -> list[CascadeCertificate]:
        states = self.image_states(images, labels, indices, rule)
        for _ in self.certify_stream(states, rule):
            pass
        return [cascade_certificate(state, rule, self.num_classes) for state in states]


def _next_request(rule: CascadeRule, num_classes: int, state: CascadeState, room: int) -> SampleRequest:
    """The samples that an image needs next, at most `room` of them."""
    scale, selects, start, stop = next_samples(state, rule, num_classes)
    purpose = SELECT if selects else ESTIMATE
    return SampleRequest(state.image, state.index, purpose, start, min(stop, start + room), scale)


def soften(
    log_p: Sequence[torch.Tensor], sigmas: Sequence[float], thresholds: Sequence[float], num_classes: int
) -> torch.Tensor:
    """Logarithms of the probabilities of a softened F: (B, num_classes) float64, differentiable.

    `log_p` has the log mean softmax of each scale, (B, C) float64, C `num_classes` or one more for "pass". F takes the
    largest among R_k(c) and tau_k: a class, or to pass on. Here a softmax over these numbers, divided by SOFTNESS
    sigma_k, takes its place. The smallest sigma has the threshold -inf.
    """
    answers, passed = [], torch.zeros(len(log_p[0]), 1, dtype=torch.float64, device=log_p[0].device)
    for answer, sigma, threshold in reversed(list(zip(log_p, sigmas, thresholds, strict=True))):
        radii = scaled_quantiles(answer, sigma)[:, :num_classes]
        choices = torch.cat([radii, radii.new_full((len(radii), 1), threshold)], 1) / (SOFTNESS * sigma)
        choices = choices.log_softmax(1)
        answers.append(passed + choices[:, :-1])
        passed = passed + choices[:, -1:]
    return torch.stack(answers).logsumexp(0)


def scaled_quantiles(log_p: torch.Tensor, sigma: float) -> torch.Tensor:
    """R = sigma Phi^-1(p) for logarithms of probabilities (B, C) float64: (B, C), precise close to 0 and to 1."""
    p, tiny = log_p.exp(), torch.finfo(log_p.dtype).tiny
    rest = p.scatter(1, p.argmax(1, keepdim=True), 0).sum(1, keepdim=True)  # 1 - p of the largest p, with all digits
    lower, upper = (torch.special.ndtri(share.clamp(tiny, 0.5)) for share in (p, rest))
    return sigma * torch.where(p <= 0.5, lower, -upper)


def _one_per_sigma(models: nn.Module | Sequence[nn.Module], sigmas: Sequence[float]) -> list[nn.Module]:
    """The base classifier of each sigma. Raises `RRCMError` for another number, and for one trained for other noise."""
    single = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    if not single and not isinstance(models, nn.ModuleList | list | tuple):
        raise RRCMError(f"models is a {type(models).__name__}: must be a torch.nn.Module, or one for each sigma")
    models = [models] * len(sigmas) if single else list(models)
    if len(models) != len(sigmas):
        raise RRCMError(f"models: {len(models)} for {len(sigmas)} sigmas; must be one, or one for each sigma")
    for model, sigma in zip(models, sigmas, strict=True):
        trained_for = attribute(model, "sigma") if isinstance(model, nn.Module) else None
        if type(trained_for) in (int, float) and not math.isclose(trained_for, sigma, rel_tol=1e-6):
            wrong = f"models: the one for sigma {sigma:g} was trained for {trained_for:g}"
            raise RRCMError(f"{wrong}; give base classifiers in the order of the sigmas")
    return models
