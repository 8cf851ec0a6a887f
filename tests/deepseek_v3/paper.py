"""DeepSeek-V3 written out from its equations, a token, a head and an expert at a time: slow, and no code of ours.

Equations are those of arXiv 2412.19437, YaRN's those of arXiv 2309.00071. Weights go by their names in a checkpoint,
experts one by one; the configuration is that of config.json. Everything is in float64, but the angle of a rotation,
as in every implementation, in float32: at position 131,071 that is off by up to 0.004.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]


class Weights:
    """Those whose names begin alike."""

    def __init__(self, all_of_them: Mapping[str, Tensor], prefix: str) -> None:
        self.all, self.prefix = all_of_them, prefix

    def __call__(self, name: str) -> Tensor:
        return self.all[f"{self.prefix}{name}"]

    def of(self, part: str) -> "Weights":
        return Weights(self.all, f"{self.prefix}{part}")


def model(
    weights: Mapping[str, Tensor], config: Config, ids: Sequence[int], positions: Sequence[int] | None = None
) -> tuple[Tensor, list[list["Choice"]]]:
    """Logits (tokens, vocabulary), and the experts of each layer that has some, token by token."""
    xs, choices = main_blocks(weights, config, ids, positions)
    norm, head = weights["model.norm.weight"], weights["lm_head.weight"]
    return torch.stack([head @ rms_norm(x, norm, config["rms_norm_eps"]) for x in xs]), choices


def mtp(
    weights: Mapping[str, Tensor], config: Config, ids: Sequence[int], positions: Sequence[int] | None = None
) -> Tensor:
    """Logits of token i + 2, in row i, for all tokens but the last (eq. 21-23).

    differs: the embedding stands before the state, as released weights have it.
    """
    h, _ = main_blocks(weights, config, ids, positions)
    positions = range(len(ids)) if positions is None else positions
    w, eps = Weights(weights, f"model.layers.{config['num_hidden_layers']}."), config["rms_norm_eps"]
    xs = []
    for i in range(len(ids) - 1):
        embedded = rms_norm(weights["model.embed_tokens.weight"][ids[i + 1]], w("enorm.weight"), eps)
        xs.append(w("eh_proj.weight") @ torch.cat([embedded, rms_norm(h[i], w("hnorm.weight"), eps)]))
    xs, _ = block(xs, positions[:-1], w, config, dense=False)
    return torch.stack([weights["lm_head.weight"] @ rms_norm(x, w("shared_head.norm.weight"), eps) for x in xs])


def main_blocks(
    weights: Mapping[str, Tensor], config: Config, ids: Sequence[int], positions: Sequence[int] | None
) -> tuple[list[Tensor], list[list["Choice"]]]:
    """States behind the last layer, before its norm; choices as in `model`."""
    positions = range(len(ids)) if positions is None else positions
    xs, choices = [weights["model.embed_tokens.weight"][i] for i in ids], []
    for layer in range(config["num_hidden_layers"]):
        dense = layer < config["first_k_dense_replace"]
        xs, chosen = block(xs, positions, Weights(weights, f"model.layers.{layer}."), config, dense=dense)
        if not dense:
            choices.append(chosen)
    return xs, choices


def block(
    xs: list[Tensor], positions: Sequence[int], w: Weights, config: Config, *, dense: bool
) -> tuple[list[Tensor], list["Choice"]]:
    """A layer: attention, then a plain FFN or experts, each of what is normalised and added to what came in."""
    mlp, eps = w.of("mlp."), config["rms_norm_eps"]
    normed = [rms_norm(x, w("input_layernorm.weight"), eps) for x in xs]
    xs = [x + a for x, a in zip(xs, attention(normed, positions, w.of("self_attn."), config), strict=True)]
    normed = [rms_norm(x, w("post_attention_layernorm.weight"), eps) for x in xs]
    if dense:
        return [x + ffn(u, mlp) for x, u in zip(xs, normed, strict=True)], []
    choices = [choose(u, mlp, config) for u in normed]
    return [x + experts(u, mlp, c) for x, u, c in zip(xs, normed, choices, strict=True)], choices


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square."""
    return x / (x @ x / len(x) + eps).sqrt() * weight


# --- attention --------------------------------------------------------------------------------------------------------


def attention(xs: Sequence[Tensor], positions: Sequence[int], w: Weights, config: Config) -> list[Tensor]:
    """MLA (eq. 1-11) of one sequence. The latents are normalised, as section 4.2 says."""
    N, P, V = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    H, R = config["num_attention_heads"], config["kv_lora_rank"]
    queries, keys, values = [], [], []
    for x, position in zip(xs, positions, strict=True):
        down = w("kv_a_proj_with_mqa.weight") @ x
        c_kv = rms_norm(down[:R], w("kv_a_layernorm.weight"))  # eq. 1
        k_rope = rotated(down[R:], position, config)  # eq. 3
        kv = w("kv_b_proj.weight") @ c_kv  # eq. 2 and 5
        if config["q_lora_rank"] is None:
            q = w("q_proj.weight") @ x
        else:
            q = w("q_b_proj.weight") @ rms_norm(w("q_a_proj.weight") @ x, w("q_a_layernorm.weight"))  # eq. 6-8
        queries.append([])
        keys.append([])
        values.append([])
        for h in range(H):
            q_h, kv_h = q[h * (N + P) : (h + 1) * (N + P)], kv[h * (N + V) : (h + 1) * (N + V)]
            queries[-1].append(torch.cat([q_h[:N], rotated(q_h[N:], position, config)]))  # eq. 9
            keys[-1].append(torch.cat([kv_h[:N], k_rope]))  # eq. 4
            values[-1].append(kv_h[N:])
    scale = attention_scale(config)
    outs = []
    for t in range(len(xs)):
        heads = []
        for h in range(H):
            scores = [scale * (queries[t][h] @ keys[j][h]) for j in range(t + 1)]
            total = sum(s.exp() for s in scores)
            heads.append(sum(s.exp() / total * values[j][h] for j, s in enumerate(scores)))  # eq. 10
        outs.append(w("o_proj.weight") @ torch.cat(heads))  # eq. 11
    return outs


def attention_scale(config: Config) -> float:
    """1/√(d_h + d_h^R), times YaRN's temperature squared: queries and keys are both scaled by it (its section 3.4)."""
    scale, rope = 1 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"]), config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        scale *= (0.1 * math.log(rope["factor"]) + 1) ** 2
    return scale


def frequencies(config: Config) -> list[float]:
    """Radians a position of each pair of channels. YaRN keeps those that make more than beta_fast turns within the
    original context, divides by the factor those of less than beta_slow, and goes over from one to the other."""
    P, rope = config["qk_rope_head_dim"], config["rope_parameters"]
    theta = rope["rope_theta"]
    plain = [theta ** (-2 * j / P) for j in range(P // 2)]
    if rope["rope_type"] == "default":
        return plain

    def pair_of(turns: float) -> float:
        return P * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair_of(rope["beta_fast"])), 0), min(math.ceil(pair_of(rope["beta_slow"])), P - 1)
    slow = [min(max((j - first) / (last - first), 0.0), 1.0) for j in range(P // 2)]
    return [f * (1 - s) + f / rope["factor"] * s for f, s in zip(plain, slow, strict=True)]


def rotated(x: Tensor, position: int, config: Config) -> Tensor:
    """RoPE: neighbouring channels are a point in a plane."""
    out = []
    for j, frequency in enumerate(frequencies(config)):
        angle = float(torch.tensor(float(position)) * torch.tensor(frequency))
        a, b = x[2 * j], x[2 * j + 1]
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(out)


# --- experts ----------------------------------------------------------------------------------------------------------


class Choice:
    """A token's experts."""

    def __init__(self, scores: list[Tensor], experts: list[int], gates: list[Tensor]) -> None:
        self.scores, self.experts, self.gates = scores, experts, gates


def choose(u: Tensor, w: Weights, config: Config) -> Choice:
    """Eq. 13-16, within the groups whose two best are the best together (section 2.1.2, node-limited routing)."""
    E, K = config["n_routed_experts"], config["num_experts_per_tok"]
    groups, kept = config["n_group"], config["topk_group"]
    s = [torch.sigmoid(w("gate.weight")[e] @ u) for e in range(E)]
    biased = [float(s[e].detach()) + float(w("gate.e_score_correction_bias")[e]) for e in range(E)]
    members = [range(g * E // groups, (g + 1) * E // groups) for g in range(groups)]
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: -worth[g])[:kept]
    chosen = sorted((e for g in best for e in members[g]), key=lambda e: -biased[e])[:K]
    total = sum(s[e] for e in chosen)
    return Choice(s, chosen, [s[e] / total * config["routed_scaling_factor"] for e in chosen])


def experts(u: Tensor, w: Weights, choice: Choice) -> Tensor:
    """Eq. 12 without its first term: shared experts, which are one wide one in a checkpoint, and the routed ones."""
    out = ffn(u, w.of("shared_experts."))
    for e, gate in zip(choice.experts, choice.gates, strict=True):
        out = out + gate * ffn(u, w.of(f"experts.{e}."))
    return out


def ffn(u: Tensor, w: Weights) -> Tensor:
    """W_down(silu(W_gate u) · W_up u)."""
    a = w("gate_proj.weight") @ u
    return w("down_proj.weight") @ (a * torch.sigmoid(a) * (w("up_proj.weight") @ u))


# --- balance ----------------------------------------------------------------------------------------------------------


def balance_loss(choices: Sequence[Choice], config: Config) -> Tensor:
    """Eq. 17-20 of one sequence and layer, without α. differs: counts where tokens went, not the best of s alone."""
    E, K, T = config["n_routed_experts"], config["num_experts_per_tok"], len(choices)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(E):
        f = E / (K * T) * sum(i in choice.experts for choice in choices)
        loss = loss + f * sum(choice.scores[i] / sum(choice.scores) for choice in choices) / T
    return loss


def moved_bias(bias: Sequence[float], choices: Sequence[Choice], speed: float) -> list[float]:
    """Section 2.1.2, auxiliary-loss-free: down by γ where an expert has more than its share of a step, else up."""
    loads = [sum(i in choice.experts for choice in choices) for i in range(len(bias))]
    share = sum(loads) / len(loads)
    return [b + speed * ((load < share) - (load > share)) for b, load in zip(bias, loads, strict=True)]
