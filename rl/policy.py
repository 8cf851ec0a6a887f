"""The model being trained, the reference it may be held to, and the sampler that speaks for it."""

import contextlib
import copy
import importlib.util
import logging
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.config import GRPOConfig, LoraConfig
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import Packed, pack, packed_logprobs
from runtime.weights import checkpoint_tensors
from sampling.protocol import Sampler

log = logging.getLogger(__name__)

ATTENTION_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)


CANARY_TOKENS = 128
"""Length of the sequences that attest a sync: several blocks of a prefix cache."""


class Policy:
    """π_θ: the trained model with its tokenizer, and π_ref when the loss wants one."""

    def __init__(self, config: GRPOConfig, world: World) -> None:
        """Load `config.model`; with LoRA, freeze it and add adapters."""
        self.config, self.world = config, world
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        base = load_causal_lm(config.model).to(world.device)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"model={config.model!r}: its tokenizer has no end token, so no completion could end")
        self.model: nn.Module = base if config.lora is None else add_adapters(base, config.lora, config.seed)
        self.model.eval()  # no dropout: π_old and π_θ must be the same function
        self.reference: nn.Module | None = None
        if config.loss.beta > 0 and config.lora is None:
            self.replace_reference()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, under the adapters if there are any."""
        return self.model.get_base_model() if self.config.lora else self.model  # type: ignore[operator, return-value]

    def logprobs(self, packed: Packed, *, only_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log π_θ and entropy at the sampling temperature, (T,) each."""
        with self.world.autocast():
            return packed_logprobs(self.model, packed, temperature=self.config.sampling.temperature, only_T=only_T)

    @torch.no_grad()
    def reference_logprobs(self, packed: Packed, *, only_T: Tensor) -> Tensor | None:
        """log π_ref (T,), or None at β = 0. Under LoRA the reference is the model with its adapters off."""
        if self.config.loss.beta == 0:
            return None
        off = contextlib.nullcontext() if self.reference else self.model.disable_adapter()  # type: ignore[operator]
        with off, self.world.autocast():
            model = self.reference or self.model
            temperature = self.config.sampling.temperature
            return packed_logprobs(model, packed, temperature=temperature, only_T=only_T)[0]

    def replace_reference(self) -> None:
        """Freeze a copy of the policy as it is now."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π(token_t | before), t = 1.., at temperature 1: the trainer's side of the attestation."""
        packed = pack(sequences, self.world.device)
        with self.world.autocast():
            logprobs = packed_logprobs(self.model, packed)[0].tolist()
        return [logprobs[start + 1 : end] for start, end in pairwise(packed.cu_seqlens)]

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that transformers and vLLM load as it is; adapters are merged in."""
        from huggingface_hub import save_torch_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().clone() for name, tensor in checkpoint_tensors(self.model)}
        save_torch_state_dict(weights, folder)
        self.causal_lm.config.save_pretrained(folder)
        self.causal_lm.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def add_adapters(base: PreTrainedModel, lora: LoraConfig, seed: int) -> nn.Module:
    """LoRA on the named modules; the base is frozen. Adapters start as zero, so π is unchanged."""
    import peft

    base.requires_grad_(False)
    targets = list(lora.target_modules)
    if lora.target_modules == "attention":
        present = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        targets = [name for name in ATTENTION_PROJECTIONS if name in present]
        if not targets:
            raise UserError(
                "lora.target_modules='attention': the model has none of "
                f"{', '.join(ATTENTION_PROJECTIONS)}; name its modules instead"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))


def make_sampler(policy: Policy, config: GRPOConfig) -> Sampler:
    """The backend the config asks for; "auto" takes vLLM where it is installed and one process is running."""
    backend, world = config.sampling.backend, policy.world
    if backend == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        backend = "vllm" if installed and world.size == 1 else "native"
        why = "" if installed else " (vllm is not installed)"
        log.info("sampling.backend: %s%s", backend, why if world.size == 1 else " (several processes)")
    if backend == "native":
        from sampling.native import NativeSampler

        return NativeSampler(policy.causal_lm if config.lora is None else load_causal_lm(config.model))
    if world.size > 1:
        raise UserError(
            f"sampling.backend='vllm': an engine inside each of {world.size} processes is not supported; "
            "use sampling.backend=native, or one process"
        )
    from sampling.vllm_sampler import VLLMSampler

    sampling, model_config = config.sampling, policy.causal_lm.config
    # The engine needs the architecture only; its weights come by sync.
    with tempfile.TemporaryDirectory() as folder:
        model_config.save_pretrained(folder)
        return VLLMSampler(
            folder,
            dtype=sampling.dtype,
            max_model_len=min(
                max(sampling.max_prompt_tokens + sampling.max_tokens, CANARY_TOKENS + 1),
                model_config.max_position_embeddings,
            ),
            seed=config.seed,
        )
