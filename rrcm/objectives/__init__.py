"""objectives: the losses that networks are trained on, one file per formula. README.md says how to add one."""

from functools import partial

from rrcm.objectives.cat_rs import CATRS
from rrcm.objectives.consistency import Consistency
from rrcm.objectives.contrastive import Contrastive
from rrcm.objectives.denoising import Denoising
from rrcm.objectives.dmae import DMAE
from rrcm.objectives.gaussian import Gaussian
from rrcm.objectives.macer import MACER
from rrcm.objectives.moco_v3 import MoCoV3
from rrcm.objectives.rrcm import RRCM
from rrcm.objectives.rrcm_dmae import RRCMDMAE
from rrcm.objectives.smoothadv import SmoothAdv
from rrcm.objectives.smoothmix import SmoothMix
from rrcm.objectives.stability import Stability

PRETRAINING = {
    "rrcm": RRCM,
    "rrcm_without_contrastive": partial(RRCM, contrastive=False),
    "rrcm_without_consistency": Contrastive,
    "rrcm_independent_noise": partial(RRCM, same_noise=False),
    "rrcm_constant_levels": partial(RRCM, constant_levels=True),
    "moco_v3": MoCoV3,
    "dmae": DMAE,
    "rrcm_dmae": RRCMDMAE,
}
FINETUNING = {
    "gaussian": Gaussian,
    "stability": Stability,
    "consistency": Consistency,
    "macer": MACER,
    "smoothadv": SmoothAdv,
    "smoothmix": SmoothMix,
    "cat_rs": CATRS,
}

__all__ = ["FINETUNING", "PRETRAINING", "Denoising"]
