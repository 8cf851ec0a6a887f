"""Multi-token prediction written out from the paper's equations, a token, a head and an expert at a time."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import deepseek_v3

T = 36
"""Beyond the 32 positions of the small model's original context, so that YaRN has a part in it."""


@pytest.fixture(scope="module")
def model(make):
    return make(num_nextn_predict_layers=1, q_lora_rank=20).double()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def rotated(x: Tensor, position: int, config) -> Tensor:
    """RoPE on neighbouring pairs, with YaRN's frequencies: fast ones as they are, slow ones divided by the factor."""
    rope, P = config.rope_parameters, len(x)

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns over the original context."""
        span = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return P * math.log(span) / (2 * math.log(rope["rope_theta"]))

    low, high = max(math.floor(pair_of(rope["beta_fast"])), 0), min(math.ceil(pair_of(rope["beta_slow"])), P - 1)
    out = []
    for j in range(P // 2):
        frequency = rope["rope_theta"] ** (-2 * j / P)
        slow = min(max((j - low) / (high - low), 0.0), 1.0)
        angle = position * (frequency * (1 - slow) + frequency / rope["factor"] * slow)
        a, b = x[2 * j], x[2 * j + 1]
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(out)


def attention(xs: list[Tensor], w, config) -> list[Tensor]:
    """MLA (eq. 1-11) of a sample's normalised inputs."""
    N, P, V, H, R = (
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.num_attention_heads,
        config.kv_lora_rank,
    )  # fmt: skip
    scale = (N + P) ** -0.5 * (0.1 * math.log(config.rope_parameters["factor"]) + 1) ** 2
    q_up = w("q_b_proj").view(H, N + P, -1)
    kv_up = w("kv_b_proj").view(H, N + V, R)
    queries, keys, values = [], [], []
    for i, x in enumerate(xs):
        c_q = rms_norm(w("q_a_proj") @ x, w("q_a_layernorm"))
        down = w("kv_a_proj_with_mqa") @ x
        c_kv, k_rope = rms_norm(down[:R], w("kv_a_layernorm")), rotated(down[R:], i, config)
        q = [q_up[h] @ c_q for h in range(H)]
        kv = [kv_up[h] @ c_kv for h in range(H)]
        queries.append([torch.cat([q[h][:N], rotated(q[h][N:], i, config)]) for h in range(H)])
        keys.append([torch.cat([kv[h][:N], k_rope]) for h in range(H)])
        values.append([kv[h][N:] for h in range(H)])
    outs = []
    for i in range(len(xs)):
        heads = []
        for h in range(H):
            p = torch.softmax(torch.stack([queries[i][h] @ keys[j][h] * scale for j in range(i + 1)]), dim=0)
            heads.append(sum(p[j] * values[j][h] for j in range(i + 1)))
        outs.append(w("o_proj") @ torch.cat(heads))
    return outs


def experts(x: Tensor, w, config) -> Tensor:
    """DeepSeekMoE with node-limited routing (eq. 12-16)."""
    E, per_group = config.n_routed_experts, config.n_routed_experts // config.n_group

    def ffn(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a = gate @ x
        return down @ (a * torch.sigmoid(a) * (up @ x))

    s = [torch.sigmoid(w("gate")[e] @ x) for e in range(E)]
    biased = [float(s[e].detach()) + float(w("bias")[e]) for e in range(E)]
    of_group = {g: range(g * per_group, (g + 1) * per_group) for g in range(config.n_group)}
    worth = {g: sum(sorted((biased[e] for e in of_group[g]), reverse=True)[:2]) for g in of_group}
    groups = sorted(worth, key=lambda g: -worth[g])[: config.topk_group]
    allowed = [e for g in groups for e in of_group[g]]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    out = ffn(*(w(f"shared_experts.{part}_proj") for part in ("gate", "up", "down")))
    for e in chosen:
        gate, up = w("experts.gate_up_proj")[e].chunk(2)
        out = out + s[e] / sum(s[k] for k in chosen) * config.routed_scaling_factor * ffn(
            gate, up, w("experts.down_proj")[e]
        )
    return out


def from_the_equations(model, h: list[Tensor], ids: list[int]) -> list[Tensor]:
    """Logits of t_{i+2} for i = 0 .. T − 3, from the main model's h_i (eq. 21-23)."""
    config = model.config
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = f"model.layers.{config.num_hidden_layers}."

    def weight(name: str) -> Tensor:
        return state[f"{prefix}{name}.weight"]

    def of_attention(name: str) -> Tensor:
        return weight(f"self_attn.{name}")

    def of_experts(name: str) -> Tensor:
        if name == "bias":
            return state[f"{prefix}mlp.gate.e_score_correction_bias"]
        return state[f"{prefix}mlp.{name}"] if name.startswith("experts.") else weight(f"mlp.{name}")

    xs = []
    for i in range(len(ids) - 1):
        embedded = rms_norm(state["model.embed_tokens.weight"][ids[i + 1]], weight("enorm"))
        xs.append(weight("eh_proj") @ torch.cat([embedded, rms_norm(h[i], weight("hnorm"))]))
    attended = attention([rms_norm(x, weight("input_layernorm")) for x in xs], of_attention, config)
    logits = []
    for x, a in zip(xs[:-1], attended, strict=False):
        x = x + a
        x = x + experts(rms_norm(x, weight("post_attention_layernorm")), of_experts, config)
        logits.append(state["lm_head.weight"] @ rms_norm(x, weight("shared_head.norm")))
    return logits


def test_logits_and_all_gradients_are_those_of_the_equations(model) -> None:
    """The main model's too: the loss reaches it through h and the shared embedding."""
    ids = torch.randint(64, (T,), generator=torch.Generator().manual_seed(3))
    inputs: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    got = model.lm_head(model.model(ids[None], output_mtp=True).mtp_hidden_state[0])[:-2]
    hook.remove()
    expected = torch.stack(from_the_equations(model, list(inputs[0]), ids.tolist()))
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    gradients = []
    for logits in (got, expected):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, ids[2:]).backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name, _ in model.named_parameters()} - {"model.norm.weight"}
    for name, gradient in gradients[1].items():
        limit = 1e-5 * max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(gradients[0][name], gradient, atol=limit, rtol=0, msg=name)


def test_the_parts_over_a_cache_say_the_same_token_by_token(model) -> None:
    """How a decoder runs the layer: h and the next token come in one at a time."""
    ids = torch.randint(64, (1, T), generator=torch.Generator().manual_seed(4))
    inputs: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected = model.model(ids, output_mtp=True).mtp_hidden_state[0]
    hook.remove()
    block, cache, states = model.model.mtp, DynamicCache(), []
    for i in range(T - 1):
        x_11D = block.combine(inputs[0][i], model.model.embed_tokens(ids[0, i + 1]))[None, None]
        cos, sin = model.model.rope(torch.tensor([[i]]), x_11D.dtype)
        x_11D = block.cached(x_11D, cos, sin, cache, torch.ones(1, 1, i + 1, dtype=torch.bool))
        states.append(block.shared_head["norm"](x_11D)[0, 0])
    torch.testing.assert_close(torch.stack(states), expected[:-1], atol=1e-5, rtol=0)


def test_a_checkpoint_of_671b_has_the_released_number_of_values() -> None:
    """684,531,386,000, with fp8 scales (a value for 128 × 128 weights) and the copies of embedding and head."""
    with torch.device("meta"):
        config = deepseek_v3.preset("671b", num_nextn_predict_layers=1)
        state = deepseek_v3.DeepseekV3ForCausalLM(config).state_dict()
    kept_in_bf16 = ("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight", "eh_proj.weight", "_bias")
    scales = 0
    for name, tensor in state.items():
        if not name.endswith(kept_in_bf16):
            *experts, rows, columns = tensor.shape
            scales += math.prod(experts) * math.ceil(rows / 128) * math.ceil(columns / 128)
    values = sum(tensor.numel() for tensor in state.values())
    assert (values, scales) == (671_026_404_352 + 14_848 + 11_610_068_224, 41_540_496)
    assert values + scales + 2 * config.vocab_size * config.hidden_size == 684_531_386_000


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side: str) -> None:
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    if side == "right":
        mask = mask.flip(1)
    padded = model.model(ids, attention_mask=mask, output_mtp=True).mtp_hidden_state
    for row, real in zip(range(2), mask.bool(), strict=True):
        alone = model.model(ids[row, real][None], output_mtp=True).mtp_hidden_state[0]
        torch.testing.assert_close(padded[row, real][:-1], alone[:-1], atol=1e-6, rtol=0)
