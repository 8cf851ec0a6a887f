"""What the tiny chain needs besides the built-in stories, made of a seed: demonstrations, general data, a student.

The cold start's demonstrations have three habits: five in ten jump to the answer, four work it out in English, and one
works it out in Chinese. Reinforcement finds out which is right; the reward for language consistency, which is legible.
General data are questions about the same stories that want a word and no reasoning.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.tiny import make_tokenizer
from rewards.completions import text_of
from rewards.language import reasoning
from runtime.files import make_folder, replacing
from runtime.stories import stories
from runtime.weights import save_pretrained

DEMONSTRATIONS, GENERAL = 11_000, 2_000
HAN = "个"
"""The Chinese word for a piece of anything."""

Rows = list[dict[str, Any]]


def demonstrations(seed: int) -> Rows:
    """Stories with one of three kinds of answers."""
    return [
        _conversation(row["prompt"], [row["direct"], worked(row), worked(row, HAN)][(i % 10 >= 5) + (i % 10 == 9)])
        for i, row in enumerate(stories(DEMONSTRATIONS, split="train", seed=seed))
    ]


def worked(row: dict[str, Any], unit: str | None = None) -> str:
    """The worked answer with its unit behind every line, the story's own thing unless given."""
    unit = f" {thing(row)}" if unit is None else unit
    lines, _, answer = row["worked"].removeprefix("<think>").partition("</think>")
    return "<think>" + "\n".join(line + unit for line in lines.split("\n")) + "</think>" + answer


def thing(row: dict[str, Any]) -> str:
    """What a story is about: cards, coins, ..."""
    return str(row["prompt"][-1]["content"].partition(".")[0].split()[-1])


def general_problems(seed: int) -> Rows:
    """Problems of stories beyond the demonstrations': whose things they are, or what they are."""
    rows = stories(DEMONSTRATIONS + GENERAL, split="train", seed=seed)[DEMONSTRATIONS:]
    problems = []
    for i, row in enumerate(rows):
        told, _, _ = row["prompt"][-1]["content"].rpartition(" How many")
        name, what = told.split()[0], thing(row)
        question, answer = (f"Who has {what}?", name) if i % 2 else (f"What does {name} have?", what)
        prompt = [{"role": "user", "content": f"{told} {question}"}]
        problems.append({"prompt": prompt, "answer": answer, "domain": "general"})
    return problems


def general(seed: int) -> Rows:
    """The same as conversations: a word, without reasoning."""
    return [
        _conversation(row["prompt"], f"<think></think>\\boxed{{{row['answer']}}}") for row in general_problems(seed)
    ]


def scenarios(seed: int) -> Rows:
    """Prompts of the last RL stage: three of reasoning, one of general data, and so on."""
    math: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "answer": row["answer"], "domain": "math"}
        for row in stories(3 * GENERAL, split="train", seed=seed)
    ]
    return [row for i, row in enumerate(general_problems(seed)) for row in (*math[3 * i : 3 * i + 3], row)]


def brevity(completions: Sequence[Any], domain: Sequence[str], **_: Any) -> list[float | None]:
    """1 where nothing is thought about a general question; of other domains all get 1. TRL's signature."""
    return [
        float(of != "general" or not reasoning(text_of(completion)).strip())
        for completion, of in zip(completions, domain, strict=True)
    ]


def save_student(folder: Path, seed: int) -> None:
    """A dense student: Qwen3's architecture, random weights, the tiny tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    save_pretrained(aside, model, tokenizer)
    aside.rename(folder)


def _conversation(prompt: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    return {"messages": [*prompt, {"role": "assistant", "content": answer}]}


def _save(rows: Callable[[int], Iterable[dict[str, Any]]]) -> Callable[[Path, int], None]:
    def save(path: Path, seed: int) -> None:
        make_folder(path.parent)
        with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(seed))

    return save


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "demonstrations": _save(demonstrations),
    "general": _save(general),
    "scenarios": _save(scenarios),
    "qwen": save_student,
}
"""Name in ${tiny.NAME} -> what writes it."""
