"""objectives: the losses that networks are trained on, one file per formula. README.md says how to add one."""

from rrcm.objectives.consistency import Consistency
from rrcm.objectives.contrastive import Contrastive
from rrcm.objectives.gaussian import Gaussian
from rrcm.objectives.rrcm import RRCM

PRETRAINING = {"rrcm": RRCM, "contrastive": Contrastive}
FINETUNING = {"gaussian": Gaussian, "consistency": Consistency}
