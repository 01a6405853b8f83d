"""What the selection samples of a cascade decide: the class, the path, and the claims that its certificate rests on.

They are independent of the estimation samples, so any choice is sound; a good one certifies more. The votes are given
by scale, the largest sigma first, as far as they are drawn: (C,) int64 for each, for the classes without "pass".
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import betaincinv, ndtri

from rrcm.certification.cascade_rules import BELOW, MULTI_SCALE, PASSED, CascadeRule, Claims, acceptance_claims
from rrcm.certification.margin import BINARY

NUM_DRAWS, LATTICE = 61, 38  # of the posterior; both prime to each other, in the ratio of the golden section
MIN_GAIN = 0.05  # radii of the grid that a smaller sigma must be expected to add at most, to be worth its samples


def selected_class(rule: CascadeRule, votes: Sequence[np.ndarray]) -> int | None:
    """The class that F answers if p_k(c) are the shares of the votes. None if a smaller sigma has to be asked."""
    for scale, counts in zip(reversed(rule.scales), votes, strict=False):
        top = int(np.argmax(counts))
        if scale.sigma * ndtri(_share(counts[top], rule.n0)) >= scale.threshold:
            return top
    return None


def choose_claims(rule: CascadeRule, votes: Sequence[np.ndarray], c: int) -> Claims | None:
    """The claims of the path with the largest expected worth for the class `c`. None to ask the next smaller sigma.

    The expectation is over p_k, given the selection votes (`draw_shares`): what n votes would certify, if they fell in
    these shares. A smaller sigma is asked only if it could raise the expected worth by MIN_GAIN.
    """
    claims, keep_out, published = [], [], rule.certificates == MULTI_SCALE
    path, above = np.full(NUM_DRAWS, -np.inf), np.full(NUM_DRAWS, np.inf)  # radii of the best path, and those above
    for depth, counts in enumerate(votes):
        k = len(rule.scales) - 1 - depth
        scale, drawn = rule.scales[k], Draws(rule, k, counts, c)
        accepted = max(
            dict.fromkeys(acceptance_claims(scale.threshold, test) for test in rule.tests), key=drawn.expect(above)
        )
        radii = np.minimum(above, drawn.radii(accepted))
        halts = scale.sigma * ndtri(_share(counts.max(), rule.n0)) >= scale.threshold
        if not claims or (halts if published else rule.worth(radii).mean() > rule.worth(path).mean()):
            path, claims = radii, [*((k, claim) for claim in accepted), *keep_out]
        if k == 0 or (published and halts):
            return claims
        alternatives = [(PASSED, BELOW)] if published else [(claim,) for claim in (BELOW, *rule.tests)]
        kept_out = max(alternatives, key=drawn.expect(above))
        keep_out = [*((k, claim) for claim in kept_out), *keep_out]
        above = np.minimum(above, drawn.radii(kept_out))
    n = rule.looks[-1]
    reach = float(rule.scales[k - 1].radius(BINARY, np.array(n), np.array([0]), n, rule.last_alpha))
    gain = rule.worth(np.maximum(path, np.minimum(above, reach))).mean() - rule.worth(path).mean()
    return claims if gain < MIN_GAIN and not published else None


class Draws:
    """Estimation votes that the selection votes of scale k lead to expect, NUM_DRAWS times."""

    def __init__(self, rule: CascadeRule, k: int, counts: np.ndarray, c: int):
        self.rule, self.scale, self.n = rule, rule.scales[k], rule.looks[-1]
        top, other = draw_shares(int(counts[c]), int(np.delete(counts, c).max()), rule.n0, k)
        self.top, self.others = self.n * top, self.n * other[:, None]

    def radii(self, claims: Sequence[str]) -> np.ndarray:
        """What all the claims say: (NUM_DRAWS,)."""
        at_n = self.top, self.others, self.n, self.rule.last_alpha
        return np.min([self.scale.radius(claim, *at_n) for claim in claims], axis=0)

    def expect(self, above: np.ndarray) -> Callable[[Sequence[str]], float]:
        """The expected worth of claims, in a path whose scales above have the radii `above` (NUM_DRAWS,)."""
        return lambda claims: float(self.rule.worth(np.minimum(above, self.radii(claims))).mean())


def draw_shares(top: int, other: int, n0: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a class with `top` votes of n0 and of one with `other`: two (NUM_DRAWS,).

    They represent the posterior distribution under a Dirichlet prior, which is Jeffreys' prior for the class against
    all others. They are not random but an evenly spread set, points of a lattice with two dimensions for each scale k.
    """
    points = [(np.arange(NUM_DRAWS) * pow(LATTICE, 2 * k + d, NUM_DRAWS) % NUM_DRAWS + 0.5) / NUM_DRAWS for d in (0, 1)]
    p_top = betaincinv(top + 0.5, n0 - top + 0.5, points[0])
    return p_top, (1 - p_top) * betaincinv(other + 0.25, n0 - top - other + 0.25, points[1])


def _share(count: int, n0: int) -> float:
    return (count + 0.5) / (n0 + 1)  # no class has probability 0 or 1
