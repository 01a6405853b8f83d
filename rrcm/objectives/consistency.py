"""TODO docstring."""

import torch
import torch.nn.functional as F


def consistency_regularizer(
    logits: torch.Tensor, consistency_weight: float = 10.0, entropy_weight: float = 0.5
) -> torch.Tensor:
    """lambda * mean_i KL(pbar || p_i) + eta * H(pbar) over noisy copies (Jeong & Shin 2020, eqs. 6 and 8).

    logits (m, B, K), m noisy copies of B images -> (B,) float32. pbar is the mean of the m softmax outputs.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    mean = log_p.exp().mean(0)
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    entropy = -(mean * log_mean).sum(-1)
    divergence = -entropy - (mean * log_p).sum(-1).mean(0)  # mean_i KL(pbar || p_i)
    return consistency_weight * divergence + entropy_weight * entropy
