"""Messages -> token ids, in one place for training, sampling and evaluation.

A prompt is text, continued as it is, or a list of {"role", "content"} messages, rendered by the tokenizer's chat
template up to where the assistant speaks. The template here is DeepSeek's turn format without its habit of deleting
the reasoning of earlier turns; it doesn't open `<think>` for the model, so the tag is part of what is learnt.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '" + USER + "' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)

Prompt = str | Sequence[Mapping[str, str]]


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
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(m["content"] for m in prompt) + "\n")["input_ids"])
    messages = [{**message, "content": _cut_control_tokens(tokenizer, message["content"])} for message in prompt]
    rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return _encode_pieces(tokenizer, rendered)


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> tuple[list[int], list[bool]]:
    """A demonstration as ids and a mask of the same length: True = trained, the completion and its end token."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    completion_ids = [
        *_encode_pieces(tokenizer, _cut_control_tokens(tokenizer, completion)),
        tokenizer.eos_token_id,
    ]
    return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)


# A code point that Unicode promises no text will ever use.
_CUT = "\ufdd0"


def _cut_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Put a cut into every control token that a text spells out, or it would be encoded as the token itself."""
    for token in _control_tokens(tokenizer, len(tokenizer)):
        if token in text:
            text = text.replace(token, token[0] + _CUT + token[1:])
    return text


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that is encoded piece by piece between cuts; almost always it has none."""
    return [i for piece in text.split(_CUT) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """Special tokens, and others written like them (DeepSeek's <｜User｜> isn't special); <think> is ordinary text."""
    tokens = tokenizer.added_tokens_decoder.values()
    return tuple(t.content for t in tokens if t.special or t.content.startswith(("<|", "<｜")))
