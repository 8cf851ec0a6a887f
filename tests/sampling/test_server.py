"""A sampler behind HTTP is the sampler itself, and losing a server costs a call, never a token of other weights.

Our own server runs in a thread of this process, on real sockets; the slow tests start `python -m sampling.serve`, with
our own sampler and with vLLM, and kill what it starts.
"""

import contextlib
import dataclasses
import functools
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from runtime.errors import UserError
from runtime.packed import score_sequences
from runtime.weights import checkpoint_tensors
from sampling import serve, transfer
from sampling.attest import DivergedPolicy, SyncReport, WeightsMismatch, make_canary, sync
from sampling.native import NativeSampler
from sampling.native_server import NativeServer
from sampling.process import EngineLost
from sampling.protocol import SamplingParams
from sampling.server import ServerPool, ServerSampler
from sampling.transfer import Shelf, tag_of, version_in
from sampling.vllm_server import Guard, flags
from sampling.wire import Refused, Wire
from tests.sampling.models import VOCAB, v3

ROOT = Path(__file__).parents[2]
PROMPTS = [[7, 21, 30, 2], list(range(10, 40)), [5] * 9, [1, 2, 3], [44]]
SEEDS = [3, 4, 5, 6, 7]
SHORT = SamplingParams(n=3, max_tokens=10, stop_token_ids=(13,))


class Frail(NativeServer):
    """Our server, to which `fault` happens at the next completions, and `spoil` to its answers."""

    fault: Callable[[], None] | None = None
    spoil: Callable[[dict[str, Any]], Any] | None = None

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.fault is not None:
            self.fault()
        reply = super()._complete(body)
        if self.spoil is not None:
            self.spoil(reply)
        return reply


Start = Callable[..., Frail]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers, each of random weights that nobody else has."""
    running: list[Frail] = []

    def begin(*, seed: int = 99, **options: Any) -> Frail:
        server = Frail(NativeSampler(v3(seed)), **{"name": f"sampler-{len(running)}", **options})
        threading.Thread(target=server.serve, daemon=True).start()
        running.append(server)
        return server

    yield begin
    for server in running:
        server.close()


@pytest.fixture
def join() -> Iterator[Callable[..., ServerPool]]:
    """Pools on servers, closed in the end."""
    with contextlib.ExitStack() as stack:

        def begin(*servers: NativeServer, **options: Any) -> ServerPool:
            settings: dict[str, Any] = {"room": 200, "start_limit": 5, "time_limit": 30, **options}
            pool = ServerPool([server.url for server in servers], **settings)
            stack.callback(pool.close)
            return pool

        yield begin


def synced(pool: ServerPool, model: PreTrainedModel, version: int) -> SyncReport:
    return pool.sync(
        lambda: checkpoint_tensors(model),
        version=version,
        canary=make_canary(model.config.vocab_size, dtype="float32", length=100),
        score_trainer=functools.partial(score_sequences, model),
    )


def in_this_process(model: PreTrainedModel, version: int) -> NativeSampler:
    sampler = NativeSampler(model)
    sampler.version = version
    return sampler


def at(server: NativeServer) -> int:
    return int(server.url.rsplit(":", 1)[1])


# The same sampler.


def test_completions_are_those_of_the_sampler_itself(start, join):
    pool = join(start())
    report = synced(pool, v3(1), 4)
    assert (report.version, report.canary_mean, pool.version) == (4, 0, 4)
    ours = in_this_process(v3(1), 4)
    got = pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert got == ours.sample(PROMPTS, SHORT, seeds=SEEDS)  # ids, log-probs, reasons and versions, exactly
    assert {c.finish_reason for group in got for c in group} == {"stop", "length"}
    assert pool.score(PROMPTS[:2]) == ours.score(PROMPTS[:2])
    assert pool.sample([], SHORT, seeds=[]) == []
    greedy = dataclasses.replace(SHORT, temperature=0.0)
    assert pool.sample(PROMPTS, greedy, seeds=SEEDS) == ours.sample(PROMPTS, greedy, seeds=SEEDS)


def test_every_sync_brings_the_weights_of_its_version(start, join):
    pool = join(start())
    for version in (1, 2, 1):
        assert synced(pool, v3(version), version).version == version
        ours = in_this_process(v3(version), version)
        assert pool.sample(PROMPTS, SHORT, seeds=SEEDS) == ours.sample(PROMPTS, SHORT, seeds=SEEDS)


def test_several_servers_share_the_prompts_by_their_order(start, join):
    servers = [start(), start(), start()]
    asked: list[list[list[int]]] = [[], [], []]
    for server, prompts in zip(servers, asked, strict=True):
        server.spoil = lambda reply, prompts=prompts: prompts.extend(c["prompt_token_ids"] for c in reply["choices"])
    for rank in (0, 1):
        pool = join(*servers, rank=rank)
        synced(pool, v3(1), 1)
        for prompts in asked:
            prompts.clear()
        one = dataclasses.replace(SHORT, n=1)
        got = pool.sample(PROMPTS, one, seeds=SEEDS)
        for k, prompts in enumerate(asked):
            share = [i for i in range(len(PROMPTS)) if (rank + i) % 3 == k]
            assert prompts == [PROMPTS[i] for i in share]
            ours = in_this_process(v3(1), 1).sample(prompts, one, seeds=[SEEDS[i] for i in share])
            assert [got[i] for i in share] == ours


def test_files_go_when_they_have_been_read_and_with_the_pool(start, join, tmp_path):
    (tmp_path / "rank-0").mkdir()
    (tmp_path / "rank-0/00009.safetensors").write_bytes(b"of an attempt that was killed")
    server = start()
    pool = join(server, weights_dir=tmp_path)
    assert list(tmp_path.rglob("*.safetensors")) == []
    seen: list[str] = []
    load = server._load
    server._load = lambda tag, *files: [seen.extend(files), load(tag, *files)][1]
    synced(pool, v3(1), 1)
    assert [Path(file).parent for file in seen] == [tmp_path / "rank-0"]
    assert list(tmp_path.rglob("*.safetensors")) == []
    pool.close()
    assert list(tmp_path.iterdir()) == []
    temporary = join(server)._shelf
    temporary.close()
    assert not temporary.folder.exists()


def test_large_weights_go_in_several_files_in_their_order(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "SHARD", 3000)
    shelf = Shelf(tmp_path)
    weights = list(checkpoint_tensors(v3(1)))
    with shelf.parcel(weights, version=5) as parcel:
        assert len(parcel.files) > 5
        read = list(transfer.read_files(parcel.files))
        assert sorted(name for name, _ in read) == sorted(name for name, _ in weights)
        assert all(torch.equal(tensor, dict(weights)[name]) for name, tensor in read)
        sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in parcel.files]
        largest = max(tensor.nbytes for _, tensor in weights)
        assert max(sizes) < 3000 + largest
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_tensor_of_any_strides_arrives_as_it_is(tmp_path):
    numbers = torch.arange(24.0).view(2, 3, 4)
    views = [
        ("one", numbers[0].T),
        ("other", numbers[1]),
        ("half", numbers[1].to(torch.bfloat16)),
        ("none", numbers[:0]),
    ]
    with Shelf(tmp_path).parcel(views, version=1) as parcel:
        read = dict(transfer.read_files(parcel.files))
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in views)


def test_a_tag_names_version_and_every_bit():
    prints = {"a": 1, "b": 2}
    tag = tag_of(7, prints)
    assert version_in(tag) == 7 and tag == tag_of(7, {"b": 2, "a": 1})
    assert len({tag, tag_of(8, prints), tag_of(7, {"a": 1, "b": 3}), tag_of(7, {"a": 1, "c": 2})}) == 4


# Attested.


def test_a_bit_changed_on_the_way_is_named_and_nothing_is_sampled(start, join, monkeypatch):
    server = start()
    pool = join(server)
    read = transfer.read_files

    def flipped(files):
        for name, tensor in read(files):
            if name == "model.layers.1.input_layernorm.weight":
                tensor.view(torch.int32)[3] ^= 1
            yield name, tensor

    monkeypatch.setattr("sampling.native_server.read_files", flipped)
    with pytest.raises(WeightsMismatch, match=r"1 of 37 tensors differ: model.layers.1.input_layernorm.weight"):
        synced(pool, v3(1), 1)
    assert pool.version == -1
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)


def test_a_server_that_lost_a_tensor_is_refused_with_its_name(start, join, monkeypatch):
    pool = join(start())
    read = transfer.read_files
    monkeypatch.setattr(
        "sampling.native_server.read_files",
        lambda files: ((name, t) for name, t in read(files) if name != "model.norm.weight"),
    )
    with pytest.raises(WeightsMismatch, match=r"never sent: \['model.norm.weight'\]"):
        synced(pool, v3(1), 1)
    assert pool.version == -1


def test_one_of_several_servers_that_computes_something_else_is_found(start, join):
    """Its fingerprints are right, and over all servers its canary would be within the tolerance."""
    servers = [start() for _ in range(3)]
    pool = join(*servers)
    load = servers[1].sampler.load

    def worn(weights, *, version):
        held = load(weights, version=version)
        with torch.no_grad():
            dict(servers[1].sampler.model.named_parameters())["model.norm.weight"].mul_(1.02)
        return held

    servers[1].sampler.load = worn
    with pytest.raises(WeightsMismatch, match="canary: every tensor arrived"):
        synced(pool, v3(1), 1)
    assert [member.version for member in pool.members] == [1, -1, -1]
    assert pool.version == -1


def test_weights_with_nan_are_not_sent(start, join):
    pool, model = join(start()), v3(1)
    with torch.no_grad():
        dict(model.named_parameters())["model.norm.weight"][0] = torch.nan
    with pytest.raises(DivergedPolicy, match=r"model.norm.weight holds NaN"):
        synced(pool, model, 1)


def test_attest_sync_takes_a_pool_for_one_sampler(start, join):
    pool, model = join(start(), start()), v3(2)
    sync(
        pool,
        lambda: checkpoint_tensors(model),
        version=2,
        canary=make_canary(VOCAB, dtype="float32", length=100),
        score_trainer=functools.partial(score_sequences, model),
    )
    assert pool.version == 2


# Lost.


@pytest.mark.parametrize("same_name", [False, True])
def test_a_server_that_was_started_again_samples_nothing_before_its_weights_are_attested_anew(start, join, same_name):
    server = start(name="first")
    pool = join(server)
    synced(pool, v3(1), 1)
    expected = pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    port = at(server)
    server.close()
    start(port=port, name="first" if same_name else "second").sampler.version = 0  # vLLM, too, samples from anything
    said = "holds weights 'default' now" if same_name else "was started again: .*'first' does not exist"
    with pytest.raises(EngineLost, match=said):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert pool.version == -1
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    pool.restart()
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    synced(pool, v3(1), 1)
    assert pool.sample(PROMPTS, SHORT, seeds=SEEDS) == expected
    assert pool.restarts == 1


def test_a_restarted_server_is_waited_for_and_no_longer_than_the_limit(start, join):
    server = start()
    pool = join(server, start_limit=1.5)
    synced(pool, v3(1), 1)
    port = at(server)
    server.close()
    with pytest.raises(EngineLost, match="doesn't answer"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    with pytest.raises(EngineLost, match=r"waited 1.5 s for it to be started"):
        pool.restart()
    threading.Timer(0.7, lambda: start(port=port, name="late")).start()
    pool.restart()
    assert synced(pool, v3(1), 1).version == 1


def test_only_the_server_that_was_lost_is_sent_weights_again(start, join):
    servers = [start(), start()]
    pool = join(*servers)
    synced(pool, v3(1), 1)
    loads: list[int] = []
    for k, server in enumerate(servers):
        load = server.sampler.load
        server.sampler.load = lambda weights, version, k=k, load=load: [loads.append(k), load(weights, version=0)][1]
    port = at(servers[1])
    servers[1].close()
    start(port=port, name="new")
    with pytest.raises(EngineLost):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    pool.restart()
    synced(pool, v3(1), 1)
    assert loads == []  # the first kept its own, and the new one is another object
    assert pool.version == 1


def test_a_fault_that_passes_costs_another_attempt(start, join):
    server = start()
    pool = join(server)
    synced(pool, v3(1), 1)
    faults = iter([RuntimeError("out of something"), OSError("a device"), None])

    def raise_next() -> None:
        if (error := next(faults)) is not None:
            raise error

    server.fault = raise_next
    got = pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert got == in_this_process(v3(1), 1).sample(PROMPTS, SHORT, seeds=SEEDS)
    assert next(faults, "used up") == "used up"


def test_attempts_are_bounded(start, join, monkeypatch):
    monkeypatch.setattr("sampling.wire.BACK_OFF", 0.01)
    server = start()
    pool = join(server)
    synced(pool, v3(1), 1)
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("broken")

    server.fault = broken
    with pytest.raises(EngineLost, match=r"answered 500 to /v1/completions: .*RuntimeError: broken"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert len(calls) == 4 and pool.version == -1


def test_a_hang_ends_at_the_deadline(start, join, request):
    server = start()
    pool = join(server)
    synced(pool, v3(1), 1)
    release = threading.Event()
    request.addfinalizer(release.set)
    server.fault = lambda: release.wait(20) and None
    pool.members[0].time_limit = 0.5
    began = time.monotonic()
    with pytest.raises(EngineLost, match=r"doesn't answer /v1/completions: .*its 0.5 s are over"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert time.monotonic() - began < 5


def drop_one(reply):
    del reply["choices"][1]


def cut_logprobs(reply):
    reply["choices"][0]["logprobs"]["token_logprobs"].pop()


def other_prompt(reply):
    reply["choices"][0]["prompt_token_ids"] = [1]


def aborted(reply):
    reply["choices"][0]["finish_reason"] = "abort"


def no_logprobs(reply):
    reply["choices"][0]["logprobs"] = None


def no_choices(reply):
    reply.clear()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_one, "made 14 completions of 15"),
        (cut_logprobs, "tokens with"),
        (other_prompt, "completed another prompt than it was given"),
        (aborted, "finish_reason 'abort'"),
        (no_logprobs, "can't be read: TypeError"),
        (no_choices, "can't be read: KeyError"),
    ],
)
def test_an_answer_that_is_not_whole_counts_for_nothing(start, join, spoil, said):
    server = start()
    pool = join(server)
    synced(pool, v3(1), 1)
    server.spoil = spoil
    with pytest.raises(EngineLost, match=re.escape(said)):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    assert pool.version == -1


# Several trainers.


def test_another_process_of_the_run_samples_from_what_the_first_has_attested_and_from_nothing_else(start, join):
    server = start(name="first")
    first, second = join(server), join(server, rank=1)
    report = synced(first, v3(1), 1)
    second.follow(report.fingerprints, version=1)
    ours = in_this_process(v3(1), 1).sample(PROMPTS, SHORT, seeds=SEEDS)
    assert second.version == 1 and second.sample(PROMPTS, SHORT, seeds=SEEDS) == ours
    with pytest.raises(EngineLost, match=r"holds weights '1:\w+'; '2:\w+' were attested"):
        second.follow(report.fingerprints, version=2)
    with pytest.raises(WeightsMismatch, match="holds no attested weights"):
        second.sample(PROMPTS, SHORT, seeds=SEEDS)


def test_after_a_loss_all_follow_the_first_again(start, join):
    server = start(name="first")
    first, second = join(server), join(server, rank=1)
    second.follow(synced(first, v3(1), 1).fingerprints, version=1)
    port = at(server)
    server.close()
    start(port=port, name="second")
    with pytest.raises(EngineLost):
        second.sample(PROMPTS, SHORT, seeds=SEEDS)
    for pool in (first, second):
        pool.restart()
    with pytest.raises(EngineLost, match="were attested"):  # not before the first has brought them
        second.follow(first._previous[0].fingerprints, version=1)
    second.follow(synced(first, v3(1), 1).fingerprints, version=1)
    ours = in_this_process(v3(1), 1).sample(PROMPTS, SHORT, seeds=SEEDS)
    assert second.sample(PROMPTS, SHORT, seeds=SEEDS) == ours


# Who may, and what is said.


def test_without_the_key_nothing_is_answered_and_the_key_is_never_said(start, join, monkeypatch):
    server = start(key="s3cret")
    with pytest.raises(UserError, match="set SAMPLING_API_KEY to the key the server was started with"):
        join(server)
    monkeypatch.setenv("SAMPLING_API_KEY", "other")
    with pytest.raises(UserError, match="answered 401 to /v1/models"):
        join(server)
    monkeypatch.setenv("SAMPLING_API_KEY", "s3cret")
    pool = join(server)
    synced(pool, v3(1), 1)
    server.fault = lambda: (_ for _ in ()).throw(ValueError("the key is s3cret"))
    with pytest.raises(ValueError, match=r"the key is \*\*\*"):
        pool.sample(PROMPTS, SHORT, seeds=SEEDS)
    monkeypatch.setenv("SAMPLING_API_KEY", "two words")
    with pytest.raises(UserError, match=r"SAMPLING_API_KEY holds something that can't be a key(?!.*two words)"):
        join(server)


def asked(url: str, body: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_page_in_a_browser_reaches_nothing(start):
    server = start()
    rpc, body = f"{server.url}/collective_rpc", b'{"method": "sampler_describe", "args": []}'
    assert asked(rpc, body, **{"Content-Type": "application/json"}) == 200
    assert asked(rpc, body, **{"Content-Type": "text/plain"}) == 400  # what a page may send without asking first
    assert asked(rpc, body, **{"Content-Type": "application/json", "Host": "evil.example"}) == 401
    assert asked(f"{server.url}/weight_info", Host="evil.example:80") == 401
    assert asked(f"{server.url}/weight_info", Host="localhost:80") == 200
    assert asked(f"{server.url}/etc/passwd") == 404
    assert asked(f"{server.url}/v1/completions", b"{", **{"Content-Type": "application/json"}) == 400


def test_vllms_routes_for_weights_need_the_key_too(monkeypatch):
    """vLLM's own check leaves them open."""
    import asyncio

    async def status(path: str, headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[int] = []

        async def app(scope, receive, send):
            await send({"status": 200})

        async def send(message):
            sent.append(message.get("status", 0))

        await Guard(app)({"type": "http", "path": path, "headers": headers}, None, send)
        return sent[0]

    def ask(path: str, **headers: str) -> int:
        return asyncio.run(status(path, [(k.encode(), v.encode()) for k, v in headers.items()]))

    assert ask("/collective_rpc", host="127.0.0.1:8100") == 200
    assert ask("/collective_rpc", host="evil.example") == ask("/collective_rpc") == 401
    monkeypatch.setenv("SAMPLING_API_KEY", "k")
    assert ask("/update_weights", host="10.0.0.1", authorization="Bearer k") == 200
    assert ask("/update_weights", host="127.0.0.1") == ask("/update_weights", authorization="Bearer kk") == 401
    assert ask("/health") == 200


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8100", "'127.0.0.1:8100' is no address of a server; give http://host:port"),
        ("http://127.0.0.1:8100/v1", "give http://host:port"),
        ("http://me:s3cret@127.0.0.1:1", "'127.0.0.1' is given with a key; put it into SAMPLING_API_KEY"),
        ("http://10.1.2.3:8100", "start it with SAMPLING_API_KEY set, and set it here"),
    ],
)
def test_addresses_that_can_not_be_used_are_said(url, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        Wire(url, key=None)
    assert "s3cret" not in str(caught.value)


def test_a_server_that_can_not_do_it_is_refused_with_a_remedy(start, join, tmp_path):
    server = start()
    with pytest.raises(UserError, match=r"5000 tokens, but http://127.0.0.1:\d+ takes 2048; start it with"):
        join(server, room=5000)
    with pytest.raises(UserError, match=r"sampling.transfer=nccl: http.* takes weights by files"):
        join(server, transfer="nccl")
    with pytest.raises(EngineLost, match=r"waited 0.1 s for it to be started"):
        ServerSampler("http://127.0.0.1:9", shelf=Shelf(tmp_path), room=10, start_limit=0.1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sampling.weights_dir='.*file': "):
        join(server, weights_dir=tmp_path / "file")
    server.get = lambda path: {"world_size": 1 if "false" in path else 2} if "world" in path else start().get(path)
    with pytest.raises(UserError, match="data parallel inside"):
        join(server)


def test_requests_that_no_server_takes_are_refused(start, join):
    pool = join(start())
    synced(pool, v3(1), 1)
    for change, said in [
        (dict(max_tokens=200), r"prompt 0: 4 tokens \+ 200 new"),
        (dict(temperature=0.001), "vLLM would raise it to 0.01"),
        (dict(record_experts=True), "no server does either"),
        (dict(speculate=True), "no server does either"),
    ]:
        with pytest.raises(ValueError, match=said):
            pool.sample(PROMPTS, dataclasses.replace(SHORT, **change), seeds=SEEDS)
    with pytest.raises(ValueError, match="seeds: 1 for 5 prompts"):
        pool.sample(PROMPTS, SHORT, seeds=[1])
    with pytest.raises(ValueError, match=r"token ids outside 0..49"):
        pool.sample([[50]], SHORT, seeds=[1])
    assert pool.version == 1  # as good as before


def test_a_redirect_is_not_followed():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(Refused, match="answered 302"):
            Wire(f"http://127.0.0.1:{listener.getsockname()[1]}", key="k").call("/v1/models", limit=5)


# The command.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "put a key into SAMPLING_API_KEY"),
        (["--backend", "sglang"], "--backend sglang: use auto, vllm or native"),
        (["--dtype", "int8"], "--dtype int8: use auto, bfloat16 or float32"),
        (["--port", "0"], "--port 0: give a positive number"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: no such folder"),
    ],
)
def test_settings_that_can_not_be_served_are_said(flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.read(["--model", "deepseek-ai/DeepSeek-V3", *flags])
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_vllms_own_options_follow_the_dashes():
    settings = serve.read(["--model", "m/m", "--tensor_parallel", "4", "--", "--max-logprobs", "5"])
    assert (settings.tensor_parallel, settings.extra) == (4, ["--max-logprobs", "5"])


def test_options_are_spelt_as_vllm_does():
    options = {"max_model_len": 5, "enforce_eager": True, "enable_chunked_prefill": False, "hf_overrides": {"a": 1}}
    assert flags(options) == [
        "--max-model-len=5",
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        '--hf-overrides={"a": 1}',
    ]
