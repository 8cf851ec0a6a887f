"""The judge against vLLM's own OpenAI server on loopback, with guided decoding; the model is tiny and knows nothing."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from rewards.model_based.backends import Endpoint, Request, connect
from rewards.model_based.judge import Judge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
KEY = "sk-canary-1234567890"
START_LIMIT = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": KEY}
    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "8"]
    # In chunks, a prompt with a seed ends vLLM on a CPU: RuntimeError("CPU Generator does not use offset").
    options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    log = (tmp_path_factory.mktemp("log") / "server.txt").open("w+b")
    server = subprocess.Popen(
        [*command, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *options],
        env=os.environ | own | quiet, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until = time.monotonic() + START_LIMIT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                log.seek(0)
                assert server.poll() is None and time.monotonic() < until, log.read()[-3000:].decode()
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def endpoint(url, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return lambda **options: Endpoint(
        **{"url": url, "model": "tiny", "key_env": "JUDGE_KEY", "temperature": 1.0, "max_tokens": 400} | options
    )


def test_guided_judge_always_ends_in_a_verdict(endpoint):
    judge = Judge(connect(endpoint(guided="vllm")), votes=3, analysis_chars=80)
    prompts, responses, references = ["Capital of France?"] * 8, [f"Paris {i}" for i in range(8)], ["Paris", None] * 4
    found = judge.judge(prompts, responses, references)
    assert {verdict.outcome for verdict in found} <= {"right", "wrong"}
    assert all(verdict.reason in ("judge/2-of-3", "judge/3-of-3") for verdict in found)
    assert len({verdict.reason + verdict.outcome for verdict in found}) > 1  # it knows nothing, and the seeds differ
    pairs = judge.compare(prompts, responses, responses[::-1])
    assert all(p.better or p.reason == "judge/no-majority" for p in pairs)


def test_servers_schema_holds_the_reply_to_its_keys(endpoint):
    schema = {"type": "object", "properties": {"verdict": {"enum": ["right", "wrong"]}}, "required": ["verdict"],
              "additionalProperties": False}  # fmt: skip
    requests = [Request(system="Grade.", user="x", seed=i, schema=schema) for i in range(8)]
    replies = connect(endpoint())(requests)
    assert all(reply.text is not None and reply.text.startswith("{") for reply in replies)
    done = [
        json.loads(reply.text) for reply in replies if not reply.cut
    ]  # white space is free, and it may wander there
    assert all(reply in ({"verdict": "right"}, {"verdict": "wrong"}) for reply in done)


def test_unguided_model_that_knows_nothing_is_unparsable(endpoint):
    (verdict,) = Judge(connect(endpoint(guided="off", max_tokens=20))).judge(["q"], ["a"], ["b"])
    assert (verdict.outcome, verdict.reason) == ("unknown", "judge/unparsable")


def test_wrong_key_or_model_is_an_outage_without_retries(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
    began = time.monotonic()
    (verdict,) = Judge(connect(endpoint())).judge(["q"], ["a"], ["b"])
    assert (verdict.outcome, verdict.reason) == ("unknown", "judge/outage")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (reply,) = connect(endpoint(model="other"))([Request(system="", user="x", seed=0)])
    assert reply.text is None and reply.error.startswith("HTTP 404")
    assert time.monotonic() - began < 5
