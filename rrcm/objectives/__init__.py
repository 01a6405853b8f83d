"""objectives: the losses that networks are trained on, one file per formula. README.md says how to add one."""

from rrcm.objectives.consistency import Consistency
from rrcm.objectives.contrastive import Contrastive
from rrcm.objectives.gaussian import Gaussian
from rrcm.objectives.macer import MACER
from rrcm.objectives.rrcm import RRCM
from rrcm.objectives.smoothadv import SmoothAdv
from rrcm.objectives.smoothmix import SmoothMix
from rrcm.objectives.stability import Stability

PRETRAINING = {"rrcm": RRCM, "contrastive": Contrastive}
FINETUNING = {
    "gaussian": Gaussian,
    "stability": Stability,
    "consistency": Consistency,
    "macer": MACER,
    "smoothadv": SmoothAdv,
    "smoothmix": SmoothMix,
}
