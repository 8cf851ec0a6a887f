"""Group rewards -> advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

A_i = (r_i − mean(r)) / (std(r) + 1e-4) over the known rewards of the group, std with N − 1 as TRL takes it.
Unknown rewards (NaN) leave the group: they shift neither mean nor std and get no advantage (NaN).
"""

import torch
from torch import Tensor

EPS = 1e-4


def group_advantages(rewards_PG: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """Advantages (P, G) of rewards (P, G); NaN where the reward is unknown, 0 where a group's rewards are equal."""
    known_PG = ~rewards_PG.isnan()
    count_P1 = known_PG.sum(1, keepdim=True).clamp(min=1)
    mean_P1 = rewards_PG.nansum(1, keepdim=True) / count_P1
    centred_PG = (rewards_PG - mean_P1).masked_fill(~known_PG, 0.0)
    # Equal rewards must give exactly zero: 7 × 0.35 has a mean that is not 0.35, and 1e-17 / 1e-21 is not small.
    centred_PG = centred_PG.masked_fill(zero_variance(rewards_PG)[:, None], 0.0)
    if scale_by_std:
        std_P1 = (centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
        centred_PG = centred_PG / (std_P1 + EPS)
    return centred_PG.masked_fill(~known_PG, float("nan"))


def zero_variance(rewards_PG: Tensor) -> Tensor:
    """(P,) True where a group teaches nothing: all known rewards are equal, or fewer than two are known."""
    high = rewards_PG.nan_to_num(nan=-torch.inf).amax(1)
    low = rewards_PG.nan_to_num(nan=torch.inf).amin(1)
    return high <= low
