"""A sampler in this process judges: a tiny model, taught in seconds to end in a verdict, is asked through it."""

import contextlib
import importlib.util

import pytest
import torch

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rewards.model_based.backends import Request
from rewards.model_based.judge import Judge, JudgeConfig
from rl import judge as rl_judge
from rl.judge import LocalJudge, open_backend
from sft.chat import encode_example

RIGHT = '"verdict": "right"}'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that calls everything right: after a few steps on a verdict that is one token of its tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([RIGHT])
    torch.manual_seed(0)
    model = deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer))
    assert len(tokenizer) <= model.config.vocab_size
    request = Judge(lambda requests: [], votes=1, matches="Match.")._request("q", "Paris", "Paris", 0)
    ids, _ = encode_example(tokenizer, request.messages, RIGHT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(12):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -3:-1]  # of the verdict and the end token
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-2:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(checkpoint, **options):
    judge = JudgeConfig(votes=1, matches="Match.", canaries=False)
    return LocalJudge(
        **{"model": checkpoint, "judge": judge, "backend": "native", "max_model_len": 1024, "max_tokens": 40,
           "temperature": 0.01} | options
    )  # fmt: skip


BACKENDS = [
    "native",
    pytest.param("vllm", marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampler_judges(checkpoint, backend):
    with contextlib.closing(open_backend(config(checkpoint, backend=backend))) as sampler:
        judge = Judge(sampler, votes=3, matches="Match.")
        found = judge.judge(["q", "Why?", "q"], ["Paris", "Lyon", ":"], ["Paris"] * 3)
    assert [verdict.reason for verdict in found] == ["judge/3-of-3", "judge/3-of-3", "hack/blank"]
    assert [verdict.outcome for verdict in found] == ["right", "right", "wrong"]


def test_cut_and_too_long_requests_get_no_vote(checkpoint):
    cut = Judge(open_backend(config(checkpoint, max_tokens=1)), votes=1, matches="Match.")
    assert cut.judge(["q"], ["Paris"], ["Paris"])[0].reason == "judge/unparsable"
    backend = open_backend(config(checkpoint))
    short, long = Request(system="s", user="u", seed=0), Request(system="s", user="u " * 1000, seed=0)
    replies = backend([long, short, long])
    assert [reply.text is None for reply in replies] == [True, False, True]
    assert replies[0].error == "too long for max_model_len=1024" and backend([long])[0].text is None


def test_reward_is_made_from_a_file(checkpoint, tmp_path):
    file = tmp_path / "judge.yaml"
    file.write_text(
        f"model: {checkpoint}\nbackend: native\nmax_tokens: 40\ntemperature: 0.01\nmax_model_len: 1024\n"
        "judge: {votes: 1, matches: Match., canaries: false}\n"
    )
    reward = rl_judge.reward(str(file))
    assert reward(prompts=["q"] * 2, completions=["Paris", ":"], answer=["Paris"] * 2) == [1.0, 0.0]


def test_settings_that_can_not_work_are_refused():
    with pytest.raises(ValueError, match="max_tokens=8192: leave room for a question"):
        LocalJudge(model="m", max_tokens=8192)
    with pytest.raises(ValueError, match=r"temperature=0\.0: more than 0, for votes=3 to differ"):
        LocalJudge(model="m", temperature=0.0)
