"""Messages -> token ids, in one place for training, sampling and evaluation.

A prompt is text, continued as it is, or a list of {"role", "content"} messages, rendered by the tokenizer's chat
template up to where the assistant speaks. The template here is DeepSeek's turn format without its habit of deleting
the reasoning of earlier turns; it doesn't open `<think>` for the model, so the tag is part of what is learnt.
"""

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

    A tokenizer without a chat template (a base model's) gets the messages' plain words, a line each.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(m["content"] for m in prompt) + "\n")["input_ids"])
    rendered: Any = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(rendered)


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> tuple[list[int], list[bool]]:
    """A demonstration as ids and a mask of the same length: True = trained, the completion and its end token."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    completion_ids = [
        *tokenizer(completion, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    return prompt_ids + completion_ids, [False] * len(prompt_ids) + [True] * len(completion_ids)
