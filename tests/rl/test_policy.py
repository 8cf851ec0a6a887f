"""The policy scores as the plain model does, its reference stays where it was put, and it saves what it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.batch import make_batch
from rl.config import GRPOConfig, LoraConfig
from rl.policy import Policy
from rl.types import Batch, Family, Sample
from runtime.adapters import ATTENTION_PROJECTIONS
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, load_tokenizer
from runtime.weights import save_pretrained

SEQUENCES = [[1, 40, 50, 60], [2, 70], [3, 80, 90, 100, 110]]


@pytest.fixture
def batch():
    return batch_of([([1, 2], [40, 41, 42]), ([3], [50])])


def batch_of(rows) -> Batch:
    return make_batch(
        [
            Family(prompt=prompt, samples=[Sample(ids=ids, logprobs=[0.0] * len(ids), advantage=1.0)])
            for prompt, ids in rows
        ]
    )


def plain(policy: Policy, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logp = (policy.causal_lm(input_ids=torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def move(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)


def test_score_is_the_plain_models_at_temperature_1_whatever_the_rollouts(make_policy):
    policy = make_policy(temperature=0.5)
    for scores, ids in zip(policy.score(SEQUENCES), SEQUENCES, strict=True):
        torch.testing.assert_close(torch.tensor(scores), plain(policy, ids), rtol=0, atol=1e-5)


def test_logprobs_are_at_the_sampling_temperature(make_policy):
    policy = make_policy(temperature=0.5)
    with torch.no_grad():
        logprobs_C, _ = policy.logprobs(batch_of([(ids[:1], ids[1:]) for ids in SEQUENCES]))
    expected = torch.cat([plain(policy, ids, 0.5) for ids in SEQUENCES])
    torch.testing.assert_close(logprobs_C, expected, rtol=0, atol=1e-5)


def test_a_loaded_policy_is_deterministic_and_ready(make_policy):
    policy = make_policy()
    assert not policy.model.training
    assert policy.score(SEQUENCES) == policy.score(SEQUENCES)


def test_without_kl_there_is_no_reference(make_policy, batch):
    policy = make_policy(beta=0.0)
    assert policy.reference is None
    assert policy.reference_logprobs(batch) is None


def test_the_reference_stays_until_it_is_replaced(make_policy, batch):
    policy = make_policy(beta=0.04, temperature=0.7)

    def reference() -> torch.Tensor:
        return policy.reference_logprobs(batch)

    def current() -> torch.Tensor:
        with torch.no_grad():
            return policy.logprobs(batch)[0]

    first = reference()
    assert torch.equal(first, current())
    move(policy)
    assert torch.equal(reference(), first) and not torch.equal(current(), first)
    policy.replace_reference()
    assert torch.equal(reference(), current())
    assert not any(p.requires_grad for p in policy.reference.parameters())
    assert all(p.requires_grad for p in policy.model.parameters())
    before = reference()
    move(policy)
    assert torch.equal(reference(), before)


def test_adapters_start_as_nothing_and_come_off_for_the_reference(make_policy, batch):
    policy, base = make_policy(lora=LoraConfig(rank=2), beta=0.04), make_policy()
    assert policy.score(SEQUENCES) == base.score(SEQUENCES)
    reference = policy.reference_logprobs(batch)
    move(policy)
    assert policy.score(SEQUENCES) != base.score(SEQUENCES)
    assert torch.equal(policy.reference_logprobs(batch), reference)
    assert policy.score(SEQUENCES) != base.score(SEQUENCES)  # and they are on again


def test_adapters_are_on_every_attention_projection_and_nothing_else_learns(make_policy):
    policy = make_policy(lora=LoraConfig(rank=2))
    learning = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    present = {name.rsplit(".", 1)[-1] for name, _ in policy.causal_lm.named_modules()} & set(ATTENTION_PROJECTIONS)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in learning} == present
    assert {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} <= present


def test_the_seed_decides_the_adapters_first_values(tiny_folder):
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        policy = Policy(GRPOConfig(model=str(tiny_folder), lora=LoraConfig(rank=2), seed=seed), World())
        return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}

    one, again, other = adapters(0), adapters(0), adapters(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_what_is_saved_is_what_was_trained(make_policy, tmp_path: Path, lora):
    policy = make_policy(lora=lora)
    move(policy)
    save_pretrained(tmp_path / "new" / "folder", policy.model, policy.tokenizer)
    folder = tmp_path / "new" / "folder"
    again = load_causal_lm(folder)
    with torch.no_grad():
        for ids in SEQUENCES:
            expected = policy.model(input_ids=torch.tensor([ids])).logits
            got = again(input_ids=torch.tensor([ids])).logits
            if lora is None:
                assert torch.equal(got, expected)
            else:
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name or "base_layer" in name]
    assert load_tokenizer(folder).chat_template == policy.tokenizer.chat_template
    assert again.generation_config.eos_token_id == policy.causal_lm.generation_config.eos_token_id


def test_a_model_without_an_end_token_is_refused(tiny_folder, tmp_path):
    load_causal_lm(tiny_folder).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token, so no completion could end"):
        Policy(GRPOConfig(model=str(tmp_path)), World())


def test_a_missing_model_is_named():
    with pytest.raises(UserError, match=r"model='\./nowhere': no such folder"):
        Policy(GRPOConfig(model="./nowhere"), World())


def test_attention_names_no_model_has_are_refused_with_the_remedy():
    from transformers import GPT2Config, GPT2LMHeadModel

    from runtime.adapters import add_adapters

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match=r"lora\.target_modules='attention': .*name its modules instead"):
        add_adapters(model, LoraConfig(), 0)
    adapted = add_adapters(model, LoraConfig(rank=2, target_modules=("c_attn",)), 0)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


def test_a_tokenizer_with_ids_the_model_has_no_embedding_for_is_refused(tiny_folder, tmp_path):
    load_causal_lm(tiny_folder).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(512 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    Policy(GRPOConfig(model=str(tmp_path)), World())
    tokenizer.add_tokens(["<one too many>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has ids up to 512, its vocab_size is 512"):
        Policy(GRPOConfig(model=str(tmp_path)), World())
