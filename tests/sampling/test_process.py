"""A sampler in a child process is the sampler itself, and losing the child costs a call, never a wrong token.

Real processes, killed with real signals. The engine is mostly the native sampler with a tiny DeepSeek-V3; where one
has to crash in a certain way, a frail one written below; and vLLM in the slow tests.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from runtime.packed import score_sequences
from runtime.run_folder import open_run
from runtime.weights import checkpoint_tensors
from sampling import process
from sampling.attest import DivergedPolicy, PrefixCaching, SyncReport, WeightsMismatch, make_canary, sync
from sampling.backend import make_sampler
from sampling.fingerprint import fingerprint
from sampling.native import NativeSampler
from sampling.process import EngineLost, ProcessSampler
from sampling.protocol import Completion, Sampler, SamplingParams, Weights
from tests.sampling.models import VOCAB, randomize, v3

ROOT = Path(__file__).parents[2]
PROMPTS = [[7, 21, 30, 2], list(range(10, 40)), [5] * 9]
SHORT = SamplingParams(n=3, max_tokens=10, record_experts=True)
LONG = SamplingParams(n=4, max_tokens=1000)
"""A second or more, so that a signal after a fraction of one comes in the middle."""


def synced(
    sampler: Sampler,
    model: PreTrainedModel,
    version: int,
    previous: SyncReport | None = None,
    weights: Callable[[], Weights] | None = None,
) -> SyncReport:
    return sync(
        sampler,
        weights or (lambda: checkpoint_tensors(model)),
        version=version,
        canary=make_canary(model.config.vocab_size, dtype="float32", length=100),
        score_trainer=functools.partial(score_sequences, model),
        previous=previous,
    )


def in_this_process(model: PreTrainedModel) -> NativeSampler:
    sampler = NativeSampler(model)
    sampler.version = 1
    return sampler


@pytest.fixture(scope="module")
def child():
    """One child for the module: whoever kills it leaves it to the next test to start it again."""
    sampler = make_sampler(v3(0), backend="native", max_model_len=128, process=True, time_limit=60)
    assert isinstance(sampler, ProcessSampler)
    assert sampler.time_limit == 60
    yield sampler
    sampler.close()


@pytest.fixture
def native(child):
    """The child, attested with the weights of `v3(1)`."""
    if child.pid is None:
        child.restart()
    synced(child, v3(1), 1)
    child.time_limit = 60
    return child


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[answer.ids for answer in group] for group in groups]


def gone(pid: int, within: float = 10) -> bool:
    """Whether a process has ended, reaped by its parent or not."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def send(pid: int, signum: int, *, after: float) -> None:
    threading.Timer(after, os.kill, [pid, signum]).start()


# The same sampler.


def test_completions_are_those_of_the_sampler_itself(native):
    expected = in_this_process(v3(1)).sample(PROMPTS, SHORT, seeds=[3, 4, 5])
    got = native.sample(PROMPTS, SHORT, seeds=[3, 4, 5])
    assert got == expected  # ids, log-probs, reasons and versions, exactly
    for theirs, ours in zip(got, expected, strict=True):
        assert all(np.array_equal(a.experts, b.experts) for a, b in zip(theirs, ours, strict=True))
    assert got[0][0].experts.shape == (4 + 10 - 1, 1, 2)
    assert native.score(PROMPTS) == in_this_process(v3(1)).score(PROMPTS)
    assert native.dtype == "float32"


def test_another_architecture_is_built_from_its_config_with_its_dtype(native):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config = Qwen3Config(vocab_size=VOCAB, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="packed", dtype=torch.bfloat16).eval()
    randomize(model, 1)
    sampler = make_sampler(model, backend="native", max_model_len=128, process=True)
    try:
        sampler.load(checkpoint_tensors(model), version=1)
        expected = in_this_process(model).sample(PROMPTS, SHORT, seeds=[3, 4, 5])
        assert sampler.sample(PROMPTS, SHORT, seeds=[3, 4, 5]) == expected
        assert sampler.dtype == "bfloat16"
    finally:
        sampler.close()


def test_every_sync_is_attested_across_the_processes(native):
    report = synced(native, v3(2), 2)
    assert (native.version, report.canary_max < 1e-4) == (2, True)
    assert report.fingerprints == {name: fingerprint(tensor) for name, tensor in checkpoint_tensors(v3(2))}
    (group,) = native.sample(PROMPTS[:1], SHORT, seeds=[0])
    assert {answer.version for answer in group} == {2}


STALE = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (dict(checkpoint_tensors(v3(1)))[STALE], rf"1 of \d+ tensors differ: {STALE} .* is still version 1's"),
        (None, rf"1 of \d+ tensors never sent: .*{STALE}"),
    ],
)
def test_a_stale_or_dropped_tensor_is_named_and_nothing_is_sampled(native, monkeypatch, spoiled, message):
    before = synced(native, v3(1), 1)
    load = native.load

    def spoil(weights, *, version):
        stream = ((name, spoiled if name == STALE else tensor) for name, tensor in weights)
        return load(((name, tensor) for name, tensor in stream if tensor is not None), version=version)

    monkeypatch.setattr(native, "load", spoil)
    with pytest.raises(WeightsMismatch, match=message):
        synced(native, v3(2), 2, before)
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        native.sample(PROMPTS, SHORT, seeds=[3, 4, 5])
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        native.score(PROMPTS)


def test_a_refused_request_costs_nothing(native):
    pid = native.pid
    with pytest.raises(ValueError, match=r"prompt 1: token ids outside 0\.\.49"):
        native.sample([[1], [VOCAB]], SHORT, seeds=[0, 1])
    assert native.sample([[1]], SHORT, seeds=[0]) == in_this_process(v3(1)).sample([[1]], SHORT, seeds=[0])
    assert native.pid == pid


# Losing the child.


def test_killed_while_sampling_it_comes_back_with_the_same_tokens(native):
    restarts, pid = native.restarts, native.pid
    send(pid, signal.SIGKILL, after=0.3)
    with pytest.raises(EngineLost, match=r"died in sample after 0\.\d s \(signal 9"):
        native.sample(PROMPTS, LONG, seeds=[3, 4, 5])
    assert (native.version, native.pid) == (-1, None)
    with pytest.raises(EngineLost, match=r"died in sample .* restart it"):
        native.sample(PROMPTS, LONG, seeds=[3, 4, 5])
    native.restart()
    assert native.restarts == restarts + 1
    assert native.pid not in (None, pid)
    synced(native, v3(1), 1)
    expected = in_this_process(v3(1)).sample(PROMPTS, LONG, seeds=[3, 4, 5])
    assert native.sample(PROMPTS, LONG, seeds=[3, 4, 5]) == expected


def test_a_hang_ends_at_the_deadline_and_in_a_kill(native):
    pid, native.time_limit = native.pid, 2.0
    send(pid, signal.SIGSTOP, after=0.3)
    began = time.monotonic()
    with pytest.raises(EngineLost, match="hung in sample: killed after 2 s"):
        native.sample(PROMPTS, LONG, seeds=[3, 4, 5])
    assert 2 <= time.monotonic() - began < 4
    assert not Path(f"/proc/{pid}").exists()  # reaped, too
    assert (native.version, native.pid) == (-1, None)


def test_killed_during_a_sync_it_samples_nothing_before_a_whole_one(native, monkeypatch):
    monkeypatch.setattr(process, "CHUNK", 1)  # so that half of the tensors are in the child's model by then
    model, pid = v3(2), native.pid

    def killed_half_way():
        weights = list(checkpoint_tensors(model))
        yield from weights[: len(weights) // 2]
        os.kill(pid, signal.SIGKILL)
        yield from weights[len(weights) // 2 :]

    with pytest.raises(EngineLost, match=r"died in load .*signal 9"):
        synced(native, model, 2, weights=killed_half_way)
    assert native.version == -1
    native.restart()
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        native.sample(PROMPTS, SHORT, seeds=[3, 4, 5])
    synced(native, model, 2)
    expected = in_this_process(model).sample(PROMPTS, SHORT, seeds=[3, 4, 5])
    assert ids(native.sample(PROMPTS, SHORT, seeds=[3, 4, 5])) == ids(expected)


def test_the_signals_that_stop_a_job_are_the_trainers(native):
    for signum in (signal.SIGINT, signal.SIGTERM):
        send(native.pid, signum, after=0.2)
    expected = in_this_process(v3(1)).sample(PROMPTS, LONG, seeds=[3, 4, 5])
    assert native.sample(PROMPTS, LONG, seeds=[3, 4, 5]) == expected
    assert os.getsid(native.pid) != os.getsid(0)  # a terminal's Ctrl-C does not even reach it


PARENT = """
import sys, time
from tests_frail import Frail
from sampling.process import ProcessSampler

sampler = ProcessSampler(Frail)
sampler.load([], version=0)
print(sampler.pid, flush=True)
if sys.argv[1] == "busy":
    sampler.score([["sleep"]])
time.sleep(100)
"""


@pytest.mark.parametrize("state", ["busy", "stopped"])
def test_a_killed_trainer_leaves_no_engine_behind(frail, state):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(frail)])}
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        if state == "stopped":
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert not gone(pid, within=0.1)
        parent.kill()
    assert gone(pid)


# An engine that fails in every way, and what crosses to it.

FRAIL = """
import ctypes, os, subprocess, time
import torch
from sampling.attest import DivergedPolicy, WeightsMismatch
from sampling.fingerprint import fingerprint

class Unheard(ValueError):
    def __init__(self, a, b):
        super().__init__(f"{a} of {b}")

def mismatch():
    raise WeightsMismatch("half of it", received={"a": 1})

def diverged():
    raise DivergedPolicy("NaN")

def unheard():
    raise Unheard(1, 2)

def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def refuse():
    raise ValueError("no such engine")

HABITS = {
    "threads": torch.get_num_threads,
    "segfault": lambda: ctypes.string_at(0),
    "leave": lambda: os._exit(7),
    "sleep": lambda: time.sleep(1000),
    "grandchild": lambda: subprocess.Popen(["sleep", "1000"]).pid,
    "noise": lambda: os.write(1, b"noise from the engine"),
    "mismatch": mismatch, "diverged": diverged, "unheard": unheard, "broken": broken,
}

class Frail:
    version, dtype = -1, "float32"

    def load(self, weights, *, version):
        held = dict(weights)  # all together, as some loaders do
        return {name: fingerprint(tensor) for name, tensor in held.items()}

    def score(self, sequences):
        return [[float(HABITS[habit]() or 0) for habit in sequence] for sequence in sequences]

    def close(self):
        pass

class Caching(Frail):
    def cached_prompt_tokens(self, prompt):
        return len(prompt)
"""


@pytest.fixture(scope="module")
def frail(tmp_path_factory):
    """Folder of the module `tests_frail`, which this process and its children can import."""
    folder = tmp_path_factory.mktemp("frail")
    (folder / "tests_frail.py").write_text(FRAIL)
    sys.path.append(str(folder))
    importlib.import_module("tests_frail")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["tests_frail"]


@pytest.fixture(scope="module")
def frail_child(frail):
    sampler = ProcessSampler(sys.modules["tests_frail"].Frail)
    yield sampler
    sampler.close()


@pytest.fixture
def engine(frail_child):
    """A frail engine, alive."""
    if frail_child.pid is None:
        frail_child.restart()
    frail_child.load([], version=0)
    return frail_child


@pytest.mark.parametrize("chunk", [1, 3000, process.CHUNK])
def test_tensors_of_any_kind_arrive_bit_for_bit(engine, monkeypatch, chunk):
    """And stay as they are when later ones arrive: the engine looks at them after the last."""
    monkeypatch.setattr(process, "CHUNK", chunk)
    base = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    weights = {
        "plain": base,
        "parameter": torch.nn.Parameter(base),
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "scalar": torch.tensor(3.5),
        "odd": base[:3, :3].to(torch.bfloat16),
        "fp8": base.to(torch.float8_e4m3fn),
        "integers": torch.arange(5),
        "flags": base > 0,
        "inference": torch.inference_mode()(lambda: base * 2)(),
        "last": base + 1,
    }
    held = engine.load(weights.items(), version=1)
    assert held == {name: fingerprint(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("segfault", r"died in score after .* \(signal 11\)"),
        ("leave", r"died in score after .* \(exit code 7\)"),
        ("broken", r"failed in score after .*: RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_crash_says_what_died_where_and_how(engine, habit, message):
    with pytest.raises(EngineLost, match=message):
        engine.score([[habit]])
    assert (engine.version, engine.pid) == (-1, None)


@pytest.mark.parametrize(
    ("habit", "error"), [("mismatch", WeightsMismatch), ("diverged", DivergedPolicy), ("unheard", ValueError)]
)
def test_errors_of_the_caller_cross_with_their_type_and_the_engine_goes_on(engine, habit, error):
    with pytest.raises(error) as raised:
        engine.score([[habit]])
    assert type(raised.value) is error
    if error is WeightsMismatch:
        assert raised.value.received == {"a": 1}
    if habit == "unheard":  # an exception that could not be unpickled
        assert str(raised.value) == "Unheard: 1 of 2"
    assert engine.score([["threads"]]) == [[torch.get_num_threads()]]


def test_a_child_that_does_not_even_read_is_noticed(engine, monkeypatch):
    """The request is larger than the socket's buffer: the parent hangs in its write."""
    monkeypatch.setattr(engine, "time_limit", 1.0)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match="hung in score: killed after 1 s"):
        engine.score([["x" * 10_000_000]])


def test_weights_that_cannot_be_read_are_the_trainers_error(engine):
    def broken():
        yield "a", torch.ones(3)
        raise OSError("adapters can't be merged")

    with pytest.raises(OSError, match="adapters"):
        engine.load(broken(), version=2)
    with pytest.raises(EngineLost, match="ended by OSError in load; restart it"):  # it waited for the rest
        engine.load([], version=2)


def test_an_interrupted_call_leaves_no_answer_for_the_next(engine):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        send(os.getpid(), signal.SIGUSR1, after=0.3)
        with pytest.raises(KeyboardInterrupt):
            engine.score([["sleep"]])
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(EngineLost, match="ended by KeyboardInterrupt in score"):
        engine.score([["threads"]])


def test_the_child_gets_the_threads_of_the_trainer(engine):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        engine.restart()
        engine.load([], version=0)
        assert engine.score([["threads"]]) == [[threads + 2]]
    finally:
        torch.set_num_threads(threads)


def test_what_an_engine_started_ends_with_it(engine):
    ((pid,),) = engine.score([["grandchild"]])
    assert not gone(int(pid), within=0.1)
    engine.restart()
    assert gone(int(pid))


def test_what_an_engine_prints_is_on_stderr(frail, capfd):
    sampler = ProcessSampler(sys.modules["tests_frail"].Frail)
    sampler.load([], version=0)
    sampler.score([["noise"]])
    sampler.close()
    assert capfd.readouterr() == ("", "noise from the engine")


def test_only_an_engine_with_a_prefix_cache_is_asked_about_it(engine):
    assert not isinstance(engine, PrefixCaching)
    caching = ProcessSampler(sys.modules["tests_frail"].Caching)
    try:
        caching.load([], version=0)
        assert isinstance(caching, PrefixCaching)
        assert caching.cached_prompt_tokens([1, 2, 3]) == 3
    finally:
        caching.close()


def test_a_run_folders_lock_is_not_shared_with_the_child(engine, tmp_path):
    with open_run(tmp_path / "run", config={}, resume=False):
        engine.restart()
    files = [str(fd.readlink()) for fd in Path(f"/proc/{engine.pid}/fd").iterdir()]
    assert [file for file in files if str(tmp_path) in file] == []
    open_run(tmp_path / "run", config={}, resume=True).close()


def open_files() -> list[str]:
    return sorted(fd.name for fd in Path("/proc/self/fd").iterdir())


def children() -> str:
    return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


def test_closing_leaves_no_process_and_no_open_file(frail):
    before = open_files()
    sampler = ProcessSampler(sys.modules["tests_frail"].Frail)
    sampler.load([("a", torch.ones(3))], version=0)
    pid = sampler.pid
    sampler.close()
    sampler.close()
    assert not Path(f"/proc/{pid}").exists()
    assert open_files() == before
    with pytest.raises(EngineLost, match="was closed"):
        sampler.load([], version=1)


def test_a_child_that_will_not_leave_is_killed_by_close(engine, monkeypatch):
    monkeypatch.setattr(process, "CLOSE_LIMIT", 0.5)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    engine.close()
    assert gone(pid)


def test_an_engine_that_cannot_be_made_is_a_plain_error_at_first_and_a_loss_later(frail):
    module = sys.modules["tests_frail"]
    before = children()
    with pytest.raises(ValueError, match="no such engine"):
        ProcessSampler(module.refuse)
    with pytest.raises(EngineLost, match=r"failed in start .*CUDA error"):
        ProcessSampler(module.broken)
    with pytest.raises(EngineLost, match=r"hung in start: killed after 0\.5 s"):
        ProcessSampler(module.Frail, start_limit=0.5)
    assert children() == before
    sampler = ProcessSampler(module.Frail)
    sampler._make = module.refuse
    with pytest.raises(EngineLost, match="can't be started again: no such engine"):
        sampler.restart()
    assert (sampler.pid, sampler.restarts) == (None, 1)


# vLLM.


def qwen3() -> PreTrainedModel:
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    config = Qwen3Config(vocab_size=500, num_key_value_heads=1, max_position_embeddings=2048, **sizes)
    config.architectures = ["Qwen3ForCausalLM"]
    return Qwen3ForCausalLM._from_config(config, attn_implementation="packed").eval()


def qwen3_with_vllm() -> tuple[PreTrainedModel, ProcessSampler]:
    model = randomize(qwen3(), 1)
    sampler = make_sampler(model, backend="vllm", dtype="float32", max_model_len=1500, process=True, time_limit=120)
    assert isinstance(sampler, ProcessSampler)
    return model, sampler


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize(("signum", "message"), [(signal.SIGKILL, "signal 9"), (signal.SIGSTOP, "hung in sample")])
def test_vllm_killed_or_hung_while_sampling_comes_back_attested_with_the_same_tokens(signum, message):
    model, sampler = qwen3_with_vllm()
    try:
        assert isinstance(sampler, PrefixCaching)
        report = synced(sampler, model, 1)
        expected = sampler.sample(PROMPTS, LONG, seeds=[3, 4, 5])
        randomize(model, 2)
        report = synced(sampler, model, 2, report)
        other = sampler.sample(PROMPTS, dataclasses.replace(LONG, max_tokens=20), seeds=[3, 4, 5])
        randomize(model, 1)
        sampler.time_limit = 5.0 if signum == signal.SIGSTOP else 120.0
        synced(sampler, model, 3, report)
        send(sampler.pid, signum, after=0.5)
        with pytest.raises(EngineLost, match=message):
            sampler.sample(PROMPTS, LONG, seeds=[3, 4, 5])
        sampler.time_limit = 120.0
        sampler.restart()
        with pytest.raises(WeightsMismatch, match="no attested weights"):
            sampler.sample(PROMPTS, LONG, seeds=[3, 4, 5])
        assert synced(sampler, model, 3).canary_max < 1e-3
        again = sampler.sample(PROMPTS, LONG, seeds=[3, 4, 5])
        assert ids(again) == ids(expected)
        assert [a.ids for a in other[0]] != [a.ids[:20] for a in expected[0]]
        pid = sampler.pid
    finally:
        sampler.close()
    assert not Path(f"/proc/{pid}").exists()
