"""A config -> every tensor that a checkpoint of it holds: name, shape and dtype, as Hugging Face and as DeepSeek do.

The model itself, built on the meta device, is asked, so there's no second list of names to keep. Two layouts:

- Hugging Face's: the released names, experts one by one, any number of files.
- The official inference code's (DeepSeek-V3 `inference/convert.py`): shorter names, one file for each of N ranks.
  Of N ranks each holds E/N whole experts and 1/N of embedding, head, heads and dense FFNs; the rest is on every rank.
  The official converter leaves the MTP layer out; here it keeps the released names where the official has none.

Left out: UE8M0 scales in a dtype of their own, and blocks other than 128×128.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DeepseekV3Config

from deepseek_v3.fp8.reference import BLOCK, blocks
from deepseek_v3.model import DeepseekV3ForCausalLM
from deepseek_v3.mtp import prediction_depth


class CheckpointFault(ValueError):
    """Something a checkpoint lacks or has too much of; the message names it, its file and the remedy."""


@dataclass(frozen=True)
class Expected:
    """A tensor that belongs to a checkpoint."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """What it may be, as safetensors spells it; the first is what conversions write."""
    optional: bool = False
    """It repeats another tensor: released files hold it, transformers' don't."""


@dataclass(frozen=True)
class Placed:
    """Where the official layout has a tensor."""

    name: str
    ranks: range
    """Which ranks hold it, or a part of it."""
    dim: int | None
    """The dimension along which ranks have a part each; None: each has all of it."""

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return tuple(size // len(self.ranks) if d == self.dim else size for d, size in enumerate(shape))


def scale_of(weight: str) -> str:
    """X.weight -> X.weight_scale_inv: what its 128×128 blocks are multiplied by."""
    return f"{weight}_scale_inv"


def expected_tensors(config: DeepseekV3Config, *, fp8: bool) -> dict[str, Expected]:
    """Hugging Face name -> tensor, in the model's order; with `fp8` linear weights are 8 bits and have scales.

    Norms, router, embedding, head and the MTP layer's eh_proj stay in higher precision, the routing bias in fp32.
    """
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors: dict[str, Expected] = {}
    for fused, tensor in model.state_dict().items():
        for name, shape in _unfused(fused, tuple(tensor.shape)):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            quantised = name in linear or ".experts." in name
            if fp8 and quantised and not name.endswith(("lm_head.weight", "eh_proj.weight")):
                tensors[name] = Expected(shape, ("F8_E4M3",))
                tensors[scale_of(name)] = Expected(tuple(map(blocks, shape)), ("F32",))
            else:
                bias = name.endswith("e_score_correction_bias")
                tensors[name] = Expected(shape, ("F32",) if bias else ("BF16", "F32"))
    if prediction_depth(config):
        layer = f"model.layers.{config.num_hidden_layers}"
        for copy in ("embed_tokens", "shared_head.head"):
            shape = (config.vocab_size, config.hidden_size)
            tensors[f"{layer}.{copy}.weight"] = Expected(shape, ("BF16", "F32"), optional=True)
    return tensors


def _unfused(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Experts are one parameter in the model and many tensors in a checkpoint."""
    layer, fused, kind = name.partition(".experts.")
    if not fused:
        return [(name, shape)]
    E, rows, columns = shape
    parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    return [(f"{layer}.experts.{e}.{part}.weight", (rows // len(parts), columns)) for e in range(E) for part in parts]


# Hugging Face's part of a name -> the official one, and the dimension that ranks share out.
_OFFICIAL: dict[str, tuple[str, int | None]] = {
    "self_attn": ("attn", None),
    "mlp": ("ffn", None),
    "weight_scale_inv": ("scale", None),
    "e_score_correction_bias": ("bias", None),
    "embed_tokens": ("embed", 0),
    "lm_head": ("head", 0),
    "head": ("head", 0),  # the MTP layer's copy
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
}


def official_layout(config: DeepseekV3Config, expected: Mapping[str, Expected], ranks: int) -> dict[str, Placed]:
    """Hugging Face name -> name, ranks and division in the official files of `ranks` ranks."""
    E, heads = config.n_routed_experts, config.num_attention_heads
    if ranks < 1 or E % ranks or heads % ranks:
        raise CheckpointFault(
            f"model_parallel={ranks}: {E} experts and {heads} heads can't be shared out equally; use a divisor of both"
        )
    return {name: _placed(name, expected, ranks, E // ranks) for name in expected}


def _placed(name: str, expected: Mapping[str, Expected], ranks: int, experts_per_rank: int) -> Placed:
    parts = name.removeprefix("model.").split(".")
    official = ".".join(_OFFICIAL.get(part, (part, None))[0] for part in parts)
    if "experts" in parts:
        owner = int(parts[parts.index("experts") + 1]) // experts_per_rank
        return Placed(official, range(owner, owner + 1), None)
    dim = _OFFICIAL.get(parts[-2], ("", None))[1]
    if dim is not None:
        size = expected[name].shape[dim]
        unit = BLOCK if ranks > 1 and scale_of(name) in expected else 1
        if size % (ranks * unit):
            whole = f", in whole blocks of {unit}" if unit > 1 else ""
            raise CheckpointFault(
                f"model_parallel={ranks}: the {size} {'columns' if dim else 'rows'} of {name} can't be shared out "
                f"equally{whole}; use fewer ranks{' or convert to bf16 first' if unit > 1 else ''}"
            )
    return Placed(official, range(ranks), dim)
