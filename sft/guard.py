"""A few examples of each source, as they will be trained -> the run stops before step 1, or they are shown.

`check_sources` compares what is trained with what the assistant said and with what a sampler would be given: templates
delete reasoning, train role tokens or forget the end token without a word. `preview` prints examples with their mask.
Left out: counting the rows that can't be used (sft/store.py).
"""

import functools
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice, takewhile, zip_longest

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from runtime.errors import UserError
from runtime.progress import visible
from sft.chat import (
    ASSISTANT,
    CHAT_TEMPLATE,
    TOOL_TOKENS,
    USER,
    Message,
    Prompt,
    Turns,
    control_ids,
    encode_prompt,
    trained_turns,
)
from sft.mix import SourceConfig
from sft.shards import Settings, encode_chunk
from sft.sources import Conversation, Source, conversation
from sft.sources import Text as PlainText

TRAINED_STYLE, CONTROL_STYLE = "green", "bold magenta"
CHECKED = 64
"""Rows of each source that are checked."""
SHOWN = 1_500
"""Characters of one stretch of text that a preview shows, half from its beginning and half from its end."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a row says and what is trained of it."""

    source: str
    """Name of the source."""
    line: int
    """Line or row of the source."""
    content: Conversation | PlainText
    """What the row says."""
    ids: Sequence[int] | npt.NDArray[np.integer]
    """Token ids as the trainer gets them."""
    trained: Sequence[bool] | npt.NDArray[np.bool_]
    """True = trained; as long as `ids`."""


def check_sources(
    sources: Iterable[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_turns: Turns = "all",
    end_ids: Collection[int] | None = None,
) -> None:
    """`check` the first examples of each source, encoded as for the store; UserError where there are none."""
    for source in sources:
        check(first_examples(source, tokenizer, CHECKED, train_turns=train_turns), tokenizer, end_ids=end_ids)


def check(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, end_ids: Collection[int] | None = None
) -> None:
    """Raise UserError for the first example whose ids or mask aren't what its row says.

    end_ids: the ids that end a turn, if not the tokenizer's EOS alone; a model's generation_config names them.
    """
    ends = {tokenizer.eos_token_id} - {None} if end_ids is None else set(end_ids)
    for example in examples:
        for problem in _problems(tokenizer, example, ends):
            raise UserError(f"{example.source!r}, line {example.line}: {problem}")


def first_examples(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase, count: int, *, train_turns: Turns
) -> list[Example]:
    """Those of the first `count` rows of a source that can be used; UserError if none can."""
    rows = dict(islice(Source(source.path, max_examples=source.max_examples), count))
    anything = Settings(max_length=2**31 - 1, train_turns=train_turns, unreviewed="keep")
    _, data = encode_chunk(tokenizer, (0, list(rows.items())), anything)
    batch = pa.ipc.open_file(data).get_batch(0)
    examples = []
    for sample in batch.to_pylist():
        content = conversation(rows[sample["line"]])
        if train_turns == "last" and isinstance(content, Conversation):
            content = content._replace(train_turns="last")
        trained = np.zeros(len(sample["ids"]), np.bool_)
        for begin, end in zip(sample["trained"][::2], sample["trained"][1::2], strict=True):
            trained[begin:end] = True
        line, ids = sample["line"], sample["ids"]
        examples.append(Example(source=source.path, line=line, content=content, ids=ids, trained=trained))
    if not examples:
        rejects = json.loads(batch.schema.metadata[b"rejects"])
        why = "line {}: {}: {}".format(*rejects[0]) if rejects else "it has none"
        raise UserError(f"{source.path!r}: none of the first {len(rows)} rows can be used; {why}")
    return examples


def _problems(tokenizer: PreTrainedTokenizerBase, example: Example, ends: set[int]) -> Iterator[str]:
    """What is wrong with an example and what to do, causes before their consequences."""
    ids, mask = list(map(int, example.ids)), list(map(bool, example.trained))
    trained = [i for i, is_trained in zip(ids, mask, strict=True) if is_trained]
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    turns = _turns(example.content)
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _, _ in turns]
    uses_ours = tokenizer.chat_template is not None and tokenizer.get_chat_template() == CHAT_TEMPLATE

    if uses_ours and (missing := _missing_tokens(tokenizer, example.content)):
        yield f"{missing} isn't a token of this tokenizer, so any text could forge it: add it, and resize the embedding"
    if not trained:
        yield "no token is trained: let the template's {% generation %} hold what the assistant says, or drop the row"
    bos = tokenizer.bos_token_id
    if bos not in ends and ids.count(bos) > 1:
        yield f"{ids.count(bos)} × {tokenizer.bos_token}: let the chat template write it once"

    plain = _normalize(decode(trained))
    for _, message, name in turns:
        reasoning, closes, _ = (message["content"] or "").rpartition("</think>")
        if _normalize(reasoning + closes) not in plain:
            yield (
                f"the reasoning of {name}, {reasoning[:60]!r}, vanishes in the chat template: set "
                "tokenizer.chat_template to one that keeps it, say sft.chat.CHAT_TEMPLATE"
            )
    roles = control_ids(tokenizer).intersection(encode_prompt(tokenizer, _opening(example.content))) - ends
    for i in trained:
        if i in roles:
            yield f"the mask covers the role token {decode([i])!r}: let the template's {{% generation %}} leave it out"

    said, unended = _split(trained, ends)
    if unended or len(said) < len(turns):
        yield (
            f"EOS is untrained behind {decode((unended or trained)[-8:])!r}, so the model would never stop: let the "
            f"template's {{% generation %}} hold it; {decode(sorted(ends)) or 'no token'!r} counts as EOS"
        )
    for prompt_ids, (_, _, name) in zip(prompts, turns, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ids, prompt_ids, strict=False)) if a != b), len(prompt_ids))
        if at < len(prompt_ids):
            yield (
                f"before {name} the trainer has {decode(ids[at : at + 8])!r} where a sampler gets "
                f"{decode(prompt_ids[at : at + 8])!r} (token {at}): let the template's add_generation_prompt write "
                "what stands before the assistant's words in a whole conversation, and make the store anew"
            )
        elif mask[at : at + 1] != [True] or (at and mask[at - 1] and ids[at - 1] not in ends):
            yield (
                f"training of {name} doesn't begin at token {at}, {decode(ids[at : at + 8])!r}, where a sampler would: "
                "let the template's {% generation %} begin there"
            )
    exact = uses_ours or tokenizer.chat_template is None
    for segment, (_, message, name) in zip(said, turns, strict=False):
        if difference := _difference(message, decode(segment), exact=exact):
            yield f"{name} isn't what is trained: {difference}; the chat template or the tokenizer rewrites it"
    if len(said) > len(turns):
        yield f"{decode(said[len(turns)])!r} is trained, which no assistant said: look at the chat template"


def _turns(content: Conversation | PlainText) -> list[tuple[Prompt, Message, str]]:
    """What comes before each trained turn, the turn, and what to call it."""
    if isinstance(content, PlainText):
        return [(content.prompt, {"content": content.completion}, "the completion")]
    messages, _ = content
    turns = sorted(trained_turns(messages, content.train_turns))
    return [(messages[:i], messages[i], f"messages[{i}]") for i in turns]


def _opening(content: Conversation | PlainText) -> Prompt:
    """What comes before the assistant's first turn: its control tokens are those of roles."""
    if isinstance(content, PlainText):
        return content.prompt
    return list(takewhile(lambda message: message["role"] != "assistant", content.messages))


def _missing_tokens(tokenizer: PreTrainedTokenizerBase, content: Conversation | PlainText) -> str | None:
    if isinstance(content, PlainText):
        return None
    uses_tools = any(message["role"] == "tool" or message.get("tool_calls") for message in content.messages)
    needed = [USER, ASSISTANT, *(TOOL_TOKENS if uses_tools else ())]
    return next((token for token in needed if token not in tokenizer.get_added_vocab()), None)


def _split(ids: Sequence[int], ends: set[int]) -> tuple[list[list[int]], list[int]]:
    """Ids between end tokens, and what no end token follows."""
    segments: list[list[int]] = [[]]
    for i in ids:
        if i in ends:
            segments.append([])
        else:
            segments[-1].append(i)
    return segments[:-1], segments[-1]


def _difference(message: Message, trained: str, *, exact: bool) -> str | None:
    """How the text of a trained turn differs from its message; calls of tools are only looked for by name."""
    normalize = functools.partial(unicodedata.normalize, "NFC") if exact else _normalize
    said, trained = normalize(message["content"] or ""), normalize(trained)
    calls = message.get("tool_calls") or []
    text = trained[: len(said)] if calls else trained
    if text != said:
        both = enumerate(zip(said, text, strict=False))
        at = next((i for i, (a, b) in both if a != b), min(len(said), len(text)))
        return f"{text[at : at + 40]!r} where it says {said[at : at + 40]!r}"
    for call in calls:
        if call["function"]["name"] not in trained[len(said) :]:
            return f"nothing of the call of {call['function']['name']!r}"
    return None


def _normalize(text: str) -> str:
    """Text without what other families' templates lay out anew: empty reasoning, and white space around it."""
    text = unicodedata.normalize("NFC", text.strip())
    return re.sub(r"\s*(</?think>)\s*", r"\1", text).replace("<think></think>", "")


def preview(
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    train_turns: Turns = "all",
    console: Console | None = None,
) -> None:
    """`show` the first `count` examples of a mix, one of each source in turn."""
    each = [first_examples(source, tokenizer, max(count, CHECKED), train_turns=train_turns) for source in sources]
    in_turn = (example for turn in zip_longest(*each) for example in turn if example is not None)
    show(islice(in_turn, count), tokenizer, console=console)


def show(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, console: Console | None = None) -> None:
    """Print examples with ⟦trained text⟧ and «control tokens», in colours where there are some.

    Nothing a row holds reaches the terminal unescaped, nor can it pass for a mark.
    """
    console = console or Console()
    encoding = console.encoding or "ascii"
    control = control_ids(tokenizer)
    legend = [("⟦trained⟧", TRAINED_STYLE), (" not trained ", ""), ("«control token»", CONTROL_STYLE)]
    for parts in chain([legend], (_stretches(tokenizer, example, control) for example in examples)):
        printable = ((text.encode(encoding, "backslashreplace").decode(encoding), style) for text, style in parts)
        console.print(Text.assemble(*printable), soft_wrap=True)


def _stretches(
    tokenizer: PreTrainedTokenizerBase, example: Example, control: Collection[int]
) -> Iterator[tuple[str, str]]:
    """An example as text in its styles."""
    total, trained = len(example.ids), sum(map(int, example.trained))
    head = f"{example.source}, line {example.line}: {total:,} tokens, {trained:,} trained ({trained / total:.0%})"
    yield f"\n{visible(head, keep='')}\n", "bold"
    both = zip(map(int, example.ids), map(bool, example.trained), strict=True)
    for is_trained, stretch in groupby(both, key=lambda pair: pair[1]):
        style = TRAINED_STYLE if is_trained else ""
        yield "⟦" if is_trained else "", style
        for is_control, ids in groupby((i for i, _ in stretch), key=control.__contains__):
            if is_control:
                yield from ((f"«{_inert(tokenizer.decode([i]))}»", CONTROL_STYLE) for i in ids)
            else:
                yield _inert(_shorten(tokenizer.decode(list(ids)))), style
        yield "⟧" if is_trained else "", style


def _inert(text: str) -> str:
    """Text that neither acts on a terminal nor passes for a mark of ours."""
    return visible("".join(f"\\u{ord(c):04x}" if c in "⟦⟧«»" else c for c in text))


def _shorten(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
