"""A DeepSeek-V3 config -> the bytes that a forward pass leaves for its backward pass, operation by operation.

The lists below are what autograd keeps of the operations in deepseek_v3/, each storage once. On a CPU they are checked
against torch's allocator (benchmarks/plan.py). On CUDA the graph is the same but for FlexAttention, which needs no
padding of the heads; nothing there is measured. Left out: what a kernel needs inside itself.

Shapes as in deepseek_v3/: T tokens of a pass, C of them predicted, D hidden, H heads of N + P for queries and keys and
V for values, R latent rank, I width of a feed-forward, E experts, K of them a token. Bytes: 4 where fp32 stays in
force, w where autocast's type is (2 in bf16, otherwise 4).
"""

from dataclasses import dataclass

from transformers import DeepseekV3Config

from runtime.logprobs import CHUNK_ELEMENTS, MIN_ROWS


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What decides how wide things are."""

    bf16: bool
    """Autocast to bfloat16; the residual stream, norms' inputs and routers stay fp32."""
    cuda: bool

    @property
    def width(self) -> int:
        """w."""
        return 2 if self.bf16 else 4

    @property
    def grouped(self) -> bool:
        """Experts compute all at once, otherwise one after the other (deepseek_v3/moe.py)."""
        return self.cuda and self.bf16


def block_keeps(config: DeepseekV3Config, kernels: Kernels, *, dense: bool) -> float:
    """Bytes a token that one block keeps."""
    return _attention(config, kernels) + (_dense if dense else _mixture)(config, kernels)


def block_input(config: DeepseekV3Config) -> float:
    """Bytes a token that a checkpointed block keeps: the residual stream, fp32 in either precision."""
    return 4 * config.hidden_size


def _norm(config: DeepseekV3Config) -> float:
    """x and x / rms(x); its product with the weight is counted with the layers that take it in."""
    return 8 * config.hidden_size


def _taken_in(size: int, layers: int, kernels: Kernels) -> float:
    """The input of so many linear layers: one fp32 tensor for all, or under autocast a bf16 copy for each."""
    return 2 * layers * size if kernels.bf16 else 4 * size


def _latent(size: int, kernels: Kernels) -> float:
    """A low-rank latent and its norm: what it came from, x / rms(x), and their product with the weight."""
    return (4 + 2 + 2) * size if kernels.bf16 else (4 + 4 + 4) * size


def _attention(config: DeepseekV3Config, kernels: Kernels) -> float:
    w, H = kernels.width, config.num_attention_heads
    query, value = config.qk_head_dim, config.v_head_dim
    if not kernels.cuda:  # the CPU's kernel wants one head size: all four are filled up to it
        query = value = max(query, value)
    heads = w * H * (2 * query + 2 * value) + 4 * H  # q, k, v, the output, log-sum-exps
    if value != config.v_head_dim:
        heads += w * H * config.v_head_dim  # the output without its padding
    rope = 0 if kernels.bf16 else 4 * config.qk_rope_head_dim  # c_kv is kept as a part of [c_kv | k_rope]
    query_latent = 0 if config.q_lora_rank is None else _latent(config.q_lora_rank, kernels)
    return (
        _norm(config)
        + _taken_in(config.hidden_size, 2, kernels)
        + query_latent
        + _latent(config.kv_lora_rank, kernels)
        + rope
        + heads
    )


def _mlp(width: int, kernels: Kernels) -> float:
    """gate, up, silu(gate) and the product."""
    return kernels.width * 4 * width


def _dense(config: DeepseekV3Config, kernels: Kernels) -> float:
    taken_in = _taken_in(config.hidden_size, 2, kernels)
    return _norm(config) + taken_in + _mlp(config.intermediate_size, kernels)


def _mixture(config: DeepseekV3Config, kernels: Kernels) -> float:
    D, K = config.hidden_size, config.num_experts_per_tok
    I = config.moe_intermediate_size  # noqa: E741
    # Scores; chosen experts (int64), their gates, those normalised and those as they were; their sum.
    router = 4 * config.n_routed_experts + (8 + 3 * 4) * K + 4
    # At once, each token K times over: input, what the experts' MLPs keep, output; where each pair comes from and goes
    # (int64). One after the other, the products with W_gate and W_up, and the order of pairs.
    if kernels.grouped:
        experts = K * (kernels.width * (2 * D + 4 * I) + 16)
    else:
        experts = K * (kernels.width * 2 * I + 8)
    shared = _mlp(config.moe_intermediate_size * config.n_shared_experts, kernels)
    # Of the router's fp32 input: two for the shared expert, one for routed ones that don't keep it K times.
    copies = 2 * (2 if kernels.grouped else 3) * D if kernels.bf16 else 0
    return _norm(config) + 4 * D + router + experts + copies + shared


def working(config: DeepseekV3Config, kernels: Kernels, *, checkpointing: bool) -> float:
    """Bytes a token at the widest moment of a backward pass, beside what is kept.

    That is the final norm's, with three buffers of its size, or the last mixture's: with the gradients of each token's
    K outputs twice, or with its input's gradient, the output's, and one expert's rows. By then, unless the block was
    computed again just before, the norm's and the shared expert's tensors are free.
    """
    D, K = config.hidden_size, config.num_experts_per_tok
    norm = 3 * 4 * D
    if kernels.grouped:
        mixture = 2 * kernels.width * K * D
    else:
        rows = K / config.n_routed_experts
        mixture = 8 * D + kernels.width * rows * (2 * D + 5 * config.moe_intermediate_size)
    if checkpointing:
        return mixture + norm
    return max(norm, mixture - 8 * D - _mlp(config.moe_intermediate_size * config.n_shared_experts, kernels))


def attending(config: DeepseekV3Config, kernels: Kernels) -> float:
    """Bytes a token that a block holds when its attention runs, if nothing is kept for a backward pass.

    Under autocast rotated queries and keys are fp32 (cosines are), and then cast. The CPU's kernel gets copies filled
    up to one head size instead, and its output is copied into the row's.
    """
    w, H = kernels.width, config.num_attention_heads
    query, value, rope = config.qk_head_dim, config.v_head_dim, config.qk_rope_head_dim
    projected = w * H * (query + config.qk_nope_head_dim + value) + 4 * H * rope
    joined = 2 * H * query * (4 + 2 if kernels.grouped else 4)
    inside = w * H * (value if kernels.cuda else 5 * max(query, value))
    return projected + joined + inside + 4 * (config.hidden_size + config.kv_lora_rank + rope)


def mixing(config: DeepseekV3Config, kernels: Kernels) -> float:
    """The same when its experts run: the residual stream, their input and output, and what they compute of each."""
    w, D, K = kernels.width, config.hidden_size, config.num_experts_per_tok
    J = 2 * config.moe_intermediate_size
    inside = K * w * (2 * D + 2 * J) if kernels.grouped else K * w * J
    return 3 * 4 * D + w * D + inside


def outside_blocks(config: DeepseekV3Config) -> float:
    """Bytes a token that all blocks need: cosines and sines, ids."""
    return 4 * config.qk_rope_head_dim + 8


def final_norm(config: DeepseekV3Config) -> float:
    """Bytes a token that the last norm keeps, and the states it makes, which stay until the head is done with them."""
    return _norm(config)


def mtp_inputs(config: DeepseekV3Config, kernels: Kernels) -> float:
    """Bytes a token kept around the MTP layer: norms of its two inputs, both joined, its own norm before the head, and
    the next tokens' embeddings."""
    return 3 * _norm(config) + _taken_in(2 * config.hidden_size, 1, kernels) + 4 * config.hidden_size


# --- head -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Head:
    """Bytes of runtime/logprobs.py for C predicted tokens."""

    kept: float
    """Between forward and backward."""
    forward: float
    """Beside that, at the widest moment of the forward pass."""
    backward: float
    """The same of the backward pass, all gradients it has made included."""


def head(
    config: DeepseekV3Config, kernels: Kernels, *, predicted: int, summed: bool, frozen: bool, times: int = 1
) -> Head:
    """summed: gradients are taken in the forward pass (SFT), otherwise logits are computed twice (GRPO).

    frozen: the head's weights have no gradient. times: that it runs in a pass, twice with an MTP layer.
    """
    w, V, D = kernels.width, config.vocab_size, config.hidden_size
    bf16 = 2 if kernels.bf16 else 0
    elements = CHUNK_ELEMENTS["cuda" if kernels.cuda else "cpu"]
    chunk = V * min(max(elements // V, MIN_ROWS), predicted)
    states, gradient = predicted * D, 0 if frozen else 4 * V * D
    # A chunk's fp32 logits. In bf16 also those that matmuls take in and give, and the product that is added to the
    # fp32 gradient; on a CPU with the fp32 copy that adding makes.
    taking = (4 + bf16) * chunk + ((1 if kernels.cuda else 3) * bf16 * V * D if gradient else 0)
    if summed:
        # The fp32 states and, in bf16, copies of states and weight for the matmuls.
        return Head(
            kept=times * (w * states + gradient),
            forward=(4 + bf16) * states + bf16 * V * D + taking,
            backward=0,
        )
    return Head(
        kept=w * states + bf16 * V * D,
        # Logits, their exponentials, and the product of both that the entropy is summed from.
        forward=3 * 4 * chunk + 2 * bf16 * states,
        backward=w * states + gradient + taking,
    )
