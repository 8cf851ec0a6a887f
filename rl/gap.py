"""Trainer's and sampler's log-probs of the same tokens -> how far they lie apart, and what correcting for it leaves.

A correction that silently drops long answers trains a model to be brief, so both what is kept and the effective
sample size are reported by length, and a run in which too little is left stops.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rl.config import GRPOConfig
from rl.loss import LossInputs, importance_weights
from runtime.distributed import World

MIN_COMPLETIONS = 20
"""Fewer in a tenth of a rollout say nothing about its length."""


class SamplerGap(RuntimeError):
    """The sampler's log-probs are too far from the trainer's to learn from its samples."""


def check_gap(inputs: Sequence[LossInputs], config: GRPOConfig, world: World) -> dict[str, float]:
    """The gap's metrics over all processes; raises SamplerGap where it is beyond `sampling.gap_limit` or the
    correction leaves less than `loss.importance_floor`."""
    table = _gather([_per_completion(x, config) for x in inputs], world)
    if not len(table):
        return {"sampling/logp_gap/mean": 0.0, "sampling/logp_gap/max": 0.0}
    mean, largest = table[:, GAP].sum() / table[:, LENGTH].sum(), table[:, LARGEST].max()
    if not mean <= config.sampling.gap_limit:  # a NaN fails too
        raise SamplerGap(
            f"sampling.gap_limit={config.sampling.gap_limit}: mean |log π_trainer − log π_sampler| of this rollout is "
            f"{mean:.3g} nats per token (max {largest:.3g}). The sampler and the trainer disagree about the same "
            "weights: compare sampling.dtype with precision, or use sampling.backend=native; raise the limit only if "
            "you know why"
        )
    metrics = {"sampling/logp_gap/mean": float(mean), "sampling/logp_gap/max": float(largest)}
    tenths = np.array_split(table[table[:, LENGTH].argsort(kind="stable")], 10) if len(table) >= 10 else []
    for name, part in (("", table), *((f"/length_{i + 1:02d}", tenth) for i, tenth in enumerate(tenths))):
        shares = {"kept": _kept(part), "effective_sample_size": _effective(part)}
        metrics |= {f"sampling/{what}{name}": share for what, share in shares.items()}
        if config.loss.importance != "none" and (not name or len(part) >= MIN_COMPLETIONS):
            _check_floor(shares, part, config)
    return metrics


def _check_floor(shares: dict[str, float], part: np.ndarray, config: GRPOConfig) -> None:
    for what, share in shares.items():
        if share < config.loss.importance_floor:
            lengths = part[:, LENGTH]
            raise SamplerGap(
                f"loss.importance_floor={config.loss.importance_floor}: of the {len(part)} completions of "
                f"{lengths.min():.0f} to {lengths.max():.0f} tokens, loss.importance={config.loss.importance} leaves a "
                f"{what.replace('_', ' ')} of {share:.3g}. Sampler and trainer disagree too much at this length: use "
                "token_truncate, raise loss.importance_cap, or bring sampling.dtype and precision together"
            )


# Columns of what is gathered, one row a completion. A unit is what has a weight: a token, or the whole completion.
LENGTH, GAP, LARGEST, UNITS, KEPT, WEIGHT, WEIGHT_SQUARED = range(7)


def _per_completion(x: LossInputs, config: GRPOConfig) -> Tensor:
    gap = (x.old - x.sampler).abs().double()
    unit = x.whole() if config.loss.objective == "sequence" or config.loss.importance.startswith("sequence") else x
    log_w = unit.old - unit.sampler
    w = importance_weights(unit, config.loss).double() if config.loss.importance != "none" else log_w.double().exp()
    kept = (log_w <= np.log(config.loss.importance_cap)).double()
    largest = torch.zeros(len(x.lengths), dtype=gap.dtype, device=gap.device)
    largest = largest.scatter_reduce(0, x.sequence, gap, "amax")
    sums = (torch.ones_like(w), kept, w, w.square())
    columns = [x.lengths.double(), x.summed(gap), largest, *(unit.summed(values) for values in sums)]
    return torch.stack(columns, dim=1).cpu()


def _gather(tables: Sequence[Tensor], world: World) -> np.ndarray:
    own = torch.cat(list(tables)).tolist() if tables else []
    return np.array(world.gather(own)).reshape(-1, 7)


def _kept(part: np.ndarray) -> float:
    return float(part[:, KEPT].sum() / part[:, UNITS].sum())


def _effective(part: np.ndarray) -> float:
    """(Σw)² / (n Σw²): the share of samples that equally weighted ones would be worth."""
    w, w2, n = (part[:, column].sum() for column in (WEIGHT, WEIGHT_SQUARED, UNITS))
    return float(w * w / (n * w2)) if w2 else 0.0
