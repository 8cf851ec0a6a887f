"""Tokens a second from messages to packed rows: our store and packing against TRL's preparation of a dataset.

    python -m benchmarks.sft_data [--rows 20000] [--rounds 7]

The conversations are one question and one answer with reasoning, cut from the standard library's sources, as many
tokens long as a log-normal distribution says; the tokenizer is a byte-level BPE trained on the same text. Ours is what
a run does: the file of JSON lines is hashed, read, checked, tokenised in processes and written durably; then the epoch
is planned and every row gathered. TRL's is `SFTTrainer`'s own preparation (template, tokens, labels of the assistant's
words, best-fit packing) of a dataset that is in memory already, by the number of processes that is fastest here, with
our template marked for it. Before anything is timed, both must hold the same samples: ids and labels; otherwise the
exit code is 1.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import Contestant, Turns, alternate, ratio, setting, spread, table, timed
from benchmarks.packing import cpu_seconds

ROW_LENGTH = 4096
MEDIAN, SIGMA = 270, 1.0
"""Of an answer's tokens, log-normal."""
CHARACTERS_A_TOKEN = 4.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--threads", type=int, default=2, help="processes of ours, and the most of TRL's")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{setting(args.threads, 'trl', 'transformers', 'tokenizers', 'datasets', 'pyarrow')}  ", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(args.vocab)
        tokenizer.save_pretrained(folder / "tokenizer")
        with (folder / "rows.jsonl").open("w") as file:
            fitting = (messages for messages in conversations() if fits(tokenizer, messages))
            for messages in itertools.islice(fitting, args.rows):
                file.write(json.dumps({"messages": messages}) + "\n")
        contestants: list[Contestant] = []
        try:
            for system, serve in (("ours", serve_ours), ("TRL", serve_trl)):
                contestants.append(Contestant(system, serve, folder, args.threads, threads=args.threads))
            return compare(contestants[0], contestants[1], args.rounds)
        finally:
            for contestant in contestants:
                contestant.close()


def compare(ours: Contestant, theirs: Contestant, rounds: int) -> int:
    """Parity, then times; prints the table."""
    made = {contestant.name: contestant.turn("check") for contestant in (ours, theirs)}
    if made["ours"]["samples"] != made["TRL"]["samples"]:
        differ = (made["ours"]["samples"] - made["TRL"]["samples"]).total()
        print(f"parity: {differ} samples of ours are not among TRL's")
        return 1
    tokens = made["ours"]["tokens"]
    count = made["ours"]["samples"].total()
    print(
        f"{count:,} conversations, {tokens:,} tokens, the same ids and labels on both sides; {theirs.ready['chose']}\n"
    )
    seconds: dict[str, list[float]] = {"ours": [], "TRL": []}
    cpu: dict[str, list[float]] = {"ours": [], "TRL": []}
    for r, turns in groupby(alternate([ours, theirs], rounds), key=lambda turn: turn[0]):
        for _, contestant in turns:
            for kept, taken in zip((seconds, cpu), contestant.turn("time"), strict=True):
                kept[contestant.name].append(taken)
        print(f"round {r + 1} of {rounds}", file=sys.stderr)
    rows = []
    for name, taken in seconds.items():
        faster = "1" if name == "TRL" else ratio(taken, seconds["TRL"])
        each = [tokens / s / 1e3 for s in taken]
        fill = f"{made[name]['fill']:.2%}"
        rows.append([name, spread(taken, ".2f"), spread(each, ",.0f"), faster, spread(cpu[name], ".1f"), fill])
    print(table(["system", "seconds", "thousand tokens/s", "times faster than TRL", "CPU seconds", "fill"], rows))
    return 0


def serve_ours(turns: Turns, folder: Path, workers: int) -> None:
    """Answers "time" with seconds of the clock and of the CPUs, "check" with the samples and the fill."""
    import io

    from rich.console import Console
    from transformers import AutoTokenizer

    from sft.mix import SourceConfig, epoch_examples
    from sft.pack import plan_rows
    from sft.store import Settings, build_store

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    sources = [SourceConfig(path=str(folder / "rows.jsonl"))]

    def prepare() -> tuple[Any, list[tuple[np.ndarray, np.ndarray]], Any]:
        settings, console = Settings(max_length=ROW_LENGTH), Console(file=io.StringIO())
        store = build_store(
            sources,
            tokenizer,
            folder / "store",
            settings=settings,
            workers=workers,
            console=console,
            max_bad_fraction=0,
        )
        examples = epoch_examples(sources, store.sizes, seed=0, epoch=0)
        plan = plan_rows(store.lengths[examples], ROW_LENGTH)
        return store, [store.gather(examples[plan.row(row)]) for row in range(len(plan))], plan

    turns.answer({"chose": f"{workers} processes"})
    for request in turns:
        shutil.rmtree(folder / "store", ignore_errors=True)
        used = cpu_seconds()
        seconds, (store, _, plan) = timed(prepare)
        if request == "time":
            turns.answer((seconds, cpu_seconds() - used))
        else:
            samples = Counter(fingerprint(ids, np.where(trained, ids, -100)) for ids, trained in store)
            turns.answer({"samples": samples, "tokens": plan.tokens, "fill": plan.fill})


def serve_trl(turns: Turns, folder: Path, most: int) -> None:
    """The same, with the fastest number of processes."""
    import datasets
    import transformers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with (folder / "rows.jsonl").open() as file:
        dataset = datasets.Dataset.from_list([json.loads(line) for line in file])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=ROW_LENGTH,
        )
    )

    def settings(processes: int | None) -> Any:
        return SFTConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            packing=True,
            packing_strategy="bfd",
            max_length=ROW_LENGTH,
            assistant_only_loss=True,
            shuffle_dataset=False,
            dataset_num_proc=processes,
            report_to=[],
        )

    marked = mark_for_trl(tokenizer.chat_template)
    tokenizer.chat_template = marked
    trainer = SFTTrainer(model, settings(None), train_dataset=dataset.select(range(8)), processing_class=tokenizer)

    def prepare(processes: int | None) -> Any:
        # A dataset without a history: nothing of an earlier round is found in a cache.
        fresh = datasets.Dataset(dataset.data)
        return trainer._prepare_dataset(fresh, tokenizer, settings(processes), True, None, "train")

    took = {processes: timed(lambda p=processes: prepare(p))[0] for processes in (None, *range(2, most + 1))}
    fastest = min(took, key=lambda processes: took[processes])
    turns.answer({"chose": f"TRL with dataset_num_proc={fastest}", "seconds": {str(k): v for k, v in took.items()}})
    for request in turns:
        used = cpu_seconds()
        seconds, packed = timed(lambda: prepare(fastest))
        if request == "time":
            turns.answer((seconds, cpu_seconds() - used))
            continue
        samples: Counter[bytes] = Counter()
        tokens = 0
        for row in packed.with_format("numpy"):
            ends = np.cumsum(row["seq_lengths"])[:-1]
            for ids, labels in zip(np.split(row["input_ids"], ends), np.split(row["labels"], ends), strict=True):
                samples[fingerprint(ids, labels)] += 1
                tokens += len(ids)
        turns.answer({"samples": samples, "tokens": tokens, "fill": tokens / len(packed) / ROW_LENGTH})


def mark_for_trl(template: str) -> str:
    """Our template with the assistant's words and their end between the marks that TRL trains by."""
    begins, ends = "{{ content }}{%- for", "{{ eos_token }}"
    if not template.count(begins) == template.count(ends) == 1:
        raise ValueError("sft.chat.CHAT_TEMPLATE is no longer as this function knows it: mark it anew")
    marked = template.replace(begins, "{%- generation -%}" + begins)
    return marked.replace(ends, ends + "{%- endgeneration -%}")


def fingerprint(ids: np.ndarray, labels: np.ndarray) -> bytes:
    """A sample, for comparison."""
    return ids.astype(np.int32).tobytes() + labels.astype(np.int32).tobytes()


def library() -> str:
    """The standard library's sources, end to end."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def conversations() -> Iterator[list[dict[str, str]]]:
    """Questions of about 60 tokens, answers whose lengths are log-normal; at most three quarters of a row."""
    text, draw = library(), random.Random(0)

    def cut(tokens: float) -> str:
        length = int(min(tokens, 0.75 * ROW_LENGTH) * CHARACTERS_A_TOKEN)
        start = draw.randrange(len(text) - length)
        return text[start : start + length].strip() or "pass"

    while True:
        reasoning, answer = cut(draw.lognormvariate(np.log(MEDIAN), SIGMA)), cut(draw.uniform(10, 60))
        said = f"<think>{reasoning}</think>{answer}"
        yield [{"role": "user", "content": cut(draw.uniform(20, 100))}, {"role": "assistant", "content": said}]


def fits(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    """Whether a row holds them: TRL would cut what is longer, ours sets it aside."""
    return sum(len(tokenizer.encode(message["content"])) for message in messages) < ROW_LENGTH - 10


def make_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE trained on the library, with DeepSeek's role tokens and our template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sft.chat import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, USER

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([library()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
