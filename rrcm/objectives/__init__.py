"""objectives: the losses that networks are trained on, one file per formula. README.md says how to add one."""

from rrcm.utils.registry import Registry

PRETRAINING = Registry(
    {
        "rrcm": "rrcm.objectives.rrcm:RRCM",
        "rrcm_without_contrastive": ("rrcm.objectives.rrcm:RRCM", {"contrastive": False}),
        "rrcm_without_consistency": "rrcm.objectives.contrastive:Contrastive",
        "rrcm_independent_noise": ("rrcm.objectives.rrcm:RRCM", {"same_noise": False}),
        "rrcm_constant_levels": ("rrcm.objectives.rrcm:RRCM", {"constant_levels": True}),
        "moco_v3": "rrcm.objectives.moco_v3:MoCoV3",
        "dmae": "rrcm.objectives.dmae:DMAE",
        "dmae_without_mask": ("rrcm.objectives.dmae:DMAE", {"masked": False}),
        "rrcm_dmae": "rrcm.objectives.rrcm_dmae:RRCMDMAE",
    }
)
FINETUNING = Registry(
    {
        "gaussian": "rrcm.objectives.gaussian:Gaussian",
        "stability": "rrcm.objectives.stability:Stability",
        "consistency": "rrcm.objectives.consistency:Consistency",
        "macer": "rrcm.objectives.macer:MACER",
        "smoothadv": "rrcm.objectives.smoothadv:SmoothAdv",
        "smoothmix": "rrcm.objectives.smoothmix:SmoothMix",
        "cat_rs": "rrcm.objectives.cat_rs:CATRS",
        "distill": "rrcm.objectives.distill:Distill",
    }
)
