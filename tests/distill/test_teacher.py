"""Teachers: a sampler's answers are its seeds', an endpoint's faults are answers that say why there is none."""

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deepseek_v3.fp8.linear import Fp8Linear
from distill.config import SYSTEM, ExpertConfig
from distill.teacher import EndpointTeacher, Request, SamplerTeacher, conversation, open_teacher
from distill.types import Problem, Sample
from runtime.errors import UserError


def said(text: object, finish_reason: str = "stop") -> tuple[int, bytes]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice]}).encode()


def problem(position: int = 0, prompt: str = "1 + 1?", **fields: Any) -> Problem:
    return Problem(
        id=f"p{position}", position=position, domain="math", prompt=[{"role": "user", "content": prompt}], **fields
    )


def ask(teacher: Any, requests: list[Request], stop: Callable[[], bool] = lambda: False) -> list[Sample]:
    return [sample for samples in teacher.answer(requests, stop=stop) for sample in samples]


def requests(positions: range, kind: Any = "reasoning", n: int = 2) -> list[Request]:
    return [Request(problem(i, f"{i} + 1?"), kind, index) for i in positions for index in range(n)]


# A sampler.


@pytest.fixture(scope="module")
def sampler(teacher) -> Iterator[SamplerTeacher]:
    expert = ExpertConfig(
        model=str(teacher), backend="native", max_tokens=4, samples=3, max_prompt_tokens=90, system="Think."
    )
    opened = open_teacher(expert, seed=0, problems=[problem()])
    assert isinstance(opened, SamplerTeacher)
    yield opened
    opened.close()


def test_answers_are_the_seeds_whatever_they_are_asked_with(sampler) -> None:
    whole = {sample.key: sample for sample in ask(sampler, requests(range(6), n=3))}
    alone = ask(sampler, [Request(problem(4, "4 + 1?"), "reasoning", 2)])
    assert alone == [whole[4, "reasoning", 2]]
    assert len({sample.seed for sample in whole.values()}) == 6
    assert len({sample.text for sample in whole.values()}) > 3
    assert {s.finish_reason for s in whole.values()} == {"stop", "length"}
    assert all(s.tokens == 4 for s in whole.values() if s.finish_reason == "length")
    other = {sample.key: sample.seed for sample in ask(sampler, requests(range(6), "original", n=3))}
    assert {whole[i, "reasoning", 0].seed for i in range(6)}.isdisjoint(other.values())


def test_a_prompt_that_is_too_long_is_an_answer_that_says_so(sampler) -> None:
    long = Request(problem(1, "and one " * 50), "original", 0)
    fits = Request(problem(2), "original", 0)
    first, second = ask(sampler, [long, fits])
    assert first.finish_reason == "error" and "longer than 90" in first.error and first.text == ""
    assert second.finish_reason != "error"


def test_weights_are_known_by_their_hash(sampler, teacher, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    again = open_teacher(sampler.expert, seed=0, problems=[problem()])
    assert again.record == sampler.record and len(again.record.weights_hash or "") == 16
    for file in teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][3] += 2**-20
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    named = {str(teacher): lambda: tmp_path}
    changed = open_teacher(sampler.expert, seed=0, problems=[problem()], named_models=named)
    assert changed.record.weights_hash != sampler.record.weights_hash and changed.record.id != sampler.record.id


def test_a_teacher_in_fp8_is_another_one_whose_layers_compute_so(sampler) -> None:
    opened = open_teacher(dataclasses.replace(sampler.expert, fp8=True), seed=0, problems=[problem()])
    assert isinstance(opened, SamplerTeacher)
    assert any(isinstance(module, Fp8Linear) for module in opened.sampler.model.modules())
    assert opened.record.id != sampler.record.id
    assert opened.record.settings["sampler"] == "NativeSampler float8"
    assert len(ask(opened, requests(range(2), n=3))) == 6
    opened.close()


def test_no_room_for_a_prompt_is_refused(teacher) -> None:
    with pytest.raises(UserError, match=r"max_tokens=99999999: .* leaves none for the prompt"):
        open_teacher(ExpertConfig(model=str(teacher), max_tokens=99999999), seed=0, problems=[problem()])


def test_the_system_prompt_is_of_reasoning_alone_and_goes_before_the_problems_own() -> None:
    plain = problem()
    own = Problem(id="x", position=0, domain="d", prompt=[{"role": "system", "content": "Be brief."}, *plain.prompt])
    assert conversation(plain, "original", SYSTEM) == conversation(plain, "reasoning", "") == plain.prompt
    assert conversation(plain, "reasoning", "Think.") == [{"role": "system", "content": "Think."}, *plain.prompt]
    assert conversation(own, "reasoning", "Think.")[0] == {"role": "system", "content": "Think.\n\nBe brief."}
    assert conversation(own, "reasoning", "Think.")[1:] == plain.prompt
    assert "reflect" in SYSTEM or "Doubt" in SYSTEM


# A server.


def endpoint(url: str, **settings: Any) -> EndpointTeacher:
    expert = ExpertConfig(
        **{"model": "r1", "endpoint": url, "timeout": 5.0, "retries": 1, "system": "Think."} | settings
    )
    return EndpointTeacher(expert, seed=0)


def test_every_answer_is_asked_for_once_with_a_seed_of_its_own(server, monkeypatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-canary")
    teacher = endpoint(server.url, key_env="TEACHER_KEY", temperature=0.6, max_tokens=7)
    server.answer = lambda body: said(f"{body['messages'][-1]['content']} {body['seed']}", "length")
    samples = ask(teacher, requests(range(5)))
    assert sorted(sample.key for sample in samples) == [(i, "reasoning", n) for i in range(5) for n in (0, 1)]
    assert len({body["seed"] for body in server.seen}) == 10 and all(0 <= body["seed"] < 2**31 for body in server.seen)
    assert all(sample.text == f"{sample.problem} + 1? {sample.seed}" for sample in samples)
    assert {sample.finish_reason for sample in samples} == {"length"}
    body = server.seen[0]
    assert body["messages"][0] == {"role": "system", "content": "Think."} and len(body["messages"]) == 2
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("r1", 0.6, 7) and "response_format" not in body
    assert server.keys == {"Bearer sk-canary"} and "sk-canary" not in json.dumps(teacher.record.settings)
    assert teacher.record.weights_hash is None and {sample.teacher for sample in samples} == {teacher.record.id}


def test_a_teachers_id_is_not_where_it_is(server) -> None:
    assert endpoint(server.url).record == endpoint("http://127.0.0.1:1/v1").record
    assert endpoint(server.url).record != endpoint(server.url, temperature=0.1).record


@pytest.mark.parametrize(
    ("reply", "error", "attempts"),
    [
        ((503, b"overloaded"), "HTTP 503: overloaded", 2),
        ((404, b"no such model"), "HTTP 404: no such model", 1),
        ((200, b"<html>"), "not a chat completion", 1),
        ((200, b'{"choices": []}'), "not a chat completion", 1),
        (said(None), "not a chat completion", 1),
        (said(["a", "list"]), "not a chat completion", 1),
        ((200, b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'), "lone surrogates", 1),
    ],
)
def test_what_is_no_answer_says_why_after_bounded_retries(server, reply, error, attempts) -> None:
    server.answer = lambda body: reply
    (sample,) = ask(endpoint(server.url), requests(range(1), n=1))
    assert sample.finish_reason == "error" and error in sample.error
    assert (sample.text, sample.tokens) == ("", 0) and len(server.seen) == attempts


def test_one_that_recovers_in_between_is_answered(server) -> None:
    tries: Counter[int] = Counter()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        tries[body["seed"]] += 1
        return said("fine") if tries[body["seed"]] > 1 else (500, b"")

    server.answer = answer
    samples = ask(endpoint(server.url), requests(range(3)))
    assert {sample.text for sample in samples} == {"fine"} and len(server.seen) == 12


def test_a_dead_endpoint_and_a_hung_one_cost_their_retries_and_no_more(server) -> None:
    began = time.monotonic()
    dead = ask(endpoint("http://127.0.0.1:1/v1"), requests(range(3)))
    assert len(dead) == 6 and all("refused" in sample.error for sample in dead)
    hung = threading.Event()
    server.answer = lambda body: (hung.wait(20), said("late"))[1]
    silent = ask(endpoint(server.url, timeout=0.3), requests(range(3)))
    assert len(silent) == 6 and all("timed out" in sample.error for sample in silent)
    assert len(server.seen) == 12 and time.monotonic() - began < 10
    hung.set()


def test_told_to_stop_it_asks_no_more_and_keeps_what_came(server) -> None:
    stopped = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.05)
        stopped.set()
        return said("fine")

    server.answer = answer
    samples = ask(endpoint(server.url, concurrency=2), requests(range(50)), stop=stopped.is_set)
    assert 1 <= len(samples) == len(server.seen) < 20


def test_a_key_that_is_absent_is_refused_before_anything_is_asked(monkeypatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(UserError, match=r"experts \(math\)\.key_env='TEACHER_KEY': holds no key"):
        endpoint("http://127.0.0.1:1/v1", key_env="TEACHER_KEY", domain="math")
