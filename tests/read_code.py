"""Imported by the server of forks: reads the code that stages identify their runs by, once for all stages.

Each stage hashes the syntax trees of some sixty modules, which takes a second. `rrcm.utils.code` keeps the hashes in
memory as long as the files are the same, and a forked stage inherits that memory.
"""

from rrcm.utils.code import fingerprints

STAGES = ("training.pretrain", "training.finetune", "training.denoiser", "certification.certify_cascade")
OBJECTIVES = ("rrcm", "consistency", "gaussian")  # of most tests; others are read when they are needed

fingerprints(*(f"rrcm.{name}" for name in STAGES), *(f"rrcm.objectives.{name}" for name in OBJECTIVES))
