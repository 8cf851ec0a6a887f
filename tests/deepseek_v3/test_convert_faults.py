"""Checkpoints that aren't whole are refused by name; conversions that die are taken up; memory stays small."""

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import deepseek_v3
from deepseek_v3 import convert_shards
from deepseek_v3.convert import convert, main
from deepseek_v3.convert_folder import read_folder
from deepseek_v3.convert_record import alone
from deepseek_v3.convert_tensors import CheckpointFault, expected_tensors

WEIGHT = "model.layers.1.self_attn.o_proj.weight"
SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def bf16(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "bf16"
    make(num_nextn_predict_layers=1).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def fp8(bf16):
    convert(bf16, bf16.with_name("fp8"), "fp8", shard_bytes=SHARD_BYTES)
    return bf16.with_name("fp8")


@pytest.fixture
def broken(request, tmp_path):
    """broken("fp8", change): a copy of that folder, of one file and without an index, after change(tensors, config)."""

    def make_broken(precision, change):
        source, folder = request.getfixturevalue(precision), tmp_path / "broken"
        folder.mkdir()
        tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
        config = json.loads((source / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "all.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make_broken


def lose(name):
    return lambda tensors, config: tensors.pop(name)


def put(name, make):
    return lambda tensors, config: tensors.update({name: make(tensors.get(name))})


def configure(**fields):
    return lambda tensors, config: config.update(fields)


def lose_mtp(tensors, config):
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


SCALES = "quantization_config"
FAULTS = {
    "missing": ("bf16", lose(WEIGHT), [WEIGHT, "is missing", "download"]),
    "missing expert": ("bf16", lose("model.layers.2.mlp.experts.7.up_proj.weight"), ["experts.7.up_proj", "missing"]),
    "missing in the MTP layer": ("bf16", lose("model.layers.3.eh_proj.weight"), ["layers.3.eh_proj", "missing"]),
    "missing scale": ("fp8", lose(f"{WEIGHT}_scale_inv"), [f"{WEIGHT}_scale_inv is missing", "scales"]),
    "extra": ("bf16", put("model.layers.0.mlp.gate.weight", lambda _: torch.ones(8, 2)),
              ["layers.0.mlp.gate", "no tensor of"]),
    "shape": ("bf16", put(WEIGHT, lambda w: w.T.contiguous()), [WEIGHT, "[64, 32]", "[32, 64]"]),
    "scale's shape": ("fp8", put(f"{WEIGHT}_scale_inv", lambda s: s.repeat(2, 1)), ["scale_inv", "[2, 1]", "[1, 1]"]),
    "dtype": ("bf16", put(WEIGHT, lambda w: w.half()), [WEIGHT, "F16", "BF16 or F32"]),
    "not quantised": ("fp8", put(WEIGHT, lambda w: w.bfloat16()), [WEIGHT, "BF16", "F8_E4M3", SCALES]),
    "unannounced FP8": ("fp8", lambda _, config: config.pop(SCALES), [WEIGHT, "F8_E4M3", SCALES]),
    "rounded bias": (
        "bf16",
        put("model.layers.1.mlp.gate.e_score_correction_bias", lambda b: b.bfloat16()),
        ["layers.1.mlp.gate.e_score_correction_bias", "BF16", "F32", "fp32"],
    ),
    "no MTP layer": ("bf16", lose_mtp, ["num_nextn_predict_layers=1", "model.layers.3.", "--drop_mtp"]),
    "unannounced MTP layer": ("bf16", configure(num_nextn_predict_layers=0), ["layers.3.enorm", "--drop_mtp"]),
    "another model's config": ("bf16", configure(hidden_size=48), ["model.embed_tokens", "[64, 32]", "[64, 48]"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_file_and_remedy(broken, tmp_path, capsys, fault):
    precision, change, said = FAULTS[fault]
    folder = broken(precision, change)
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in ["broken", *said]), error
    assert main(["official", str(folder), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err.endswith(error)
    assert not (tmp_path / "target").exists()


REFUSALS = {
    "another model": (configure(model_type="qwen3"), ["config.json", "qwen3"]),
    "other blocks": (configure(quantization_config={"weight_block_size": [64, 64]}), ["weight_block_size=[64, 64]"]),
    "two further tokens": (configure(num_nextn_predict_layers=2), ["num_nextn_predict_layers=2"]),
    "words for numbers": (configure(hidden_size="wide"), ["config.json", "hidden_size", "wide", "int"]),
    "a negative size": (configure(hidden_size=-1), ["config.json", "negative dimension -1"]),
    "quantised somehow": (configure(quantization_config="fp8"), ["config.json", "quantization_config='fp8'"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_checkpoint_of_a_v3_is_refused(broken, capsys, case):
    change, said = REFUSALS[case]
    assert main(["check", str(broken("bf16", change))]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error


def test_only_the_mtp_layer_of_a_config_that_has_none_stays_behind(broken, tmp_path):
    folder = broken("bf16", lose_mtp)
    assert len(read_folder(folder).faults) == 1  # not one for each of its tensors
    convert(folder, tmp_path / "target", "fp8", drop_mtp=True)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_files_that_are_missing_cut_or_elsewhere_are_named(bf16, tmp_path, capsys):
    def check():
        code = main(["check", str(folder)])
        return code, capsys.readouterr().err

    folder = tmp_path / "copy"
    shutil.copytree(bf16, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][WEIGHT]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    code, error = check()
    assert code == 1 and error.startswith(f"{file}: not a whole safetensors file") and len(error.splitlines()) == 1
    file.unlink()
    code, error = check()
    assert code == 1 and error.startswith(f"{file} is missing") and len(error.splitlines()) == 1
    file.write_bytes(whole)
    other = next(name for name in index["weight_map"].values() if name != file.name)
    changed = index["weight_map"] | {WEIGHT: other}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
    code, error = check()
    assert code == 1 and WEIGHT in error and other in error
    changed = index["weight_map"] | {WEIGHT: "../elsewhere.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
    code, error = check()
    assert code == 2 and "'../elsewhere.safetensors'" in error


def test_a_file_cut_after_it_was_looked_at_is_named(broken):
    folder = read_folder(broken("bf16", lambda tensors, config: None))
    file = folder.files[0]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointFault, match="it ends within"):
        for name, expected in folder.expected.items():
            if not expected.optional:
                folder.rows(name, 0, expected.shape[0])


def test_a_tensor_in_two_files_is_refused(broken, capsys):
    folder = broken("bf16", lambda tensors, config: None)
    save_file({WEIGHT: torch.zeros(32, 64)}, folder / "more.safetensors")
    assert main(["check", str(folder)]) == 1
    assert f"more.safetensors: {WEIGHT} is in all.safetensors too" in capsys.readouterr().err


def test_pickles_are_refused_unopened(bf16, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((bf16 / "config.json").read_bytes())
    assert main(["check", str(tmp_path)]) == 2
    assert "no *.safetensors" in capsys.readouterr().err
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch opened'\ntR.")
    assert main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error and "pickle" in error and "safetensors" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_weight_that_is_no_number_stops_the_conversion(broken, tmp_path, capsys, value, to):
    folder = broken("bf16", put(WEIGHT, lambda w: w.index_fill(1, torch.tensor(3), value)))
    assert main([to, str(folder), str(tmp_path / "target")]) == 2
    error = capsys.readouterr().err
    assert "all.safetensors" in error and WEIGHT in error
    assert not (tmp_path / "target" / "config.json").exists()


def test_directions_that_lead_nowhere_are_refused(bf16, fp8, tmp_path, capsys):
    convert(fp8, tmp_path / "official", "official")

    def refused(*arguments):
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    assert "FP8 already" in refused("fp8", fp8, tmp_path / "x")
    assert "hf first" in refused("bf16", tmp_path / "official", tmp_path / "x")
    assert "Hugging Face's layout already" in refused("hf", bf16, tmp_path / "x")
    assert "model_parallel=3" in refused("official", "--model_parallel", 3, bf16, tmp_path / "x")
    assert "whole blocks" in refused("official", "--model_parallel", 2, fp8, tmp_path / "x")
    assert "the source" in refused("bf16", fp8, fp8)
    assert "not empty" in refused("bf16", fp8, bf16)
    assert "begun from other files" in refused("bf16", bf16, tmp_path / "official")
    assert "no such folder" in refused("bf16", tmp_path / "nowhere", tmp_path / "x")
    for content in ("[]", "{", '{"sha256": {}}'):
        (tmp_path / "official" / "conversion.json").write_text(content)
        assert "no record of a conversion" in refused("official", fp8, tmp_path / "official")


def test_a_rank_missing_or_too_many_is_named(bf16, tmp_path, capsys):
    folder = tmp_path / "official"
    convert(bf16, folder, "official", model_parallel=2)
    last, odd = folder / "model1-mp2.safetensors", folder / "model1-mp4.safetensors"
    shutil.copy(last, odd)
    assert main(["check", str(folder)]) == 2
    assert f"{folder}: {odd.name}: model0 to model1-mp2" in capsys.readouterr().err
    odd.unlink()
    last.unlink()
    assert main(["check", str(folder)]) == 2
    assert f"{folder}: {last.name}: model0 to model1-mp2" in capsys.readouterr().err


def test_a_copy_that_only_some_ranks_have_is_missing_on_the_others(broken, tmp_path, capsys):
    copy = "model.layers.3.shared_head.head.weight"
    source = broken("bf16", put(copy, lambda _: torch.zeros(64, 32, dtype=torch.bfloat16)))
    convert(source, tmp_path / "official", "official", model_parallel=2)
    file = tmp_path / "official" / "model0-mp2.safetensors"
    tensors = load_file(file)
    del tensors["layers.3.shared_head.head.weight"]
    save_file(tensors, file)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "official")]) == 1
    said = f"{file}: layers.3.shared_head.head.weight is missing; download or save it again\n"
    assert capsys.readouterr().err == said


# --- conversions that die ---------------------------------------------------------------------------------------------


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_child(act):
    """How a forked child that runs `act` ends: its exit code, or the negative signal."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP does not survive a fork
            code = act()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(moment, source, target):
    """Convert in a child that SIGKILL ends before its n-th write, fsync, rename or removal."""
    passed = 0

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    def act():
        os.fsync, Path.replace, Path.unlink = counted(os.fsync), counted(Path.replace), counted(Path.unlink)
        convert_shards.Folder.rows = counted(convert_shards.Folder.rows)
        convert(source, target, "fp8", shard_bytes=SHARD_BYTES)
        return 0

    return in_child(act)


def test_killed_anywhere_and_started_again_it_writes_the_same_bytes(bf16, fp8, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what a process wrote outlives its SIGKILL without
    whole = files(fp8)
    assert sum(name.endswith(".safetensors") for name in whole) > 3
    deaths, moment = 0, 1
    while True:
        target = tmp_path / str(moment)
        if (ended := killed_at(moment, bf16, target)) == 0:
            break
        assert ended == -signal.SIGKILL
        deaths += 1
        before = files(target) if target.exists() else {}
        if "config.json" in before:
            assert read_folder(target).faults == []
        convert(bf16, target, "fp8", shard_bytes=SHARD_BYTES)
        assert files(target) == whole, moment
        moment += 7  # coprime to the four calls that end each file
    assert deaths > 20


def test_finished_shards_are_kept_and_changed_ones_written_again(bf16, fp8, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert(bf16, target, "fp8", shard_bytes=SHARD_BYTES)
    _, second, *_ = sorted(target.glob("*.safetensors"))
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    written = []

    def write(path, *rest):
        assert not (target / "config.json").exists()  # it says that a folder is whole
        written.append(path)
        convert_shards.write_shard(path, *rest)

    monkeypatch.setattr("deepseek_v3.convert.write_shard", write)
    convert(bf16, target, "fp8", shard_bytes=SHARD_BYTES)
    assert written == [second]
    assert files(target) == files(fp8)


def test_a_full_disk_is_exit_code_74_with_the_file(bf16, tmp_path, capfd, monkeypatch):
    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return main(["fp8", str(bf16), str(tmp_path / "target")])

    assert in_child(act) == 74
    assert "target/model-00001-of-00001.safetensors: File too large" in capfd.readouterr().err
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["conversion.json"]

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert main(["fp8", str(bf16), str(tmp_path / "other")]) == 74
    assert "10 are free" in capfd.readouterr().err


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """3 weights of 128 MB, zeros in a file with holes, there and back."""
    config = deepseek_v3.preset(
        "tiny", hidden_size=4096, intermediate_size=16384, num_hidden_layers=1, first_k_dense_replace=1
    )
    header, end = {}, 0
    for name, tensor in expected_tensors(config, fp8=False).items():
        size = 2 * torch.Size(tensor.shape).numel()
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    source = tmp_path / "bf16"
    source.mkdir()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(source)

    def act():
        assert main(["check", str(source)]) == 0  # which imports what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert main(["fp8", str(source), str(tmp_path / "fp8")]) == 0
        assert main(["bf16", str(tmp_path / "fp8"), str(tmp_path / "back")]) == 0
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        (tmp_path / "grown").write_text(str(grown))
        return 0

    assert in_child(act) == 0
    assert int((tmp_path / "grown").read_text()) < 128 * 1024  # KiB: one weight, of 430 MB in all


def test_two_conversions_into_one_folder_are_one_too_many(bf16, tmp_path, capsys):
    target = tmp_path / "target"
    with alone(target):
        assert main(["fp8", str(bf16), str(target)]) == 2
        assert "another conversion is writing there" in capsys.readouterr().err
        assert [file.name for file in target.iterdir()] == [".conversion.lock"]
    assert main(["fp8", str(bf16), str(target)]) == 0
    assert not (target / ".conversion.lock").exists()


def test_progress_is_a_line_per_shard_in_a_log_and_a_bar_on_a_terminal(bf16, tmp_path, capsys, monkeypatch):
    target = tmp_path / "target"
    for after in ("", ": written before"):
        convert(bf16, target, "fp8", shard_bytes=SHARD_BYTES)
        names = sorted(file.name for file in target.glob("*.safetensors"))
        assert capsys.readouterr().err.splitlines() == [name + after for name in names]
    (target / names[0]).unlink()  # what is kept counts as done
    end, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        convert(bf16, target, "fp8", shard_bytes=SHARD_BYTES)
    shown = b""
    with os.fdopen(end, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # its end is an error, EIO
        while data := screen.read(4096):
            shown += data
    total = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1000
    size, of = re.findall(r"([\d.]+)/([\d.]+) kB", shown.decode())[-1]
    assert size == of and 0.7 * total < float(of) < total, shown  # headers are not counted


def test_what_is_asked_badly_is_exit_code_2(bf16, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fp8", str(bf16), str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'}: File exists; check path and permissions" in capsys.readouterr().err
    for arguments in ([], ["heal"], ["bf16", "x"], ["bf16", "--model_parallel", "2", "x", "y"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
