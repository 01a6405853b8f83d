"""The method table: one line for each method. It holds everything in which two methods differ.

A training depends only on the cells of its own row that decide its result. So changing a row retrains only that method,
and adding a row retrains nothing (derived.py).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from rrcm.models import DENOISING_CLASSIFIERS, FOLDER_LOADERS, TRAINED_CLASSIFIERS
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.utils.errors import RRCMError

PER_OBJECTIVE = ("lr", "temperature")  # settings of pre-training that may differ by objective
# The blocks of `pretrain` that an objective reads, if not just its own.
BLOCKS = {"rrcm_dmae": ("dmae", "rrcm_dmae"), "dmae_without_mask": ("dmae",)}
REFERENCE = "rrcm"  # the method that defines equal encoder passes, and with which the report compares all others
MATCHED_PRETRAINING = "rrcm"  # the pre-training whose compute the matched methods get as well
STUDENT_OBJECTIVE = "distill"  # the objective of students, which needs a teacher
SOFT_LABEL_OBJECTIVES = {"cat_rs"}  # the objectives with `needs_soft_labels`; reading that would import torch
CLEAN_SIGMA = 0.001  # noise in training on nearly clean images, pixel units: a quarter of a grey level
SOFT_LABELS = "data/soft_labels.safetensors"  # output of the stage soft-labels
DENOISER = "models/denoiser"  # output of the stage denoiser
JOINT = "joint"  # takes the place of the sigma in the names of a joint training's files and stages
# The files of a cascade in certificates/METHOD/: certificates, those by the published rule, votes for thresholds.
CASCADE, MULTI_SCALE_FILE, THRESHOLDS = "cascade", "multi_scale", "thresholds"
JOINT_LABELS = {"joint": "joint", "joint_third": "joint 1/3", "joint_pass": "joint, pass"}
# The share of the experts' passes, by the end of the name. NAME_joint_pass takes a little more, to train its head.
JOINT_SHARES = {"joint": 1.0, "joint_third": 1 / 3, "joint_pass": 1.0}
PASS_OBJECTIVE = "gaussian"  # trains the outputs for pass
PASS = "joint_pass"  # end of the names of the joint methods whose classifiers can pass
TRAINING_VOTES = "data/training_votes"  # output of the stage training-votes: a file for each joint method
FAMILIES = (
    "rRCM",
    "other pre-training",
    "noise",
    "regularization",
    "adversarial",
    "ensemble",
    "distillation",
    "denoise, then classify",
)

# The methods by family. The columns are fields of `Method` and are separated by two or more spaces; - stands for None.
# The three columns after the name decide the result, and the others the appearance. A method that starts from random
# weights also exists as NAME_matched. Every method that does not denoise also exists as NAME_joint, with one network
# for all sigmas instead of one expert for each, and as NAME_joint_third, with a third of the passes. Unless
# it is an ensemble, it also exists as NAME_joint_pass, which is NAME_joint with one more output, "pass". A student,
# which learns from another method's network, has no matched variant and cannot pass.
TABLE = """\
  method                    initial_weights           objective    classifier  colour   label

rRCM
  rrcm                      rrcm                      consistency  classifier  #0072B2  rRCM
  rrcm_without_contrastive  rrcm_without_contrastive  consistency  classifier  #44AA99  rRCM, consistency alone
  rrcm_without_consistency  rrcm_without_consistency  consistency  classifier  #332288  rRCM without consistency
  rrcm_independent_noise    rrcm_independent_noise    consistency  classifier  #AA4499  rRCM, independent noise
  rrcm_constant_levels      rrcm_constant_levels      consistency  classifier  #DDCC77  rRCM, constant levels
  rrcm_unconditioned        rrcm                      consistency  unconditioned  #1B3A6B  rRCM, not conditioned
  rrcm_cat_rs               rrcm                      cat_rs       classifier  #5E3C99  rRCM + CAT-RS
  rrcm_smoothadv            rrcm                      smoothadv    classifier  #0B8F9C  rRCM + SmoothAdv

other pre-training
  timm                      timm                      consistency  classifier  #CC79A7  timm
  moco_v3                   moco_v3                   consistency  classifier  #661100  MoCo-v3
  dmae                      dmae                      consistency  classifier  #117733  DMAE
  dmae_without_mask         dmae_without_mask         consistency  classifier  #88AA33  DMAE without mask
  dmae_smoothadv            dmae                      smoothadv    classifier  #44BB99  DMAE + SmoothAdv
  rrcm_dmae                 rrcm_dmae                 consistency  classifier  #F0E442  rRCM + DMAE

noise
  gaussian                  -                         gaussian     classifier  #009E73  Gaussian
  stability                 -                         stability    classifier  #999933  Stability

regularization
  consistency               -                         consistency  classifier  #D55E00  Consistency
  macer                     -                         macer        classifier  #882255  MACER

adversarial
  smoothadv                 -                         smoothadv    classifier  #E69F00  SmoothAdv
  smoothmix                 -                         smoothmix    classifier  #56B4E9  SmoothMix
  cat_rs                    -                         cat_rs       classifier  #A0522D  CAT-RS

ensemble
  consistency_ensemble      -                         consistency  ensemble    #B2182B  Consistency, ensemble
  rrcm_ensemble             rrcm                      consistency  ensemble    #2166AC  rRCM, ensemble

distillation
  distill                   -                         distill      classifier  #000000  Student

denoise, then classify
  dds                       gaussian                  -            dds         #CC6677  DDS
  dds_finetuned             gaussian                  gaussian     dds         #6699CC  DDS, fine-tuned
  densepure                 gaussian                  -            densepure   #AA3377  DensePure
  diffsmooth                gaussian                  -            diffsmooth  #997700  DiffSmooth
"""
COLUMNS = TABLE.partition("\n")[0].split()[1:]
MAX_LABEL = 33  # characters of a matched method's label, for which a legend has room
APPEARANCE = {"colour", "label", "family"}  # fields of `Method` that decide no result


@dataclass(frozen=True)
class Method:
    """How the base classifier of a method is trained, and how the report draws it."""

    initial_weights: str | None  # pre-training objective or "timm"; if it denoises, another method; None: random
    objective: str | None  # fine-tuning objective, a key of FINETUNING; None: combined from its parts, not trained
    classifier: str  # a key of TRAINED_CLASSIFIERS or DENOISING_CLASSIFIERS (rrcm/models), or "ensemble"
    colour: str  # such as #0072B2
    label: str
    family: str  # one of FAMILIES
    matched: bool = False  # whether its compute is matched to rRCM's, pre-training included
    joint: float | None = None  # share of the experts' passes that one network for all sigmas gets; None: an expert
    can_pass: bool = False  # whether the network has an output for "pass"

    @property
    def identity(self) -> dict[str, str | float | None]:
        """The columns that decide a result. Only joint methods have an entry `joint`, and a few an entry `can_pass`."""
        decisive = {name: value for name, value in asdict(self).items() if name not in APPEARANCE}
        return {name: value for name, value in decisive.items() if name not in ("joint", "can_pass") or value}

    @property
    def pretrained_here(self) -> bool:
        """Whether the initial weights come from a pre-training of this pipeline."""
        return self.initial_weights not in (None, "timm") and not self.denoises

    @property
    def needs_soft_labels(self) -> bool:
        """Whether it trains on soft labels: another smoothed classifier's votes for the training images."""
        return self.objective in SOFT_LABEL_OBJECTIVES

    @property
    def is_student(self) -> bool:
        """Whether it learns the predictions of another method's network, its teacher: `student` in the settings."""
        return self.objective == STUDENT_OBJECTIVE

    @property
    def is_ensemble(self) -> bool:
        """Whether it consists of several classifiers, each trained as the other columns say."""
        return self.classifier == "ensemble"

    @property
    def denoises(self) -> bool:
        """Whether its base classifier consists of a denoiser and a classifier."""
        return self.classifier in DENOISING_CLASSIFIERS

    @property
    def trained(self) -> str:
        """The kind of classifier that a single training run produces.

        For ensembles and denoising methods, it is the plain classifier inside.
        """
        return "classifier" if self.is_ensemble or self.denoises else self.classifier


def read_rows(table: str) -> Iterator[tuple[str, list[str]]]:
    """The family and the cells of each row of a table in the format of TABLE."""
    family = ""
    for line in table.splitlines()[1:]:
        cells = re.split("  +", line.strip())
        if line.startswith(" ") or len(cells) > 1:
            yield family, cells
        else:
            family = line or family


def read_methods(table: str) -> dict[str, Method]:
    """The methods of a table by name, followed by their matched and their joint variants.

    Rows with too few or too many cells are left out; `check_methods` reports them.
    """
    written = {
        name: Method(*(None if cell == "-" else cell for cell in cells[:2]), *cells[2:], family=family)
        for family, (name, *cells) in read_rows(table)
        if len(cells) == len(COLUMNS)
    }
    experts = written | {
        f"{name}_matched": matched(row)
        for name, row in written.items()
        if row.initial_weights is None and not (row.is_ensemble or row.is_student)
    }
    return experts | {
        f"{name}_{ending}": joint(row, ending)
        for name, row in experts.items()
        for ending in JOINT_SHARES
        if has_joint(row, ending)
    }


def matched(row: Method) -> Method:
    """The same method with the compute of rRCM's pre-training added, so that its total compute equals rRCM's."""
    return replace(row, matched=True, label=f"{row.label}, matched compute")


def has_joint(row: Method, ending: str) -> bool:
    """Whether a method also exists with this ending of its name."""
    return not (row.denoises or (ending == PASS and (row.is_ensemble or row.is_student)))


def joint(row: Method, ending: str) -> Method:
    """The same method with one network for all sigmas."""
    label = row.label.replace("matched compute", "matched")  # a legend has no room for more
    share, label = JOINT_SHARES[ending], f"{label}, {JOINT_LABELS[ending]}"
    return replace(row, joint=share, can_pass=ending == PASS, label=label)


METHODS = read_methods(TABLE)
PLUGGED_IN: dict[str, str] = {}  # the plug-in's name in messages, by the name of each method that it adds


def add_methods(table: str, origin: str) -> None:
    """Add methods to METHODS: rows in the format of TABLE without its first line, from `origin`.

    Raises `RRCMError` for a row with too few or too many cells, and for a name that a method has already.
    """
    table = f"\n{table}"
    rows = [cells for _, cells in read_rows(table)]
    _check_cells(rows, origin)
    added, written = read_methods(table), Counter(name for name, *_ in rows)
    if taken := [name for name in added if name in METHODS or written[name] > 1]:
        raise RRCMError(f"{origin}: there is a method {taken[0]} already; give yours another name")
    METHODS.update(added)
    PLUGGED_IN.update(dict.fromkeys(added, origin))


def expert_of(method: str) -> str:
    """The method whose experts a joint method replaces. An expert's own method is returned unchanged."""
    if METHODS[method].joint is None:
        return method
    return next(method.removesuffix(f"_{ending}") for ending in JOINT_SHARES if method.endswith(f"_{ending}"))


def continued_method(method: str) -> str:
    """The joint method to which a method that can pass adds an output."""
    return f"{method.removesuffix(f'_{PASS}')}_{JOINT}"


def model_name(method: str, sigma: float) -> str:
    """The name of the model folder, below models/METHOD/, of a method at pixel noise `sigma`."""
    return JOINT if METHODS[method].joint is not None else f"sigma_{float(sigma)}"


def require_method(method: str) -> None:
    """Raise `RRCMError` for a name that is no method's."""
    if method not in METHODS:
        raise RRCMError(f"{method}: no such method; rrcm/methods.py has {', '.join(METHODS)}")


def check_methods() -> None:
    """Raises `RRCMError` for the first row that would make a stage fail. It names the cell and the allowed values."""
    rows = [cells for _, cells in read_rows(TABLE)]
    _check_cells(rows, "rrcm/methods.py")
    derived = [name for name, row in METHODS.items() if row.matched or row.joint is not None]
    names = Counter([name for name, *_ in rows] + derived)
    labels = Counter(row.label for row in METHODS.values())
    colours = Counter(row.colour.lower() for row in METHODS.values() if not row.matched and row.joint is None)
    for name in sorted(METHODS, key=lambda name: name not in PLUGGED_IN):  # a clash is reported for the plug-in
        row, origin = METHODS[name], PLUGGED_IN.get(name, "rrcm/methods.py")
        if names[name] > 1:
            raise RRCMError(f"{origin}: {names[name]} methods are called {name}; give each its own name")
        if not re.fullmatch("[a-z0-9_]+", name):
            raise RRCMError(f"{origin}: {name!r} names files and stages; write it with a-z, 0-9 and _")
        for column, allowed in _allowed_cells(row).items():
            if (cell := getattr(row, column)) not in allowed:
                known = ", ".join(_written(each) for each in allowed)
                raise RRCMError(f"{origin}: {name} has {column} {_written(cell)!r}; choose one of {known}")
        if not re.fullmatch("#[0-9a-fA-F]{6}", row.colour):
            raise RRCMError(f"{origin}: {name} has colour {row.colour!r}; write it as #0072B2")
        if colours[row.colour.lower()] > 1:
            raise RRCMError(f"{origin}: {name} has the colour {row.colour} of another method; give each its own")
        if row.matched and row.joint is None and len(row.label) > MAX_LABEL:
            raise RRCMError(
                f"{origin}: {name} has label {row.label!r}, too long for a legend; shorten it to {MAX_LABEL} characters"
            )
        if labels[row.label] > 1:
            raise RRCMError(f"{origin}: {name} has the label {row.label!r} of another method; give each its own")


def _check_cells(rows: Sequence[Sequence[str]], origin: str) -> None:
    for name, *cells in rows:
        if len(cells) != len(COLUMNS):
            raise RRCMError(
                f"{origin}: {name} has {len(cells)} cells after its name; write {len(COLUMNS)}, with two spaces "
                f"between them: {', '.join(COLUMNS)}"
            )


def _allowed_cells(row: Method) -> dict[str, Sequence[str | None]]:
    """The allowed cells of a row, by column. The classifier comes first because other columns depend on it."""
    loadable = [kind for kind in TRAINED_CLASSIFIERS if kind in FOLDER_LOADERS]
    inside = [name for name, each in METHODS.items() if not (each.denoises or each.is_student) and each.joint is None]
    starts = [None] if row.is_student else [None, "timm", *PRETRAINING]
    return {
        "classifier": loadable if row.is_student else [*loadable, "ensemble", *DENOISING_CLASSIFIERS],
        "initial_weights": inside if row.denoises else starts,
        "objective": [None, *FINETUNING] if row.denoises else [*FINETUNING],
        "family": FAMILIES,
    }


def _written(cell: str | None) -> str:
    return "-" if cell is None else cell


def denoising_classifier(method: str, denoised: Mapping) -> tuple[str, float] | None:
    """The classifier inside a denoising method: the method and the pixel noise that it is trained with.

    `denoised` is the section of the settings with this name. None if the method does not denoise, or if
    `denoised.model` names a classifier from elsewhere.
    """
    row = METHODS[method]
    if not row.denoises or denoised["model"] is not None:
        return None
    own = denoised.get(row.classifier) or {}
    return row.initial_weights, float(own.get("local_sigma", CLEAN_SIGMA))
