"""The built-in tiny DeepSeek-V3: its tokenizer and the short SFT that teaches it two habits, made once and cached.

The demonstrations (the source "stories", sft/sources.py) are a mix, as real SFT data is: three in ten work the story
out, seven jump to the answer. Worked answers are nearly always right and jumped ones seldom, and the model leaves SFT
doing both; which habit pays is what GRPO then finds out.
"""

import ast
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import deepseek_v3
from recipes.cli import parse
from runtime.cache import cache_dir
from runtime.stories import stories
from runtime.weights import save_pretrained
from sft.chat import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, USER
from sft.config import EvaluationConfig, SFTConfig

SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT)
# Tokens of their own, as in R1's tokenizer, but ordinary text to a decoder. It matters here: the choice between
# working and jumping then falls on the token after <think>, where the model reads the story, so RL's gradient reaches
# every layer. With "<", "think", ">" the choice was a constant of the output head alone and hardly moved.
TAGS = ("<think>", "</think>")
CONFIG = Path(__file__).parent / "configs/sft_tiny.yaml"


def tiny_checkpoint(*, seed: int = 0) -> Path:
    """Folder of the warmed-up tiny model and its tokenizer; trained on first use, then found in the cache.

    The cache's name holds a hash of everything the result depends on, so a changed recipe is never served stale.
    """
    folder = cache_dir() / f"tiny-v3-{_recipe_hash(seed)}"
    if (folder / "config.json").exists():
        return folder
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        result = warm_up(seed=seed, run_dir=aside)
        if result.exit_code:
            sys.exit(result.exit_code)
        _move(aside / "checkpoints/final", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def warm_up(*, seed: int, run_dir: Path, **settings: Any) -> Any:
    """Run the tiny SFT, without its evaluations, in a run folder; its `Result`. settings: other fields of SFTConfig."""
    from sft.train import train

    config = parse(SFTConfig, ["--config", str(CONFIG)], prog="sft", description="")
    unwatched: dict[str, Any] = {"evaluation": EvaluationConfig(), "seed": seed, "run_dir": str(run_dir)}
    config = dataclasses.replace(config, **unwatched | settings)
    return train(config, named_models={"tiny": lambda: random_checkpoint(seed=seed)})


def random_checkpoint(*, seed: int = 0) -> Path:
    """Folder of the tiny model with random weights, and its tokenizer; in the cache."""
    folder = cache_dir() / f"tiny-v3-random-{_recipe_hash(seed)}"
    if not (folder / "config.json").exists():
        tokenizer = make_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer))
        aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        save_pretrained(aside, model, tokenizer)
        _move(aside, folder)
    return folder


def _move(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:  # another process made the same one meanwhile
        shutil.rmtree(aside)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The tiny preset, with the tokenizer's special tokens."""
    return deepseek_v3.preset(
        "tiny",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens in which every number up to 99 is one token; any text encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(list(TAGS))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> Iterable[str]:
    for row in stories(2_000, split="train", seed=0):
        yield row["prompt"][0]["content"]
        yield from re.split("|".join(TAGS), row["worked"] + row["direct"])
    # Two-digit numbers often enough that each becomes a token of its own.
    for number in range(10, 100):
        yield from [str(number)] * 1_000


def _recipe_hash(seed: int) -> str:
    """Hash of the code and settings that decide the warmed-up weights; comments and docstrings don't count."""
    root = Path(__file__).parent.parent
    sources = [
        *sorted(path for package in ("deepseek_v3", "sft") for path in (root / package).glob("*.py")),
        *(root / f"runtime/{name}.py" for name in ("stories", "packed", "logprobs", "rows", "sharding")),
        Path(__file__),
    ]
    digest = hashlib.sha256(json.dumps([seed, torch.__version__, CONFIG.read_text()]).encode())
    for source in sources:
        digest.update(_without_words(source.read_text()).encode())
    return digest.hexdigest()[:12]


def _without_words(source: str) -> str:
    """Python source as its syntax tree, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]  # type: ignore[attr-defined]
    return ast.dump(tree)
