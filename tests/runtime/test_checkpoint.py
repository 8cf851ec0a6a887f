import json
import logging
import os
import random
import signal
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

FAILPOINTS = [
    "checkpoint/after-write",
    "checkpoint/after-fsync",
    "checkpoint/after-manifest",
    "checkpoint/between-renames",
    "checkpoint/after-rename",
]


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


def killed_at(failpoint: str, act: Callable[[], object]) -> bool:
    """Run `act` in a child that dies at `failpoint`; whether it died there."""
    pid = os.fork()
    if pid == 0:
        os.environ["FAILPOINT"] = failpoint
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_saved_checkpoint_verifies_and_returns_its_info(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert path == tmp_path / "step-000003"
    assert verify_checkpoint(path) == {"step": 3}
    assert latest_checkpoint(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("failpoint", FAILPOINTS[:3] + FAILPOINTS[4:])
def test_killed_while_saving_a_new_step_leaves_old_or_new(tmp_path: Path, failpoint: str) -> None:
    save(tmp_path, 1)
    assert killed_at(failpoint, lambda: save(tmp_path, 2))
    latest = latest_checkpoint(tmp_path)
    step = 2 if failpoint == "checkpoint/after-rename" else 1
    assert latest == tmp_path / f"step-{step:06d}"
    assert contents(latest) == {f"step {step}"}
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    save(tmp_path, 2)
    assert contents(tmp_path / "step-000002") == {"step 2"}


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_while_replacing_a_checkpoint_leaves_old_or_new(tmp_path: Path, failpoint: str) -> None:
    save(tmp_path, 1, "old")
    assert killed_at(failpoint, lambda: save(tmp_path, 1, "new"))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert contents(latest) == {"new" if failpoint == "checkpoint/after-rename" else "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_failed_write_leaves_the_old_checkpoint_and_no_leftover(tmp_path: Path) -> None:
    save(tmp_path, 1, "old")

    def full_disk(folder: Path) -> None:
        (folder / "model.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, "step-000001", full_disk, info={})
    assert contents(tmp_path / "step-000001") == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_leftover_of_a_live_process_is_not_touched(tmp_path: Path) -> None:
    live = tmp_path / f"step-000009.tmp-{os.getppid()}"
    live.mkdir()
    mine = tmp_path / "notes.tmp"
    mine.mkdir()
    save(tmp_path, 1)
    latest_checkpoint(tmp_path)
    assert live.exists() and mine.exists()


def test_flipped_byte_is_named_and_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    flip_byte(new / "shards" / "optimizer.txt")
    with pytest.raises(CheckpointError, match=r"shards/optimizer\.txt has changed"):
        verify_checkpoint(new)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == old
    assert "step-000002/shards/optimizer.txt" in caplog.text


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


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "step-000002", "step-000003"]


def test_prune_never_deletes_the_newest_verified_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_byte(tmp_path / "step-000003" / "model.txt")
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
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
