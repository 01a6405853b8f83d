"""The options of `rrcm certify`, `predict` and `export` that say which classifier is smoothed, and how."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_options import CascadeOptions, load_options
from rrcm.certification.cascade_rules import LABEL_AWARE, CascadeRule, make_cascade_rule
from rrcm.certification.certify_images import run_by, smooth, smooth_cascade
from rrcm.certification.record import ChosenThresholds
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import StoppingRule
from rrcm.models.base_classifiers import Normalized
from rrcm.models.load import LoadedClassifier
from rrcm.models.own_code import load_named_classifier
from rrcm.utils.errors import RRCMError

STEPS_PER_SIGMA = 5  # steps of the grid of radii; README.md says what a finer grid costs


@dataclass(frozen=True)
class ModelOptions:
    """The options as the user gave them."""

    models: list[str]
    sigmas: list[float] = field(default_factory=list)  # pixel units
    cascade: bool = False
    thresholds: list[float] = field(default_factory=list)  # for a cascade, pixel units
    record: Path | None = None  # the record of a cascade that gives the sigmas and the thresholds
    classes: Path | None = None  # text file with one class name per line
    weights: Path | None = None  # weights for a timm model or for a module of the user's own code
    final_norm: bool = True  # whether an authors' checkpoint has a last LayerNorm
    outside_range: bool = False  # whether a joint model may have a sigma that its training did not cover


@dataclass(frozen=True)
class ChosenClassifier:
    """The base classifiers that the options name, and how they are smoothed."""

    models: list[str]  # as the user gave them; one may serve all sigmas of a cascade
    scales: list[LoadedClassifier]  # by increasing sigma; a single one unless it is a cascade
    sigmas: list[float]  # pixel units
    cascade: CascadeOptions | None = None

    def smooth(
        self, device: str, *, runtime: str = "torch", **options: object
    ) -> SmoothedClassifier | CascadedClassifier:
        """The smoothed classifier or the cascade on the device that the user names, run by a runtime.

        The `options` are passed on to `SmoothedClassifier`.
        """
        if self.cascade is not None:
            classifier = smooth_cascade(self.cascade, device, **options)
        else:
            classifier = smooth(self.scales[0], self.sigmas[0], device, **options)
        return run_by(runtime, classifier, self.scales[0])

    def rule(self, settings: Mapping[str, object]) -> StoppingRule | CascadeRule:
        """The stopping rule with these settings. Raises `RRCMError` for impossible ones."""
        if self.cascade is not None:
            return make_cascade_rule(sigmas=self.sigmas, thresholds=self.cascade.thresholds, **settings)
        return make_stopping_rule(sigma=self.sigmas[0], **settings)

    def notes(self) -> Iterator[str]:
        """What a user should know about the models before they are smoothed, in one line each."""
        for model, loaded, sigma in zip(self.models, self.scales, self.sigmas, strict=False):
            if loaded.sigma not in (None, sigma):
                note = f"{model} was trained for sigma {loaded.sigma:g}; certificates at {sigma:g} are valid"
                yield f"{note}, but may be smaller and fewer"
            if loaded.sigma is None and isinstance(loaded.classifier, Normalized):  # which only timm models are
                unseen = f"{model} has never seen noise, unless somebody else fine-tuned it under noise"
                yield f"{unseen}; if so, its certified accuracy at sigma {sigma:g} will be near 0"

    @property
    def default_step(self) -> float:
        """The default step of the grid of radii, in pixel units. It is known before any sample is drawn."""
        return self.sigmas[0] / STEPS_PER_SIGMA

    def recorded(self, settings: Mapping[str, object]) -> dict[str, object]:
        """The settings of the stopping rule as the record has them: for a cascade, with the kind of certificates."""
        return dict(settings) | ({} if self.cascade is None else {"certificates": LABEL_AWARE})

    @property
    def chosen(self) -> ChosenThresholds | None:
        """How the thresholds of a cascade were chosen, if a record says so."""
        return None if self.cascade is None else self.cascade.chosen


def choose_classifier(options: ModelOptions) -> ChosenClassifier:
    """Load the models that the options name. Raises `RRCMError` for bad models and for options that do not fit."""
    models, sigmas = options.models, options.sigmas
    given = {"classes": options.classes, "outside_range": options.outside_range}
    if options.cascade:
        _refuse(
            not options.final_norm or options.weights,
            "--weights and --no-final-norm are not for a cascade; leave them out",
        )
        cascade = load_options(models, sigmas, options.thresholds, options.record, **given)
        return ChosenClassifier(models, cascade.loaded.scales, cascade.sigmas, cascade)
    _refuse(options.thresholds or options.record, "thresholds are for a cascade; leave them out, or add --cascade")
    _refuse(len(models) > 1 or len(sigmas) > 1, "several models or sigmas are a cascade; add --cascade")
    sigma = sigmas[0] if sigmas else None
    given |= {"weights": options.weights, "final_norm": options.final_norm}
    loaded = load_named_classifier(models[0], sigma=sigma, **given)
    return ChosenClassifier(models, [loaded], [_known_sigma(models[0], loaded, sigma)])


def _refuse(problem: object, message: str) -> None:
    if problem:
        raise RRCMError(message)


def _known_sigma(model: str, loaded: LoadedClassifier, sigma: float | None) -> float:
    """`sigma`, or the noise that the model was trained for if it is None. Raises `RRCMError` if neither is known."""
    if sigma is None and loaded.sigma is None:
        raise RRCMError(f"{model}: was not trained for a particular noise; give --sigma, in pixel units")
    return loaded.sigma if sigma is None else sigma
