"""Group rewards -> advantages: what each completion earned beyond its siblings.

Unknown rewards (NaN) leave the group: they shift neither mean nor std and get no advantage (NaN). In every variant
equal rewards give exactly 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-4


def grpo(centred_PG: Tensor, count_P1: Tensor) -> Tensor:
    """(r − mean) / (std + 1e-4): DeepSeekMath (arXiv 2402.03300), 4.1.2. N − 1 and 1e-4 are TRL's."""
    std_P1 = (centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
    return centred_PG / (std_P1 + EPS)


def dr_grpo(centred_PG: Tensor, count_P1: Tensor) -> Tensor:
    """r − mean: Dr. GRPO (arXiv 2503.20783), section 3.2. A std would favour very easy and hard prompts."""
    return centred_PG


def rloo(centred_PG: Tensor, count_P1: Tensor) -> Tensor:
    """r − mean of the others (arXiv 2402.14740, section 2.2) = (r − mean) · N / (N − 1): the gradient is unbiased."""
    return centred_PG * count_P1 / (count_P1 - 1).clamp(min=1)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def group_advantages(rewards_PG: Tensor, kind: str = "grpo") -> Tensor:
    """Advantages (P, G) of rewards (P, G); NaN where the reward is unknown, 0 where a group's rewards are equal."""
    known_PG = ~rewards_PG.isnan()
    count_P1 = known_PG.sum(1, keepdim=True).clamp(min=1)
    mean_P1 = rewards_PG.nansum(1, keepdim=True) / count_P1
    # Equal rewards must give exactly zero: 7 × 0.35 has a mean that is not 0.35, and 1e-17 / 1e-21 is not small.
    nothing_PG = ~known_PG | zero_variance(rewards_PG)[:, None]
    centred_PG = (rewards_PG - mean_P1).masked_fill(nothing_PG, 0.0)
    return ADVANTAGES[kind](centred_PG, count_P1).masked_fill(~known_PG, float("nan"))


def zero_variance(rewards_PG: Tensor) -> Tensor:
    """(P,) True where a group teaches nothing: all known rewards are equal, or fewer than two are known."""
    high = rewards_PG.nan_to_num(nan=-torch.inf).amax(1)
    low = rewards_PG.nan_to_num(nan=torch.inf).amin(1)
    return high <= low
