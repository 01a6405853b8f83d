"""Make the stopping rule from its settings."""

from dataclasses import replace

from rrcm.certification.margin import MarginRule
from rrcm.certification.stopping import (
    BOUNDS,
    STOPPING,
    StoppingRule,
    certifies_nothing,
    fixed_sample,
    group_sequential,
)
from rrcm.utils.arguments import shown
from rrcm.utils.errors import RRCMError


def make_stopping_rule(
    stopping: str, sigma: float, *, n0: int, n: int, alpha: float, radius_step: float, bound: str = "binary"
) -> StoppingRule:
    """The rule named "fixed" or "sequential", with a bound of BOUNDS. "fixed" ignores `radius_step`.

    Raises `RRCMError` for bad settings, and if n votes of n certify nothing.
    """
    for name, value, allowed in (("bound", bound, BOUNDS), ("stopping", stopping, STOPPING)):
        if not isinstance(value, str) or value not in allowed:
            raise RRCMError(f"{name} = {shown(value)}: must be {' or '.join(allowed)}")
    if stopping == "fixed":
        rule = fixed_sample(sigma, n0=n0, n=n, alpha=alpha)
    else:
        rule = group_sequential(sigma, n0=n0, n=n, alpha=alpha, radius_step=radius_step)
    rule = replace(rule, bound=bound)
    if bound == "margin" and not MarginRule(rule).can_certify():
        raise certifies_nothing(n, alpha, "set n higher, or bound to binary")
    return rule
