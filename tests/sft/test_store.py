"""The store: what encoding makes, made once, whole after any kill, with every row that couldn't be used on file."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sft.chat
import sft.shards
import sft.store
from recipes.tiny import make_tokenizer
from runtime.distributed import World
from runtime.errors import UserError
from sft.chat import ASSISTANT, USER, encode_conversation, encode_example
from sft.config import SFTConfig
from sft.data import load_data
from sft.mix import SourceConfig
from sft.shards import Settings, encode_chunk, write_shard
from sft.store import SourceReport, Store, build_store, tokenizer_hash

ROOT = Path(__file__).parents[2]


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TALKS = [talk(f"{i}+{i}?", f"<think>{'so ' * (i % 7)}</think>{2 * i}") for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Rows to a file of JSON lines, by name."""

    def to_file(*rows: Any, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return to_file


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Store]:
    """The store of some files, in shards of 3 rows and in this process; .encoded lists the shards it tokenised."""
    monkeypatch.setattr(sft.store, "ROWS", 3)

    def built(*paths: str, tokenizer: PreTrainedTokenizerBase = tokenizer, **options: Any) -> Store:
        built.encoded = []  # type: ignore[attr-defined]

        def watched(tokenizer: Any, chunk: Any, settings: Any) -> tuple[str, bytes]:
            built.encoded.append(chunk[0])  # type: ignore[attr-defined]
            return encode_chunk(tokenizer, chunk, settings)

        monkeypatch.setattr(sft.store, "encode_chunk", watched)
        known = dict(max_bad_fraction=options.pop("max_bad_fraction", 0.1), workers=1)
        sources = [SourceConfig(path=path, max_examples=options.pop("max_examples", None)) for path in paths]
        settings = Settings(**{"max_length": 200, **options})
        console = Console(file=io.StringIO())
        return build_store(sources, tokenizer, tmp_path / "store", settings=settings, console=console, **known)

    return built


def contents(store: Store) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), trained.tolist()) for ids, trained in store]


def test_samples_are_what_encoding_makes_of_the_rows(write, build, tokenizer) -> None:
    again = {"role": "user", "content": "Again?"}
    longer = [*TALKS[0]["messages"], again]
    other = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": longer, "completion": TALKS[1]["messages"][1:]},
        {"messages": [*longer, *TALKS[1]["messages"][1:]]},
    ]
    store = build(write(*TALKS), write(*other, name="other.jsonl"))
    wants = [encode_conversation(tokenizer, row["messages"]) for row in TALKS]
    wants.append(encode_example(tokenizer, "2+2=", "4"))
    wants += [
        encode_conversation(tokenizer, other[2]["messages"], train_turns="last"),  # the prompt isn't trained
        encode_conversation(tokenizer, other[2]["messages"]),
    ]
    assert contents(store) == wants
    assert len(store) == 23 and store.sizes == [20, 3] and store.source_of.tolist() == [0] * 20 + [1] * 3
    assert store.lengths.tolist() == [len(ids) for ids, _ in wants]
    ids, trained = store[5]
    assert (ids.dtype, trained.dtype, store.lengths.dtype) == (np.int32, np.bool_, np.int32)
    row_ids, row_trained = store.gather([21, 0, 7])
    assert row_ids.tolist() == wants[21][0] + wants[0][0] + wants[7][0]
    assert row_trained.tolist() == wants[21][1] + wants[0][1] + wants[7][1]


def test_only_the_last_turn_is_trained_where_that_is_asked(write, build, tokenizer) -> None:
    messages = [*TALKS[0]["messages"], *TALKS[1]["messages"]]
    (made,) = contents(build(write({"messages": messages}), train_turns="last"))
    assert made == encode_conversation(tokenizer, messages, train_turns="last")


@pytest.mark.parametrize("index", [-1, 20])
def test_a_sample_that_is_not_there_is_an_index_error(write, build, index: int) -> None:
    with pytest.raises(IndexError, match=rf"samples \[{index}\]: there are 20, from 0"):
        build(write(*TALKS))[index]


BAD = {
    b'{"messages": [': "broken JSON",
    b'"\xff"': "broken UTF-8",
    b'{"messages": [{"role": "user", "content": "\\u001b[2J\\u202e<script>"}]}': "no assistant turn",
    json.dumps(talk("2+2?", "4" * 300)).encode(): "longer than 200 tokens",
}


def test_rows_that_cannot_be_used_are_on_file_with_line_and_reason(write, build) -> None:
    rows: list[Any] = [*TALKS[:5], *BAD, b"", *TALKS[5:]]
    store = build(path := write(*rows), max_bad_fraction=0.2)
    (source,) = store.sources
    assert (source.samples, source.rows, source.tokens) == (20, 24, store.lengths.sum())
    assert source.rejects == dict.fromkeys(BAD.values(), 1)
    assert store.where(4) == (path, 5) and store.where(5) == (path, 11)  # behind four bad rows and a blank line
    raw = (source.folder / "rejects.jsonl").read_bytes()
    assert raw.isascii() and b"\x1b" not in raw
    found = [json.loads(line) for line in raw.splitlines()]
    assert [(row["source"], row["line"], row["reason"]) for row in found] == [
        (path, line, reason) for line, reason in enumerate(BAD.values(), start=6)
    ]
    assert all(row["excerpt"] for row in found)
    assert "20 samples" in source.summary() and "1 set aside: broken UTF-8" in source.summary()


def test_too_many_bad_rows_stop_the_run_early_and_name_the_reasons(write, build) -> None:
    path = write(*[b"{}"] * 9, *[b"[1]"] * 4, *TALKS * 5)
    with pytest.raises(UserError) as raised:
        build(path, max_bad_fraction=0.05)
    said = str(raised.value)
    assert "more than max_bad_fraction=0.05 allows: 6 × no messages, no prompt and completion" in said
    assert "line 1: '{}'" in said
    assert build.encoded == [0, 1]  # 6 of 114 are more than 5 %: the rest isn't even read
    rejects = Path(said.split("repair: ")[1])
    assert len(rejects.read_text().splitlines()) == 6
    store = build(path, max_bad_fraction=0.2)
    assert len(store) == 100 and store.sources[0].rejects["not an object but of type list"] == 4
    assert min(build.encoded) == 2  # what was done is kept
    with pytest.raises(UserError, match=r"13 of 113 rows can't be used, more than max_bad_fraction=0.1 allows: 9 ×"):
        build(path)
    assert build.encoded == []


def test_a_source_without_a_usable_row_is_refused(write, build, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl': holds no rows"):
        build(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"2 of 2 rows can't be used: 2 × no assistant turn\. The first"):
        build(write(*[{"messages": []}] * 2), max_bad_fraction=1)


def test_a_longer_sample_is_set_aside_or_loses_its_end(write, build, tokenizer) -> None:
    path = write(*TALKS, talk("2+2?", "4" * 300), talk("long " * 300, "4"))
    rejected = build(path).sources[0].rejects
    assert rejected == {"longer than 200 tokens": 2}
    store = build(path, too_long="truncate")
    assert store.sources[0].rejects == {"no trained token": 1}
    ids, trained = encode_conversation(tokenizer, talk("2+2?", "4" * 300)["messages"])
    assert contents(store)[20] == (ids[:200], trained[:200])


def test_rows_that_wait_for_people_are_set_aside_unless_asked_for(write, build, tokenizer) -> None:
    waiting = [{**row, "reviewed": False} for row in TALKS[:8]]
    done = [{**TALKS[8], "reviewed": True}, {**TALKS[9], "reviewed": None}, *TALKS[10:15]]
    path = write(*waiting, *done)  # more than half: they don't count as bad
    store = build(path)
    assert store.sources[0].summary().endswith("; 8 set aside: not reviewed yet")
    wants = [encode_conversation(tokenizer, row["messages"]) for row in TALKS[:15]]
    assert contents(store) == wants[8:]
    assert contents(build(path, unreviewed="keep")) == wants
    with pytest.raises(UserError, match=r"8 of 8 rows wait for review, and none is left; .*distill review.*keep"):
        build(write(*waiting, name="waiting.jsonl"))
    with pytest.raises(UserError, match=r"2 of 17 rows can't be used, more than.*: 2 × broken JSON\. The first"):
        build(write(*waiting, *TALKS[:6], b"{", b"{", name="broken.jsonl"))


def test_a_run_trains_on_what_was_reviewed_even_if_it_comes_late(write, tokenizer, tmp_path: Path) -> None:
    waiting = [{**TALKS[0], "reviewed": False}] * 70  # more than are checked before a run
    config = SFTConfig(
        mix=(write(*waiting, {**TALKS[1], "reviewed": True}),), token_cache=str(tmp_path), row_length=200, workers=1
    )
    data = load_data(config, tokenizer, World())
    assert contents(data.train) == [encode_conversation(tokenizer, TALKS[1]["messages"])]
    keep = dataclasses.replace(config, unreviewed="keep")
    assert len(load_data(keep, tokenizer, World()).train) == 71


def test_what_a_template_refuses_is_a_bad_row_and_its_words_are_shown(write, build) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never say ' + m.content) }}{% endif %}"
        "{{ '" + USER + "' if m.role == 'user' else '" + ASSISTANT + "' }}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
    )
    path = write(*TALKS, talk("no", "4"))
    assert len(build(path, tokenizer=tokenizer)) == 20
    with pytest.raises(UserError, match=r"1 × the chat template refuses it.*never say no"):
        build(path, tokenizer=tokenizer, max_bad_fraction=0)


def test_a_second_run_tokenises_nothing(write, build) -> None:
    first = contents(build(write(*TALKS)))
    assert build.encoded == list(range(7))
    again = build(write(*TALKS, name="moved.jsonl"))  # the same content
    assert build.encoded == [] and contents(again) == first
    assert again.where(0)[0].endswith("moved.jsonl")


def test_the_tokenizers_hash_survives_use_and_saving(tokenizer, tmp_path: Path) -> None:
    fresh = make_tokenizer()
    before = tokenizer_hash(fresh)
    encode_conversation(fresh, TALKS[0]["messages"])
    fresh(["a", "b b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(fresh) == before
    fresh.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before


def with_another_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["2+2"])


def with_another_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template += " "


@pytest.mark.parametrize("change", [with_another_token, with_another_template])
def test_another_tokenizer_or_template_makes_another_store(write, build, change) -> None:
    build(write(*TALKS))
    other = make_tokenizer()
    change(other)
    build(write(*TALKS), tokenizer=other)
    assert build.encoded == list(range(7))


@pytest.mark.parametrize(
    "options", [dict(max_length=100), dict(train_turns="last"), dict(too_long="truncate"), dict(unreviewed="keep")]
)
def test_other_settings_make_another_store(write, build, options) -> None:
    build(write(*TALKS))
    build(write(*TALKS), **options)
    assert build.encoded == list(range(7))


def test_other_rows_make_another_store(write, build) -> None:
    build(write(*TALKS))
    build(write(*TALKS[:-1], talk("19+19?", "39")))
    assert build.encoded == list(range(7))
    assert len(build(write(*TALKS), max_examples=4)) == 4 and build.encoded == [0, 1]


@pytest.mark.parametrize("where", ["sft.chat.ENCODING", "sft.store.FORMAT", "tokenizers.__version__"])
def test_another_version_of_the_code_makes_another_store(write, build, monkeypatch, where: str) -> None:
    build(write(*TALKS))
    monkeypatch.setattr(where, "another")
    build(write(*TALKS))
    assert build.encoded == list(range(7))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_shard_is_found_and_made_again(write, build, damage, caplog) -> None:
    store = build(write(*TALKS))
    first, shard = contents(store), store.sources[0].shards[4]
    damage(store.sources[0].folder / shard)
    assert contents(build(write(*TALKS))) == first
    assert build.encoded == [4]
    assert f"damaged, made again: {shard}" in caplog.text


def test_a_broken_report_is_made_again_from_the_shards(write, build) -> None:
    store = build(write(*TALKS))
    (store.sources[0].folder / "source.json").write_text("{")
    assert contents(build(write(*TALKS))) == contents(store) and build.encoded == []


def test_only_so_many_files_are_open_at_once(write, build, monkeypatch) -> None:
    monkeypatch.setattr(sft.store, "MOST_OPEN", 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = build(write(*TALKS))
    wants = contents(store)
    for index in [0, 19, 3, 7, 12, 5, 0, 16, 9, 19]:
        assert [part.tolist() for part in store[index]] == list(wants[index])
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


def test_a_file_cut_short_under_a_store_is_no_sample(write, build) -> None:
    store = build(write(*TALKS))
    os.truncate(store.sources[0].folder / store.sources[0].shards[2], 500)
    with pytest.raises(OSError, match=r"cut short while it was in use.*000002-"):
        store[8]


def resident() -> int:
    """Memory of this process, bytes."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_samples_that_were_read_are_not_held(tmp_path: Path) -> None:
    """164 MB are read; a mapping would hold them."""
    shards, samples = [], 2000
    for number in range(5):
        sample = (np.full(4096, number, np.int32), [0, 1, 4095, 4096])
        name, data = write_shard(number, [sample] * samples, range(1, samples + 1))
        (tmp_path / name).write_bytes(data)
        shards.append(name)
    del data
    report = SourceReport(name="x", folder=tmp_path, shards=tuple(shards), samples=10_000, tokens=0, rejects={})
    store = Store([report])
    before = resident()
    for index in range(len(store)):
        ids, trained = store[index]
        assert ids[0] == ids[-1] == index // samples and trained.nonzero()[0].tolist() == [0, 4095]
    assert resident() - before < 20e6


def test_a_wrong_setting_is_named(write, build) -> None:
    with pytest.raises(UserError, match="max_length=1: a sample has a prompt and a target: at least 2"):
        build(write(*TALKS), max_length=1)
    with pytest.raises(UserError, match="max_bad_fraction=2: a share, from 0 to 1"):
        build(write(*TALKS), max_bad_fraction=2)
    with pytest.raises(UserError, match="at least one source"):
        build()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < seconds
        time.sleep(0.002)
    return value


SETTINGS = Settings(max_length=200)
CHUNKS = [(n, [(i, row) for i, row in enumerate(TALKS)]) for n in range(6)]


def test_processes_make_the_same_shards_as_one(tokenizer) -> None:
    before = set(children(os.getpid()))  # other tests' servers
    made = dict(sft.store._in_processes(iter(CHUNKS), tokenizer, SETTINGS, 2))
    assert made == dict(encode_chunk(tokenizer, chunk, SETTINGS) for chunk in CHUNKS)
    assert set(children(os.getpid())) <= before


def test_a_process_that_fails_or_is_killed_ends_the_run(tokenizer) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a tokenising process failed:.*Traceback.*TypeError"):
        list(sft.store._in_processes(iter([(0, [(1, TALKS[0])]), (1, None)]), tokenizer, SETTINGS, 1))  # type: ignore[list-item]

    others = set(children(os.getpid()))  # other tests' servers

    def chunks() -> Iterator[Any]:
        yield CHUNKS[0]
        for child in set(children(os.getpid())) - others:
            os.kill(child, signal.SIGKILL)
            until(lambda child=child: not alive(child))
        yield CHUNKS[1]

    with pytest.raises(RuntimeError, match="a tokenising process was killed, perhaps for want of memory"):
        list(sft.store._in_processes(chunks(), tokenizer, SETTINGS, 1))


SCRIPT = """
import io, os, sys
from pathlib import Path
from rich.console import Console
from transformers import AutoTokenizer
import sft.store
from sft.mix import SourceConfig

rows, folder = map(Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

def build(store=folder / "store", **options):
    settings = sft.store.Settings(max_length=200)
    sources, console = [SourceConfig(path=str(rows))], Console(file=io.StringIO())
    return sft.store.build_store(sources, tokenizer, store, settings=settings, console=console, **options)
"""


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where SCRIPT finds its tokenizer and makes its stores."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


EVERY_PASS = (
    SCRIPT
    + """
sft.store.ROWS = 3

def child(work, **environment):
    pid = os.fork()
    if not pid:
        os.environ.update(environment)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def whole(store):
    return {path.name: path.stat().st_mtime_ns for path in store.glob("*/*.arrow")}

def samples(store):
    return repr([(ids.tolist(), trained.tolist()) for ids, trained in build(store, workers=1)])

log = folder / "log"
assert child(lambda: (folder / "whole").write_text(samples(folder / "first")), FAILPOINT_LOG=str(log)) == 0
names = log.read_text().split()
for n, name in enumerate(names):
    point, store = f"{name}:{names[: n + 1].count(name)}", folder / str(n)
    assert child(lambda: build(store, workers=1), FAILPOINT=point) == 9, point
    before = whole(store)
    assert child(lambda: (folder / "again").write_text(samples(store))) == 0, point
    assert (folder / "again").read_text() == (folder / "whole").read_text(), point
    after = whole(store)
    assert len(after) == 3 and before.items() <= after.items(), point
    assert not list(store.glob("*/.*.tmp")), point
print(len(names))
"""
)


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_any_write_the_next_run_goes_on_and_ends_the_same(write, folder: Path) -> None:
    passes = int(run(EVERY_PASS, write(*TALKS[:8]), folder))
    assert passes >= 3 * 5  # each of three shards, the rejects and the report: before fsync, rename, folder's fsync


WITH_WORKERS = SCRIPT + "sft.store.ROWS, sft.store.IN_PLACE_SECONDS = 20, 0\nbuild(workers=2)\n"


def test_killed_among_its_workers_it_leaves_none_and_the_next_run_goes_on(
    write, build, folder: Path, monkeypatch
) -> None:
    rows, store = write(*TALKS * 100), folder / "store"
    process = subprocess.Popen([sys.executable, "-c", WITH_WORKERS, rows, folder], cwd=ROOT)
    until(lambda: len(list(store.glob("*/*.arrow"))) >= 3)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    until(lambda: not any(map(alive, workers)))
    there = len(list(store.glob("*/*.arrow")))
    monkeypatch.setattr(sft.store, "ROWS", 20)
    resumed = build(rows)
    assert 3 <= there < 100 and len(build.encoded) == 100 - there
    monkeypatch.setattr(sft.store, "ROWS", 500)
    assert contents(resumed) == contents(build(rows))


TOGETHER = (
    SCRIPT
    + """
sft.store.ROWS = 3
encode = sft.store.encode_chunk

def slowly(*arguments):
    import time
    time.sleep(0.2)
    print("encoded", flush=True)
    return encode(*arguments)

sft.store.encode_chunk = slowly
pids = [os.fork() or (build(workers=1), os._exit(0)) for _ in range(3)]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
"""
)


def test_processes_that_build_the_same_store_at_once_share_the_work(write, folder: Path) -> None:
    assert run(TOGETHER, write(*TALKS), folder).count("encoded") == 7
