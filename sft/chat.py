"""Messages -> token ids and what of them is trained, in one place for training, sampling and evaluation.

A conversation is cut into pieces of text, each trained or not, and every piece is encoded on its own. A sampler's
prompt is the same pieces up to where the assistant speaks, so it is always a prefix of what is trained. Trained is
what the assistant says, with its reasoning and tool calls, and the token that ends its turn; role tokens and tool
outputs never.

The template here is DeepSeek-V3's turn format without its habit of deleting the reasoning of earlier turns; it doesn't
open `<think>` for the model, so the tag is part of what is learnt. A tokenizer with a chat template of its own keeps
it; one without (a base model's) gets plain lines. Left out: lists of tools and pictures.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from runtime.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOL_TOKENS = CALLS, CALL, SEP, CALL_END, CALLS_END, OUTPUTS, OUTPUT, OUTPUT_END, OUTPUTS_END = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] or '' -%}"
    "{%- set after_tool = loop.previtem is defined and loop.previtem['role'] == 'tool' -%}"
    "{%- if message['role'] == 'system' -%}{{ content }}"
    "{%- elif message['role'] == 'user' -%}{{ '" + USER + "' + content }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '' if after_tool else '" + ASSISTANT + "' }}{{ content }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set arguments = call['function']['arguments'] -%}"
    "{{ ('" + CALLS + "' if loop.first else '\n') + '" + CALL + "' + (call['type'] or 'function') }}"
    "{{ '" + SEP + "' + call['function']['name'] + '\n```json\n' }}"
    "{{ (arguments if arguments is string else arguments | tojson) + '\n```" + CALL_END + "' }}"
    "{{ '" + CALLS_END + "' if loop.last }}"
    "{%- endfor -%}"
    "{{ eos_token }}"
    "{%- elif message['role'] == 'tool' -%}"
    "{{ ('' if after_tool else '" + OUTPUTS + "') + '" + OUTPUT + "' + content + '" + OUTPUT_END + "' }}"
    "{{ '" + OUTPUTS_END + "' if loop.nextitem is undefined or loop.nextitem['role'] != 'tool' }}"
    "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and (not messages or messages[-1]['role'] != 'tool') -%}"
    "{{ '" + ASSISTANT + "' }}"
    "{%- endif -%}"
)

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message]
Turns: TypeAlias = Literal["all", "last"]
Piece: TypeAlias = tuple[str, bool]
"""Text that is encoded on its own, and whether it is trained."""
Sample: TypeAlias = tuple[list[int], list[bool]]
"""Token ids and a mask of the same length: True = trained, a target of the loss."""


def is_conversational(prompt: Prompt) -> bool:
    """Whether a prompt is messages rather than text."""
    return not isinstance(prompt, str)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids the model continues: text with the tokenizer's own prefix, messages up to the assistant's turn.

    A control token spelt out in a message stays text; a text prompt is the caller's own and may hold them.
    A tokenizer without a chat template (a base model's) gets the messages' plain words, a line each.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    (sample,) = _encode(tokenizer, [_pieces(tokenizer, prompt, trained=set(), to_continue=True)])
    return sample[0]


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> Sample:
    """A prompt and its completion, trained with the end token, whatever a template would make of the completion."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    pieces = [(_cut_control_tokens(tokenizer, completion), True)]
    ((completion_ids, _),) = _encode(tokenizer, [pieces])
    completion_ids = [*completion_ids, tokenizer.eos_token_id]
    return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, train_turns: Turns = "all"
) -> Sample:
    """A conversation as ids and mask: True = what the assistant says in all its turns, or its last, and its end.

    `messages`: {"role", "content"}; an assistant's may hold "tool_calls" in OpenAI's form. Raises UserError for a
    message that can't be rendered, and for a template that writes a turn otherwise than it prompts for it.
    """
    (sample,) = _encode(tokenizer, [_pieces(tokenizer, messages, trained=trained_turns(messages, train_turns))])
    return sample


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, train_turns: Turns = "all"
) -> list[Sample]:
    """As `encode_conversation` of each, faster: the tokenizer is called once, with each distinct text."""
    pieces = []
    for index, messages in enumerate(conversations):
        try:
            pieces.append(_pieces(tokenizer, messages, trained=trained_turns(messages, train_turns)))
        except UserError as error:
            raise UserError(f"conversation {index}: {error}") from error
    return _encode(tokenizer, pieces)


def trained_turns(messages: Sequence[Message], train_turns: Turns) -> set[int]:
    """Which messages are trained."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return set(turns if train_turns == "all" else turns[-1:])


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no text may become: those of roles, ends of turns, tools."""
    return frozenset(tokenizer.convert_tokens_to_ids(list(_control_tokens(tokenizer, len(tokenizer)))))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides, beside the vocabulary, how messages become ids; for the key of what is made from them."""
    parts = [ENCODING, _template(tokenizer), tokenizer.special_tokens_map, _control_tokens(tokenizer, len(tokenizer))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


ENCODING = 1
"""Raise it when this file makes other ids or masks of the same messages: stores are made anew."""


def _pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, trained: set[int], to_continue: bool = False
) -> list[Piece]:
    """The pieces of a conversation; those of the messages numbered in `trained` are trained. They may hold cuts."""
    template = _template(tokenizer)
    if template == CHAT_TEMPLATE:
        turns = _turns(messages, tokenizer.bos_token or "", tokenizer.eos_token or "", to_continue)
        return _join(tokenizer, turns, trained)
    if template is None:
        return _join(tokenizer, _lines(messages, _prefix(tokenizer), tokenizer.eos_token or ""), trained)
    return _pieces_of_template(tokenizer, template, messages, trained, to_continue)


Part: TypeAlias = tuple[str, int | None, bool]
"""Text, the assistant message it belongs to, if any, and whether the text is a control token."""


def _turns(messages: Sequence[Message], bos: str, eos: str, to_continue: bool) -> Iterator[Part]:
    """CHAT_TEMPLATE in Python, which knows whose every word is, and is three times as fast."""
    yield bos, None, True
    before = None
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message, index)
        if before == "tool" and role != "tool":
            yield OUTPUTS_END, None, True
        if role == "system":
            yield content, None, False
        elif role == "user":
            yield USER, None, True
            yield content, None, False
        elif role == "assistant":
            if before != "tool":
                yield ASSISTANT, None, True
            yield content, index, False
            for text, is_control in _tool_calls(message.get("tool_calls") or []):
                yield text, index, is_control
            yield eos, index, True
        elif role == "tool":
            if before != "tool":
                yield OUTPUTS, None, True
            yield OUTPUT, None, True
            yield content, None, False
            yield OUTPUT_END, None, True
        else:
            raise UserError(f"messages[{index}].role={role!r}: one of system, user, assistant, tool")
        before = role
    if before == "tool":
        yield OUTPUTS_END, None, True
    elif to_continue:
        yield ASSISTANT, None, True


def _tool_calls(calls: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    for index, call in enumerate(calls):
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield (CALLS, True) if index == 0 else ("\n", False)
        yield CALL, True
        yield call.get("type") or "function", False
        yield SEP, True
        yield f"{function['name']}\n```json\n{arguments}\n```", False
        yield CALL_END, True
    if calls:
        yield CALLS_END, True


def _lines(messages: Sequence[Message], prefix: str, eos: str) -> Iterator[Part]:
    """A base model's conversation: the plain words, a line each, and the end token behind the assistant's."""
    yield prefix, None, True
    for index, message in enumerate(messages):
        content = _content(message, index)
        if message["role"] == "assistant":
            yield content, index, False
            yield eos, index, True
        else:
            yield content + "\n", None, False


def _content(message: Message, index: int) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content is a {type(content).__name__}: give text")
    return content


def _join(tokenizer: PreTrainedTokenizerBase, parts: Iterable[Part], trained: set[int]) -> list[Piece]:
    """Parts as pieces: neighbouring text of one owner in one, with cuts in what spells a control token."""
    pieces = []
    for (owner, is_control), group in itertools.groupby(parts, key=lambda part: part[1:]):
        if is_control:
            pieces += [(text, owner in trained) for text, _, _ in group]
        elif text := "".join(text for text, _, _ in group):
            pieces.append((_cut_control_tokens(tokenizer, text), owner in trained))
    return pieces


def _pieces_of_template(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], trained: set[int], to_continue: bool
) -> list[Piece]:
    """The pieces of a conversation in another family's template, split where the assistant begins and ends to speak.

    {% generation %} decides what is trained of what the assistant says; without it all is.
    """
    messages = _cut_all(tokenizer, messages)
    render = functools.partial(_render, tokenizer, template)
    whole, marked = render(messages, to_continue=to_continue)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last = None if to_continue else len(messages) - 1
    found = {i: _find_turn(tokenizer, render, messages[: i + 1], whole, is_all=i == last) for i in turns}
    spans: list[tuple[int, int, bool]] = []
    unfound = [turn for i, turn in found.items() if i in trained and isinstance(turn, str)]
    if unfound and not marked:
        raise UserError(unfound[0])
    if unfound:  # whether the sampler would see the same is then the guard's to find out
        if len(trained) < len(turns) != len(marked):
            raise UserError(f"{unfound[0]}. Its {{% generation %}} tags don't tell turns apart; train all turns")
        spans = [(*span, len(trained) == len(turns) or turns[i] in trained) for i, span in enumerate(marked)]
    else:
        for i, turn in found.items():
            if not isinstance(turn, str):
                start, end = turn
                inside = [(max(a, start), min(b, end)) for a, b in marked or [turn] if a < end and start < b]
                spans += [(start, start, False), *((a, b, i in trained) for a, b in inside), (end, end, False)]
    pieces, done = [], 0
    for start, end, is_trained in spans:
        pieces += [(whole[done:start], False), (whole[start:end], is_trained)]
        done = end
    return [*pieces, (whole[done:], False)]


Render: TypeAlias = Callable[..., tuple[str, list[tuple[int, int]]]]


def _find_turn(
    tokenizer: PreTrainedTokenizerBase, render: Render, messages: Sequence[Message], whole: str, *, is_all: bool
) -> tuple[int, int] | str:
    """Start and end of the last of `messages` in `whole`, a rendering of these (`is_all`) and more, or why not.

    It starts behind the prompt for it, and ends with the control tokens that end the turn: the line break that many
    templates put there is never sampled.
    """
    where = f"messages[{len(messages) - 1}]: the tokenizer's chat template"
    try:
        prompt, said = render(messages[:-1], to_continue=True)[0], whole if is_all else render(messages)[0]
    except UserError as error:
        return f"{where} can't render the prompt for this turn: {error}"
    if whole.startswith(prompt):
        ending = _ending_pattern(tokenizer, len(tokenizer)).search(said, len(prompt))
        said = said[: ending.end()] if ending else said
        if whole.startswith(said):
            return len(prompt), max(len(prompt), len(said))
    expected = said if whole.startswith(prompt) else prompt
    both = enumerate(zip(expected, whole, strict=False))
    at = next((i for i, (a, b) in both if a != b), min(len(expected), len(whole)))
    return (
        f"{where} writes this turn otherwise than it prompts for it, {whole[at : at + 40]!r} where "
        f"{expected[at : at + 40]!r} is expected; set tokenizer.chat_template to one that keeps earlier reasoning and "
        "opens no <think>, or train only the last turn if just earlier ones are rewritten"
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, to_continue: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Text of messages, and where {% generation %} marks it."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
            add_generation_prompt=to_continue,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the tokenizer's chat template can't render these messages: {error}") from error
    return text, spans[0] if spans else []


def _encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Piece]]) -> list[Sample]:
    if not _encodes_pieces_alike(tokenizer, len(tokenizer)):
        return [_encode_in_context(tokenizer, pieces) for pieces in conversations]
    texts = [[(text.split(CUT), trained) for text, trained in pieces] for pieces in conversations]
    distinct = list(dict.fromkeys(part for pieces in texts for parts, _ in pieces for part in parts))
    ids_of = dict(zip(distinct, _encode_texts(tokenizer, distinct), strict=True))
    samples = []
    for pieces in texts:
        ids: list[int] = []
        mask: list[bool] = []
        for parts, trained in pieces:
            for part in parts:
                ids += ids_of[part]
            mask += [trained] * (len(ids) - len(mask))
        samples.append((ids, mask))
    return samples


def _encode_in_context(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> Sample:
    """As `_encode`, for tokenizers that put a space before a text or swallow one behind a control token: each piece's
    ids are what it adds to the text before it."""
    text, ids, mask = "", list[int](), list[bool]()
    for piece, trained in pieces:
        text += piece
        whole = [i for part in _encode_texts(tokenizer, text.split(CUT)) for i in part]
        if whole[: len(ids)] != ids:  # a token across the seam, which no sampler could have continued with
            whole = ids + [i for part in _encode_texts(tokenizer, piece.split(CUT)) for i in part]
        ids = whole
        mask += [trained] * (len(ids) - len(mask))
    return ids, mask


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()  # some tokenizer.json hold one
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@functools.lru_cache(maxsize=8)
def _encodes_pieces_alike(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    """Whether a text has the same ids alone and behind a control token: byte-level tokenizers', not SentencePiece's."""
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return False
    end = tokenizer.eos_token or ""
    texts = ["a", " a", "\n"]
    (end_ids,) = _encode_texts(tokenizer, [end])
    alone, behind = (_encode_texts(tokenizer, [start + text for text in texts]) for start in ("", end))
    return behind == [end_ids + ids for ids in alone]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return None if tokenizer.chat_template is None else tokenizer.get_chat_template()


def _prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token, where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and bos in tokenizer("")["input_ids"][:1] else ""


CUT = "\ufdd0\ufdd1"
"""Where a text is cut: two code points that Unicode promises no text will ever use."""


def _cut_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Put a cut into every control token that a text spells out, or it would be encoded as the token itself."""
    starts, pattern = _to_cut(tokenizer, len(tokenizer))
    if not any(start in text for start in starts):
        return text  # nearly always, and far faster than looking for each
    kept, done = list[str](), 0
    while found := pattern.search(text, done):
        kept.append(text[done : found.start() + 1])
        done = found.start() + 1
    return CUT.join([*kept, text[done:]])


def _cut_all(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """The same value with cuts in every text it holds."""
    if isinstance(value, str):
        return _cut_control_tokens(tokenizer, value)
    if isinstance(value, Mapping):
        return {_cut_all(tokenizer, key): _cut_all(tokenizer, item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_cut_all(tokenizer, item) for item in value]
    return value


@functools.lru_cache(maxsize=8)
def _control_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    longest_first = sorted(_control_tokens(tokenizer, size), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@functools.lru_cache(maxsize=8)
def _ending_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """Control tokens with nothing but more of them and white space behind."""
    control = _control_pattern(tokenizer, size).pattern
    return re.compile(rf"(?:{control})+(?=(?:\s|{control})*\Z)")


@functools.lru_cache(maxsize=8)
def _to_cut(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[frozenset[str], re.Pattern[str]]:
    """What a text gets cuts in, its own cuts among it, and how any of that begins."""
    starts = {token[:2] for token in (*_control_tokens(tokenizer, size), CUT)}
    return frozenset(starts), re.compile(f"{_control_pattern(tokenizer, size).pattern}|{CUT}")


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """Special tokens, and others written like them (DeepSeek's <｜User｜> isn't special); <think> is ordinary text."""
    tokens = tokenizer.added_tokens_decoder.values()
    written = [t.content for t in tokens if t.special or t.content.startswith(("<|", "<｜"))]
    return tuple(token for token in written if len(token) > 1 and token not in ("<think>", "</think>"))
