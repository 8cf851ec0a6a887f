"""The tiny model's tokenizer, its demonstrations, and a cache that is never stale."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import deepseek_v3
from recipes import tiny
from runtime.models import load_causal_lm, load_tokenizer
from runtime.stories import stories
from sft.chat import CHAT_TEMPLATE, EOS, encode_conversation
from sft.sources import DIRECT_SHARE, Source, conversation
from sft.train import Result


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def test_any_text_comes_back(tokenizer):
    every_byte = "".join(map(chr, range(256))) + "".join(map(chr, range(0x400, 0x2400, 17)))
    for text in (every_byte, "𝕬😀\u202e\x00\x1b[0m\r\n\t  ", " leading and trailing ", "12345678 007", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < len(tokenizer)


def test_all_256_bytes_are_in_the_vocabulary(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    assert len(alphabet) == 256 and set(alphabet) <= set(tokenizer.get_vocab())


def test_every_number_to_99_is_one_token_wherever_it_stands(tokenizer):
    for number in range(100):
        for text in (f"{number}", f"{number}-11", f"={number}", f"\\boxed{{{number}}}", f" {number} "):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert str(number) in [tokenizer.decode([i]) for i in ids], text


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_think_tags_are_one_token_and_survive_decoding(tokenizer, tag):
    ids = tokenizer(f"a{tag}b", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(tag) in ids and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{tag}b"


def test_the_vocabulary_fits_the_model(tokenizer):
    config = tiny.tiny_config(tokenizer)
    assert len(tokenizer) <= config.vocab_size == 512
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == EOS


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    assert tiny.make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_demonstrations_end_in_eos_and_their_share_of_them_jumps(tokenizer):
    rows, direct, longest = stories(200, split="train", seed=0), 0, 0
    for (_, shown), row in zip(Source("stories"), rows, strict=False):
        ids, mask = encode_conversation(tokenizer, conversation(shown).messages)
        assert ids[-1] == tokenizer.eos_token_id and mask[-1]
        trained = tokenizer.decode([i for i, t in zip(ids, mask, strict=True) if t])
        assert trained in (row["direct"] + EOS, row["worked"] + EOS)
        assert f"\\boxed{{{row['answer']}}}" in trained
        direct += trained == row["direct"] + EOS
        longest = max(longest, sum(mask))
    assert direct == 200 * DIRECT_SHARE
    assert longest <= 40  # GRPO's default sampling.max_tokens cuts no demonstrated answer


def test_no_demonstration_is_held_out(tokenizer):
    held_out = {row["prompt"][0]["content"] for row in stories(50, split="heldout", seed=0)}
    shown = {row["prompt"][0]["content"] for row in stories(500, split="train", seed=0)}
    assert not held_out & shown


@pytest.fixture
def short(monkeypatch, tmp_path) -> Path:
    """A cache of its own, and a warm-up of two steps on 16 demonstrations."""
    settings = yaml.safe_load(tiny.CONFIG.read_text()) | dict(
        mix=[dict(path="stories", max_examples=16)], epochs=1, rows_per_step=3, evaluation={}, workers=1
    )
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(tiny, "CONFIG", tmp_path / "short.yaml")
    monkeypatch.setattr("sft.train.write_report", lambda folder, **_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/r1-post-training"


def folders(cache: Path) -> list[str]:
    """What lies in the cache but for the tokenised demonstrations."""
    return sorted(path.name for path in cache.iterdir() if path.name != "tokens")


def test_the_checkpoint_is_what_was_trained_made_once_and_then_found(short, tmp_path, capfd):
    trained = tiny.warm_up(seed=0, run_dir=tmp_path / "run").run_dir / "checkpoints/final"
    capfd.readouterr()
    folder = tiny.tiny_checkpoint()
    assert folder.parent == short and "2 steps" in capfd.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    random = tiny.random_checkpoint()
    assert folders(short) == sorted([folder.name, random.name])  # nothing left aside
    assert isinstance(load_causal_lm(folder), deepseek_v3.DeepseekV3ForCausalLM)
    assert load_tokenizer(folder).chat_template == CHAT_TEMPLATE
    made, first = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (folder, random))
    assert not torch.equal(made, first)
    written = [(path / "model.safetensors").stat().st_mtime_ns for path in (folder, random)]
    assert (tiny.tiny_checkpoint(), tiny.random_checkpoint()) == (folder, random)
    assert [(path / "model.safetensors").stat().st_mtime_ns for path in (folder, random)] == written
    assert "2 steps" not in capfd.readouterr().err


def test_two_processes_making_it_at_once_leave_one_whole_folder(short, monkeypatch):
    """The other one finishes while this one is training."""
    warm_up = tiny.warm_up

    def slow(**arguments):
        made = warm_up(**arguments)
        monkeypatch.setattr(tiny, "warm_up", warm_up)
        monkeypatch.setattr(tiny.os, "getpid", lambda: 1)
        tiny.tiny_checkpoint()
        return made

    monkeypatch.setattr(tiny, "warm_up", slow)
    folder = tiny.tiny_checkpoint()
    assert folders(short) == sorted([folder.name, tiny.random_checkpoint().name])
    load_causal_lm(folder)


def test_told_to_leave_while_it_is_made_it_ends_the_process_and_leaves_nothing(short, monkeypatch):

    def told_to_leave(*, seed: int, run_dir: Path) -> Result:
        run_dir.mkdir(parents=True)
        return Result(run_dir=run_dir, steps=1, before=None, after=None, exit_code=143)

    monkeypatch.setattr(tiny, "warm_up", told_to_leave)
    with pytest.raises(SystemExit) as left:
        tiny.tiny_checkpoint()
    assert left.value.code == 143 and folders(short) == []


def test_the_first_weights_are_the_seeds(short):
    heads = [load_file(tiny.random_checkpoint(seed=s) / "model.safetensors")["lm_head.weight"] for s in (0, 1)]
    assert not torch.equal(*heads)


def test_another_seed_is_another_folder():
    assert tiny._recipe_hash(0) != tiny._recipe_hash(1)


def test_a_changed_recipe_is_another_folder(monkeypatch, tmp_path):
    root = Path(tiny.__file__).parent.parent
    for package in ("deepseek_v3", "sft", "runtime", "recipes"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tiny, "__file__", str(tmp_path / "recipes/tiny.py"))
    seen = {tiny._recipe_hash(0)}
    deciding = ["recipes/tiny.py", "sft/train.py", "sft/chat.py", "runtime/stories.py", "runtime/packed.py"]
    for changed in [*deciding, "runtime/logprobs.py", "runtime/sharding.py", "deepseek_v3/moe.py"]:
        path = tmp_path / changed
        path.write_text(path.read_text() + "\nCHANGED = 1\n")
        seen.add(tiny._recipe_hash(0))
    assert len(seen) == 9
    now = tiny._recipe_hash(0)
    (tmp_path / "runtime/report.py").write_text("decides = 'nothing'\n")
    path.write_text('"""Other words."""\n# And these.\n' + path.read_text().partition('"""\n')[2])
    assert tiny._recipe_hash(0) == now
    assert re.fullmatch("[0-9a-f]{12}", tiny._recipe_hash(0))
