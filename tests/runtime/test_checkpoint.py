import errno
import itertools
import json
import logging
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_state,
    prune_checkpoints,
    rng_state,
    save_checkpoint,
    save_state,
    set_rng_state,
    verify_checkpoint,
)
from runtime.errors import DiskError
from runtime.interrupt import ECHO, Interrupt


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "shards").mkdir()
        (folder / "model.txt").write_text(text)
        (folder / "shards" / "optimizer.txt").write_text(text)

    return write


def save(folder: Path, step: int, text: str | None = None) -> Path:
    return save_checkpoint(folder, f"step-{step:06d}", writer(text or f"step {step}"), info={"step": step})


def contents(path: Path) -> set[str]:
    return {(path / "model.txt").read_text(), (path / "shards" / "optimizer.txt").read_text()}


def child(act: Callable[[], object], **environment: str) -> int:
    """Start `act` in a child with these variables; its pid."""
    if (pid := os.fork()) == 0:
        os.environ.update(environment)
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """How a child ended: 0, 1 when it raised, -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def passes(act: Callable[[], object], log: Path) -> list[str]:
    """Every pass of a failpoint in `act`, in order, as FAILPOINT takes it: name:n."""
    assert ended(child(act, FAILPOINT_LOG=str(log))) == 0
    names = log.read_text().split()
    return [f"{name}:{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".tmp-" in p.name or ".old-" in p.name]


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_saved_checkpoint_verifies_and_returns_its_info(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert path == tmp_path / "step-000003"
    assert verify_checkpoint(path) == {"step": 3}
    assert latest_checkpoint(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000003"]


@pytest.mark.parametrize("step", [1, 2], ids=["replaced", "new"])
def test_killed_anywhere_while_saving_leaves_old_or_new(tmp_path: Path, step: int) -> None:
    def act(folder: Path) -> None:
        save(folder, step, "new")
        prune_checkpoints(folder, keep=1)

    save(tmp_path / "log", 1, "old")
    every_pass = passes(lambda: act(tmp_path / "log"), tmp_path / "passes")
    assert {p.split("/")[0] for p in every_pass} == {"checkpoint", "file"} | ({"prune"} if step == 2 else set())
    found = []
    for number, failpoint in enumerate(every_pass):
        folder = tmp_path / str(number)
        save(folder, 1, "old")
        assert ended(child(lambda folder=folder: act(folder), FAILPOINT=failpoint)) == -signal.SIGKILL, failpoint
        latest = latest_checkpoint(folder)
        assert latest is not None
        (text,) = contents(latest)
        found.append(text)
        assert latest.name == f"step-{step if text == 'new' else 1:06d}"
        assert leftovers(folder) == []
        act(folder)
        assert contents(folder / f"step-{step:06d}") == {"new"}
    renamed = every_pass.index("checkpoint/before-fsync-parent:1")
    assert found == ["old"] * renamed + ["new"] * (len(found) - renamed)


def test_killed_while_a_checkpoint_is_put_back_leaves_it(tmp_path: Path) -> None:
    save(tmp_path, 1, "old")
    ended(child(lambda: save(tmp_path, 1, "new"), FAILPOINT="checkpoint/before-rename"))
    put_back = "checkpoint/before-put-back"
    assert ended(child(lambda: latest_checkpoint(tmp_path), FAILPOINT=put_back)) == -signal.SIGKILL
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and contents(latest) == {"old"}


def test_first_sigterm_anywhere_while_saving_lets_the_save_finish(tmp_path: Path) -> None:
    def act(folder: Path) -> None:
        with Interrupt() as interrupt:
            save(folder, 1, "new")
            (folder / "requested").write_text(str(interrupt.requested))

    for number, failpoint in enumerate(passes(lambda: act(tmp_path / "log"), tmp_path / "passes")):
        folder = tmp_path / str(number)
        save(folder, 1, "old")
        environment = dict(FAILPOINT=failpoint, FAILPOINT_SIGNAL="SIGTERM")
        assert ended(child(lambda folder=folder: act(folder), **environment)) == 0
        assert (folder / "requested").read_text() == "True", failpoint
        assert contents(folder / "step-000001") == {"new"} and leftovers(folder) == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_anywhere_while_saving_leaves_old_or_new(tmp_path: Path, second: signal.Signals) -> None:
    def act(folder: Path) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.requested
            time.sleep(ECHO + 0.1)
            save(folder, 1, "new")

    save(tmp_path / "log", 1, "old")
    children = {}
    for number, failpoint in enumerate(passes(lambda: save(tmp_path / "log", 1, "new"), tmp_path / "passes")):
        folder = tmp_path / str(number)
        save(folder, 1, "old")
        environment = dict(FAILPOINT=failpoint, FAILPOINT_SIGNAL=second.name)
        children[failpoint] = child(lambda folder=folder: act(folder), **environment), folder
    found = []
    for failpoint, (pid, folder) in children.items():
        # Ctrl-C is an exception: it cleans up on its way out.
        assert ended(pid) == (-signal.SIGTERM if second == signal.SIGTERM else 1)
        if second == signal.SIGINT:
            assert [name for name in leftovers(folder) if ".tmp-" in name] == [], failpoint
            assert (folder / "step-000001").exists(), failpoint
        latest = latest_checkpoint(folder)
        assert latest is not None
        found += contents(latest)
    assert sorted(found, reverse=True) == found and set(found) == {"old", "new"}


def test_nothing_is_renamed_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was fsynced: bytes of a file, entries of a folder. SIGKILL can't show that."""
    events: list[tuple[str, ...]] = []
    fsync, rename = os.fsync, os.rename

    def held(path: Path) -> str:
        return path.read_text() if path.is_file() else str(sorted(p.name for p in path.iterdir()))

    def recorded_fsync(fd: int) -> None:
        fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        events.append(("fsync", str(path), held(path)))

    def recorded_rename(old: Path, new: Path) -> None:
        rename(old, new)
        events.append(("rename", str(old), str(new)))

    def write(folder: Path) -> None:
        (folder / "a" / "b").mkdir(parents=True)  # `a` holds no file of its own
        (folder / "empty").mkdir()
        (folder / "a" / "b" / "shard").write_text("bytes")
        (folder / "model").write_text("bytes")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    parent = tmp_path / "run" / "checkpoints"
    final = save_checkpoint(parent, "step-000001", write, info={})
    (aside,) = (Path(event[1]) for event in events if event[0] == "rename" and event[2] == str(final))
    at = events.index(("rename", str(aside), str(final)))
    durable = {path: content for kind, path, content in events[:at] if kind == "fsync"}
    for path in [final, *final.rglob("*")]:
        assert durable.get(str(aside / path.relative_to(final))) == held(path), path
    after = [event[1] for event in events[at:] if event[0] == "fsync"]
    assert after[0] == str(parent)
    assert {str(tmp_path), str(tmp_path / "run")} <= durable.keys()  # the folders made on the way


def test_failed_write_leaves_the_old_checkpoint_and_no_leftover(tmp_path: Path) -> None:
    save(tmp_path, 1, "old")

    def full_disk(folder: Path) -> None:
        (folder / "model.txt").write_text("half")
        with Path("/dev/full").open("w") as f:
            f.write("the other half")

    with pytest.raises(DiskError, match=r"step-000001: No space left on device; free space$") as error:
        save_checkpoint(tmp_path, "step-000001", full_disk, info={})
    assert error.value.errno == errno.ENOSPC
    assert contents(tmp_path / "step-000001") == {"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_error_that_is_not_the_disks_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path, "step-000001", lambda folder: (folder / "absent").unlink(), info={})


@pytest.mark.parametrize(("limit", "too_large"), [(400, "s.safetensors"), (400, "manifest.json"), (0, "s.json")])
def test_file_size_limit_leaves_the_old_checkpoint(tmp_path: Path, limit: int, too_large: str) -> None:
    """safetensors writes in Rust and raises its own exception, the rest is Python's."""
    tensor = torch.zeros(600 if too_large == "s.safetensors" else 1, dtype=torch.uint8)
    info = {"note": "x" * 600 if too_large == "manifest.json" else ""}
    old = save(tmp_path, 1)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write = lambda folder: save_state(folder, "s", {"t": tensor})  # noqa: E731
        with pytest.raises(DiskError, match=r"step-000002: File too large; raise the limit"):
            save_checkpoint(tmp_path, "step-000002", write, info=info)

    assert ended(child(act)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert latest_checkpoint(tmp_path) == old


def test_full_disk_leaves_the_old_checkpoint_and_room_for_it(small_disk: Callable[..., list[str]]) -> None:
    code = (
        "import os, sys, torch; from runtime.checkpoint import latest_checkpoint, save_checkpoint, save_state\n"
        "from runtime.errors import DiskError\n"
        "def save(step, numbers):\n"
        "    write = lambda folder: save_state(folder, 's', {'t': torch.ones(numbers)})\n"
        "    save_checkpoint(sys.argv[1], f'step-{step:06d}', write, info={})\n"
        "save(1, 20)\n"
        "try: save(2, 1_000_000)\n"
        "except DiskError as error: print(error)\n"
        "print(sorted(os.listdir(sys.argv[1])), latest_checkpoint(sys.argv[1]).name)\n"
        "save(2, 20); print(latest_checkpoint(sys.argv[1]).name)"
    )
    said, state, again = small_disk(code)
    assert said.endswith("step-000002: No space left on device; free space")
    assert state == "['latest', 'step-000001'] step-000001"
    assert again == "step-000002"


def test_leftover_of_a_live_process_is_not_touched_by_a_save(tmp_path: Path) -> None:
    live = tmp_path / f"step-000009.tmp-{os.getppid()}"
    live.mkdir()
    mine = tmp_path / "notes.tmp"
    mine.mkdir()
    save(tmp_path, 1)
    assert live.exists() and mine.exists()


def test_resume_is_not_fooled_by_a_reused_pid(tmp_path: Path) -> None:
    """In the next container the number of the process that died belongs to somebody else, who lives."""
    whole = save(tmp_path, 1)
    whole.rename(tmp_path / f"step-000001.old-{os.getppid()}")
    assert latest_checkpoint(tmp_path) == whole
    assert contents(whole) == {"step 1"}


def test_flipped_byte_is_named_and_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    flip_byte(new / "shards" / "optimizer.txt")
    with pytest.raises(CheckpointError, match=r"shards/optimizer\.txt has changed"):
        verify_checkpoint(new)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == old
    assert "step-000002/shards/optimizer.txt" in caplog.text


def whole_state(folder: Path) -> None:
    """Every kind of file a run saves."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    save_state(folder, "optimizer", optimizer.state_dict())
    save_state(folder, "trainer", {"step": 2, "rng": rng_state()})
    save_state(folder, "model", {"weight": torch.ones(3)})
    (folder / "adapter").mkdir()
    save_state(folder / "adapter", "adapter_model", {"weight": torch.ones(3)})
    (folder / "tokenizer.json").write_text("{}")


def test_flipped_bit_in_any_file_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = save_checkpoint(tmp_path, "step-000001", whole_state, info={})
    new = save_checkpoint(tmp_path, "step-000002", whole_state, info={})
    names = sorted(p for p in new.rglob("*") if p.is_file())
    assert len(names) == 10 and new / "manifest.json" in names
    for path in names:
        flip_byte(path)
        caplog.clear()
        assert latest_checkpoint(tmp_path) == old
        assert f"damaged checkpoint: {path}" in caplog.text and "falling back" in caplog.text
        flip_byte(path)
    assert latest_checkpoint(tmp_path) == new


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    for position, bit in itertools.product(range(len(data)), range(8)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            verify_checkpoint(path.parent)


def test_unreadable_file_is_damage(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / "manifest.json").unlink()
    (new / "manifest.json").symlink_to("/proc/self/mem")  # reading its first byte is an I/O error
    with pytest.raises(CheckpointError, match=r"can't be read .*Input/output error"):
        verify_checkpoint(new)
    assert latest_checkpoint(tmp_path) == old


def test_lost_checkpoints_are_not_a_fresh_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.rename(tmp_path.parent / f"{tmp_path.name}-new")
    assert latest_checkpoint(tmp_path) == old
    assert f"{new} was saved and is gone; falling back" in caplog.text
    old.rename(tmp_path.parent / f"{tmp_path.name}-old")
    with pytest.raises(CheckpointError, match=r"step-000002 is gone; put it back, or give another run_dir"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("failpoint", ["checkpoint/before-remove-old", "file/before-rename"])
def test_a_pointer_that_a_killed_save_left_behind_is_brought_up_to_date(tmp_path: Path, failpoint: str) -> None:
    save(tmp_path, 1)
    assert ended(child(lambda: save(tmp_path, 2), FAILPOINT=failpoint)) == -signal.SIGKILL
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert (tmp_path / "latest").read_text() == "step-000002\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001", "step-000002"]
    (tmp_path / "step-000002/model.txt").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    assert (tmp_path / "latest").read_text() == "step-000002\n"  # what was saved once stays known


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    missing, short = save(tmp_path, 1), save(tmp_path, 2)
    (missing / "model.txt").unlink()
    os.truncate(short / "model.txt", 2)
    with pytest.raises(CheckpointError, match=r"model\.txt is missing"):
        verify_checkpoint(missing)
    with pytest.raises(CheckpointError, match=r"model\.txt has 2 bytes, its manifest says 6"):
        verify_checkpoint(short)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged"):
        latest_checkpoint(tmp_path)


def test_edited_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(CheckpointError, match=r"manifest\.json has changed"):
        verify_checkpoint(path)


def test_no_checkpoint_yet_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert latest_checkpoint(tmp_path) is None
    assert "no checkpoint was saved yet; starting at the beginning" in caplog.text
    assert latest_checkpoint(tmp_path / "absent") is None


def test_latest_is_by_number_not_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "step-999999", writer("a"), info={})
    newest = save_checkpoint(tmp_path, "step-1000000", writer("b"), info={})
    assert latest_checkpoint(tmp_path) == newest


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    save_checkpoint(tmp_path, "final", writer("final"), info={})
    assert [p.name for p in prune_checkpoints(tmp_path, keep=2)] == ["step-000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "latest", "step-000002", "step-000003"]


def test_prune_never_deletes_the_newest_verified_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_byte(tmp_path / "step-000003" / "model.txt")
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]
    flip_byte(tmp_path / "step-000002" / "model.txt")
    assert prune_checkpoints(tmp_path, keep=1) == []
    with pytest.raises(ValueError, match="keep=0"):
        prune_checkpoints(tmp_path, keep=0)


def test_state_keeps_types_and_bits(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "mixed": {0: "int key", "0": "str key", "$tensor": None},
        "nested": [(1, (2.5, [True])), {}, [], ()],
        "floats": [0.1 + 0.2, float("inf"), float("nan"), -0.0],
        "bf16": torch.tensor([1.0, -3.0], dtype=torch.bfloat16),
        "views": [shared[:3], shared[2:], shared.view(2, 3).T],
        "empty": [torch.empty(0), torch.empty(0, 4)],
        "big": 2**70,
    }
    save_state(tmp_path, "s", state)
    back = load_state(tmp_path, "s")
    assert back["mixed"] == state["mixed"] and back["nested"] == state["nested"] and back["big"] == 2**70
    assert str(back["floats"]) == str(state["floats"])
    assert back["bf16"].dtype == torch.bfloat16 and torch.equal(back["bf16"], state["bf16"])
    assert all(map(torch.equal, back["views"], state["views"]))
    assert [t.shape for t in back["empty"]] == [t.shape for t in state["empty"]]
    json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)  # no NaN literals


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Muon])
def test_optimizer_goes_on_bit_for_bit(tmp_path: Path, optimizer_class: type[torch.optim.Optimizer]) -> None:
    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        weight.grad = weight.detach().sin()
        optimizer.step()

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.1)
    step(weight, optimizer)
    save_state(tmp_path, "optimizer", {"optimizer": optimizer.state_dict(), "weight": weight})

    loaded = load_state(tmp_path, "optimizer")
    saved = optimizer.state_dict()
    assert loaded["optimizer"]["param_groups"] == saved["param_groups"]
    assert list(loaded["optimizer"]["state"]) == [0]
    for key, value in saved["state"][0].items():
        assert torch.equal(loaded["optimizer"]["state"][0][key], value)
    again = torch.nn.Parameter(loaded["weight"])
    resumed = optimizer_class([again], lr=9.0)
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        step(weight, optimizer)
        step(again, resumed)
    assert torch.equal(weight, again)


def test_unserialisable_value_is_named_by_its_key_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'groups'\.1\.'lr'=.*function"):
        save_state(tmp_path, "s", {"groups": [{}, {"lr": writer}]})
    with pytest.raises(ValueError, match=r"'a': key 1\.5 is a float"):
        save_state(tmp_path, "s", {"a": {1.5: 0}})
    with pytest.raises(ValueError, match=r"'n'.*int64"):
        save_state(tmp_path, "s", {"n": np.int64(3)})


def test_absent_and_cut_state_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"s\.json"):
        load_state(tmp_path, "s")
    save_state(tmp_path, "s", {"a": torch.ones(3)})
    os.truncate(tmp_path / "s.safetensors", 20)
    with pytest.raises(CheckpointError, match=r"s\.safetensors"):
        load_state(tmp_path, "s")


def test_random_draws_go_on_after_a_restore(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item(), random.random()]

    before = rng_state()
    draws()  # gauss and standard_normal now hold a second value back: part of the state
    save_state(tmp_path, "rng", rng_state())
    expected = [draws(), draws()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    set_rng_state(load_state(tmp_path, "rng"))
    assert [draws(), draws()] == expected
    set_rng_state(before)
