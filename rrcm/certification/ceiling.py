"""The largest radius that a number of samples can certify."""

from scipy.special import ndtri


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """sigma Phi^-1(alpha^(1/n)): the radius if all `n` samples vote for one class, in the unit of `sigma`.

    With n votes of n the Clopper-Pearson lower bound on the probability of the class is alpha^(1/n) (Cohen et al. 2019,
    section 3.2.2). Where it is below 1/2, nothing is certified, and the radius is 0. A sequential rule and a cascade
    spend alpha on several tests, so their largest radius is a little smaller.
    """
    return max(0.0, sigma * float(ndtri(alpha ** (1 / n))))
