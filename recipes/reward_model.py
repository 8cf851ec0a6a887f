"""`python -m recipes.reward_model`: any causal LM and pairs of a better and a worse response -> a scalar reward model.

python -m recipes.reward_model --model runs/sft/checkpoints/final --data pairs.jsonl --run_dir runs/rm

Rows have TRL's preference columns, `prompt` (or none), `chosen` and `rejected`, as text or messages, and may have
`chosen_judgement` and `rejected_judgement`: the reasoning about each response that led to the preference. DeepSeek-V3
trains on it so that the model can't earn its reward by the surface alone (its report, 5.2.1); it follows the response
in the text that is scored. Some pairs are shown without, so that responses nobody has judged can be scored as well.
With no arguments: stories with all their events or with one left out, on the built-in tiny DeepSeek-V3. TRL's
RewardTrainer does the training. Left out: --resume, adapters.
"""

import dataclasses
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from recipes.cli import main, to_dict
from recipes.grpo import tiny_model
from rewards.completions import after_thinking, text_of
from rewards.model_based.scalar import Reading, RewardModel, RewardModelConfig, encode
from rl.evaluate import Estimate
from rl.record import prompt_text
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from runtime.held_out import write_held_out
from runtime.metrics import MetricsLog
from runtime.models import load_tokenizer
from runtime.progress import StepTracker, track_steps
from runtime.report import write_report
from runtime.rows import BadRow, Reject, Row, Rows, excerpt, order, parse, read_raw
from runtime.run_folder import RunFolder, open_run
from runtime.statistics import wilson
from runtime.stories import stories

STORY_PAIRS = {"stories": ("train", 1_600), "stories:heldout": ("heldout", 400)}


@dataclass(frozen=True, kw_only=True)
class RewardModelTraining:
    """The training of a reward model."""

    model: str = "tiny"
    """SFT checkpoint, a folder or hub name of any causal LM; "tiny": the built-in V3 after its warm-up."""
    data: str = "stories"
    """Pairs: a JSONL or Parquet file or a `datasets` name with prompt/chosen/rejected, or the built-in stories."""
    eval_data: str | None = None
    """Held-out pairs. Unset: `held_out` of `data`, by prompt, or the built-in held-out stories."""
    held_out: int = 400
    """Pairs to hold out, about; at most a fifth of the data."""
    epochs: int = 1
    """Times each pair is seen."""
    batch_size: int = 32
    """Pairs per step and process."""
    lr: float = 1e-3
    """Peak learning rate; falls linearly to 0. Large because the model is tiny."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    max_length: int = 1024
    """Longest text, tokens; pairs with a longer one are set aside, and so are longer responses in scoring."""
    part: Literal["whole", "answer"] = "whole"
    """What of a response is read: all of it, or what follows the reasoning."""
    plain_share: float = 0.5
    """Share of the pairs with judgements that are shown without."""
    center_rewards: float = 0.01
    """Weight of the squared sum of a pair's scores, which keeps their mean near 0 (arXiv 2312.09244, eq. 2)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the computation; weights and what is saved are float32."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them."""
    seed: int = 0
    """Decides the score head's first weights and the order of the pairs."""
    run_dir: str = "runs/reward_model"
    """Folder of the run: the reward model in checkpoints/final, metrics.jsonl, evaluation.json."""
    report_to: tuple[str, ...] = ()
    """Trackers to copy the metrics to: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        for name in ("held_out", "epochs", "batch_size", "lr", "max_grad_norm", "max_length"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: give a positive number")
        for name in ("warmup_steps", "center_rewards", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: can't be negative")
        if not 0 < self.plain_share <= 1:
            raise UserError(f"plain_share={self.plain_share}: a share above 0, 1 for no judgements at all")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often a reward model prefers the better response of a held-out pair; ties count as wrong."""

    plain: Estimate
    """Read without judgements."""
    judged: Estimate | None
    """With them, if it has learnt to read them and the pairs have them."""
    rows: list[dict[str, Any]]
    """Every pair as it was scored without judgements, for `runtime.held_out`."""

    def as_json(self) -> dict[str, Any]:
        """The estimates as plain values."""
        return {name: value and dataclasses.asdict(value) for name, value in vars(self).items() if name != "rows"}


def run(config: RewardModelTraining) -> None:
    """Train, save, and show what came of it."""
    rank = int(os.environ.get("RANK", "0"))
    console = Console(file=sys.stdout if rank == 0 else open(os.devnull, "w"))  # noqa: PTH123
    path = str(tiny_model(Console(stderr=True))) if config.model == "tiny" else config.model
    train_rows, held_out = load_pairs(config)
    for rows in (train_rows, held_out):
        console.print(Text(rows.summary()))
    folder = _open(config) if rank == 0 else None
    try:
        before, after = train(path, train_rows, held_out, config, folder, console)
    finally:
        if folder:
            folder.close()
    if folder and after:
        content = {"pairs": len(held_out), "before": before.as_json(), "after": after.as_json()}
        (folder.path / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n")
        write_report(folder.path, defaults=RewardModelTraining())
        console.print()
        console.print(Text(f"held-out pairs put right  {before.plain}  →  {after.plain}"))
        if before.judged and after.judged:
            console.print(Text(f"reading the judgements    {before.judged}  →  {after.judged}"))
        console.print(Text(f"({len(held_out)} pairs never trained on; 95 % intervals)"))
        final = folder.checkpoints_dir / "final"
        console.print(
            Text(f"pay by it: --rewards '{{\"rewards.model_based.scalar:reward(source={final})\": 1}}'"), soft_wrap=True
        )


def train(
    path: str, train_rows: Rows, held_out: Rows, config: RewardModelTraining, folder: RunFolder | None, console: Console
) -> tuple[Accuracy, Accuracy | None]:
    """Accuracy before, and after of what was saved and loaded again. folder: None but in the main process."""
    from datasets import Dataset
    from transformers.utils import logging as hf_logging
    from trl import RewardConfig, RewardTrainer

    hf_logging.set_verbosity_error()
    tokenizer = load_tokenizer(path)
    judged = config.plain_share < 1 and any(row["chosen_judgement"] is not None for row in train_rows)
    reading = Reading(part=config.part, judgements=judged, max_length=config.max_length)
    pairs = list(encode_pairs(train_rows, tokenizer, config))
    if len(pairs) < len(train_rows):
        console.print(
            Text(f"{len(train_rows) - len(pairs)} pairs set aside: longer than max_length={config.max_length}")
        )
    if not pairs:
        raise UserError(f"max_length={config.max_length}: every pair is longer; raise it")
    arguments = RewardConfig(
        output_dir=str(folder.path if folder else config.run_dir),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        max_length=None,  # what is too long is set aside above, and counted
        center_rewards_coefficient=config.center_rewards,
        bf16=config.precision == "bf16",
        gradient_checkpointing=config.gradient_checkpointing,
        model_init_kwargs={"dtype": "float32"},
        seed=config.seed,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not _has_gpu(),
    )
    trainer = RewardTrainer(
        model=path, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    before = accuracy(RewardModel(trainer.model.eval(), tokenizer, reading=reading), held_out)
    if folder:
        write_held_out(folder.path, before.rows, step=0)
    steps = -(-len(pairs) // (config.batch_size * trainer.accelerator.num_processes)) * config.epochs
    with track_steps(steps, "training the reward model", console=console) as tracker:
        _follow(trainer, tracker, folder, config)
        trainer.train()
    trainer.accelerator.wait_for_everyone()
    if folder is None:
        return before, None
    trained = RewardModel(trainer.accelerator.unwrap_model(trainer.model), tokenizer, reading=reading)
    final = save_checkpoint(folder.checkpoints_dir, "final", trained.save, info={"step": trainer.state.global_step})
    after = accuracy(RewardModel.load(RewardModelConfig(model=str(final))), held_out)
    write_held_out(folder.path, after.rows, step=trainer.state.global_step)
    return before, after


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _open(config: RewardModelTraining) -> RunFolder:
    metrics = Path(config.run_dir) / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(f"run_dir={config.run_dir}: already holds a run; give another --run_dir")
    return open_run(config.run_dir, config=to_dict(config), resume=False)


def _follow(trainer: Any, tracker: StepTracker, folder: RunFolder | None, config: RewardModelTraining) -> None:
    """Have the trainer's numbers shown and written; its own printing goes."""
    from transformers import PrinterCallback, TrainerCallback

    metrics = folder and MetricsLog(
        folder.metrics_path, config.report_to, run_name=folder.path.name, run_dir=folder.path, config=to_dict(config)
    )

    class Follow(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if metrics and "loss" in logs:
                tracker.update(state.global_step, logs)
                metrics.log(state.global_step, logs)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if metrics:
                metrics.close()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Follow())


def accuracy(model: RewardModel, rows: Sequence[Row]) -> Accuracy:
    """The share of pairs whose better response scores higher, with a 95 % interval."""

    def score(rows: Sequence[Row], *, judged: bool) -> list[tuple[float | None, float | None]]:
        """Of each pair's chosen and rejected response."""
        scores: list[list[float | None]] = []
        for side in ("chosen", "rejected"):
            written = [row[f"{side}_judgement"] for row in rows] if judged else None
            scores.append(model.score([row["prompt"] for row in rows], [row[side] for row in rows], written))
        return list(zip(*scores, strict=True))

    def share(scores: Sequence[tuple[float | None, float | None]]) -> Estimate:
        known = [(c, r) for c, r in scores if c is not None and r is not None]
        if not known:
            return Estimate(mean=float("nan"), low=float("nan"), high=float("nan"))
        mean = sum(c > r for c, r in known) / len(known)
        low, high = wilson(mean, len(known))
        return Estimate(mean=mean, low=low, high=high)

    with_judgement = [row for row in rows if row["chosen_judgement"] is not None]
    plain = score(rows, judged=False)
    return Accuracy(
        plain=share(plain),
        judged=share(score(with_judgement, judged=True)) if model.reading.judgements and with_judgement else None,
        rows=[row for i, pair in enumerate(zip(rows, plain, strict=True)) for row in _scored(*pair, i, model)],
    )


def _scored(row: Row, scores: tuple[float | None, float | None], number: int, model: RewardModel) -> list[Row]:
    """The two responses of a pair, each with its score and whether the pair is put right."""
    chosen, rejected = scores
    right = None if chosen is None or rejected is None else float(chosen > rejected)
    return [
        {
            "group": number,
            "sample": i,
            "prompt_text": prompt_text(row["prompt"]),
            "completion_text": row[side],
            "completion_ids": model.tokenizer(row[side], add_special_tokens=False)["input_ids"],
            "answer": side,
            "reward": scores[i],
            "rewards/accuracy": right,
        }
        for i, side in enumerate(("chosen", "rejected"))
    ]


def encode_pairs(rows: Sequence[Row], tokenizer: Any, config: RewardModelTraining) -> Iterator[dict[str, list[int]]]:
    """TRL's tokenized columns, of the pairs that fit; every so many of those with judgements are shown without."""
    seen = 0
    for row in rows:
        plain = row["chosen_judgement"] is None
        if not plain:
            seen += 1
            plain = int(seen * config.plain_share) > int((seen - 1) * config.plain_share)
        pair = {
            f"{side}_ids": encode(
                tokenizer, row["prompt"], row[side], None if plain else row[f"{side}_judgement"], part=config.part
            )
            for side in ("chosen", "rejected")
        }
        if max(map(len, pair.values())) <= config.max_length:
            yield pair


# --- pairs ------------------------------------------------------------------------------------------------------------


def load_pairs(config: RewardModelTraining) -> tuple[Rows, Rows]:
    """The pairs to train on and those held out, which share no prompt."""
    rows = read_pairs(config.data, part=config.part)
    source = "stories:heldout" if config.eval_data is None and config.data == "stories" else config.eval_data
    if source is not None:
        held_out = read_pairs(source, part=config.part)
        taken = {_key(row) for row in held_out}
    else:
        prompts = list(dict.fromkeys(map(_key, rows)))
        few = min(config.held_out, len(prompts) // 5)
        taken = {prompts[i] for i in order(len(prompts), seed=config.seed, epoch=0)[:few]}
        held_out = _rows((row for row in rows if _key(row) in taken), source=f"held out of {config.data}")
    kept = _rows((row for row in rows if _key(row) not in taken), source=rows.source, rejects=rows.rejects)
    if not kept or not held_out:
        raise UserError(f"data={config.data!r}: {len(rows)} pairs are too few to train on some and hold out others")
    return kept, held_out


def read_pairs(source: str, *, part: str = "whole", max_bad_fraction: float = 0.1) -> Rows:
    """The pairs of a source, each with prompt, chosen, rejected and their judgements (or None)."""
    if source in STORY_PAIRS:
        split, count = STORY_PAIRS[source]
        return _rows(story_pairs(count, split=split), source=source)  # type: ignore[arg-type]
    rows = Rows(source=source)
    for line, found in read_raw(source):
        try:
            rows.append(normalise(parse(found) if isinstance(found, bytes) else found, part=part))
            rows.lines.append(line)
        except BadRow as bad:
            rows.rejects.append(Reject(line=line, reason=bad.reason, text=excerpt(found), malformed=bad.malformed))
    malformed = sum(reject.malformed for reject in rows.rejects)
    if not rows or malformed > max_bad_fraction * (len(rows) + len(rows.rejects)):
        first = "".join(f"\n  line {r.line}: {r.reason}: {r.text[:80]!r}" for r in rows.rejects[:3])
        raise UserError(f"source {source!r}: {malformed} of {len(rows) + len(rows.rejects)} rows are no pairs:{first}")
    return rows


def _rows(pairs: Iterable[Row], *, source: str, rejects: Sequence[Reject] = ()) -> Rows:
    rows = Rows(source=source, rejects=list(rejects))
    rows.extend(pairs)
    return rows


def normalise(row: Any, *, part: str = "whole") -> Row:
    """A pair in any of TRL's preference formats as prompt (text or messages), two texts, two judgements or None."""
    if not isinstance(row, dict):
        raise BadRow("not an object")
    prompt: Any = row.get("prompt")
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if prompt is None:
        prompt, chosen, rejected = _shared_prompt(chosen, rejected)
    if not isinstance(prompt, str) and not _is_messages(prompt):
        raise BadRow("prompt is neither text nor messages")
    if not _is_response(chosen) or not _is_response(rejected):
        raise BadRow("chosen or rejected is neither text nor one message of the assistant")
    judgements = [row.get("chosen_judgement"), row.get("rejected_judgement")]
    if judgements != [None, None] and not all(isinstance(text, str) and text.strip() for text in judgements):
        raise BadRow("one judgement of two, or one that is no text")
    texts: list[str] = [text_of(side) for side in (chosen, rejected)]
    if texts[0] == texts[1] or (part == "answer" and after_thinking(texts[0]) == after_thinking(texts[1])):
        raise BadRow("chosen and rejected are the same", malformed=False)
    names = ("chosen", "rejected", "chosen_judgement", "rejected_judgement")
    return {"prompt": prompt, **dict(zip(names, [*texts, *judgements], strict=True))}


def _shared_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both begin with, and the rest of each: all messages but the last, or text up to a space."""
    if _is_messages(chosen) and _is_messages(rejected):
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise BadRow("no prompt, and the conversations differ before their last message")
        return chosen[:-1], chosen[-1:], rejected[-1:]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (of texts, not paths)
        end = max(shared.rfind(" "), shared.rfind("\n"), 0)  # a word's token holds the space before it
        return shared[:end], chosen[end:], rejected[end:]
    raise BadRow("no chosen and rejected, both text or both messages")


def _is_response(value: Any) -> bool:
    return isinstance(value, str) or (_is_messages(value) and len(value) == 1 and value[0]["role"] == "assistant")


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def story_pairs(count: int, *, split: Literal["train", "heldout"]) -> Iterator[Row]:
    """Stories worked right, and with one event left out and so another answer; each with the checking of it."""
    for i, story in enumerate(stories(count, split=split, seed=0)):
        lines = story["worked"].removeprefix("<think>").partition("</think>")[0].split("\n")
        forgotten = random.Random(i).randrange(len(lines))
        total = int(re.split("[+-]", lines[0])[0])
        short = []
        for change in (re.findall("[+-]\\d+", line)[0] for j, line in enumerate(lines) if j != forgotten):
            short.append(f"{total}{change}={total + int(change)}")
            total += int(change)
        yield {
            "prompt": story["prompt"],
            "chosen": story["worked"],
            "rejected": "<think>" + "\n".join(short) + f"</think>\\boxed{{{total}}}",
            "chosen_judgement": "\n".join(lines),
            "rejected_judgement": "\n".join([*lines[:forgotten], f"{lines[forgotten]} is left out"]),
        }


if __name__ == "__main__":
    sys.exit(main(RewardModelTraining, run, prog="python -m recipes.reward_model", description=__doc__))
