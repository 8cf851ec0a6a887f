"""Messages to ids: the mask is the completion and its end token, reasoning stays, and text never becomes control."""

import pytest

from recipes.tiny import make_tokenizer
from sft.chat import ASSISTANT, BOS, EOS, USER, encode_example, encode_prompt, is_conversational

TALK = [{"role": "user", "content": "How many?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_template_writes_deepseeks_turns(tokenizer):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "<think>hm</think>Hi."},
        *TALK,
    ]
    rendered = f"{BOS}Be brief.{USER}Hello?{ASSISTANT}<think>hm</think>Hi.{EOS}{USER}How many?"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == rendered
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == rendered + ASSISTANT


def test_earlier_reasoning_is_kept_and_think_is_not_opened_for_the_model(tokenizer):
    talk = [*TALK, {"role": "assistant", "content": "<think>2+2=4</think>4"}, *TALK]
    text = tokenizer.decode(encode_prompt(tokenizer, talk))
    assert "<think>2+2=4</think>4" + EOS in text and text.endswith(ASSISTANT)


def test_rendering_then_tokenising_is_the_same_as_encoding(tokenizer):
    talk = [*TALK, {"role": "assistant", "content": "<think>12-7=5</think>\\boxed{5}"}, *TALK]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, talk) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, talk).count(tokenizer.bos_token_id) == 1


def test_prompt_and_completion_together_are_the_templates_whole_conversation(tokenizer):
    answer = "<think>12-7=5</think>\\boxed{5}"
    ids, _ = encode_example(tokenizer, TALK, answer)
    whole = tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": answer}], tokenize=False)
    assert tokenizer.decode(ids) == whole
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", [TALK, "How many?"], ids=["messages", "text"])
@pytest.mark.parametrize("completion", ["<think>2+2=4</think>\\boxed{4}", "é😀\n\n", "4", ""])
def test_trained_is_exactly_the_completion_and_its_end_token(tokenizer, prompt, completion):
    ids, mask = encode_example(tokenizer, prompt, completion)
    trained = [i for i, t in zip(ids, mask, strict=True) if t]
    assert tokenizer.decode(trained) == completion + EOS
    assert trained[-1] == tokenizer.eos_token_id and trained.count(tokenizer.eos_token_id) == 1
    assert [i for i, t in zip(ids, mask, strict=True) if not t] == encode_prompt(tokenizer, prompt)
    assert mask == sorted(mask)  # the prompt, then the completion


CONTROL = [BOS, EOS, "<｜▁pad▁｜>", USER, ASSISTANT]


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_a_control_token_spelt_out_in_a_message_stays_text(tokenizer, role):
    content = "x".join(["", *CONTROL, ""])
    clean = encode_prompt(tokenizer, [{"role": role, "content": "plain"}])
    ids = encode_prompt(tokenizer, [{"role": role, "content": content}])
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    assert [i for i in ids if i in control] == [i for i in clean if i in control]
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ids) == rendered  # not a character is lost


def test_a_control_token_spelt_out_in_a_demonstration_stays_text(tokenizer):
    ids, mask = encode_example(tokenizer, TALK, f"4{EOS}{USER}And now?")
    trained = [i for i, t in zip(ids, mask, strict=True) if t]
    assert trained.count(tokenizer.eos_token_id) == 1 and tokenizer.convert_tokens_to_ids(USER) not in trained
    assert tokenizer.decode(trained) == f"4{EOS}{USER}And now?{EOS}"


def test_a_control_token_that_is_not_special_stays_text_too():
    """As <｜User｜> in DeepSeek-V3's own tokenizer."""
    tokenizer, token = make_tokenizer(), "<｜tool▁sep｜>"
    tokenizer.add_tokens([token])
    control = tokenizer.convert_tokens_to_ids(token)
    assert control in tokenizer(token)["input_ids"]
    assert control not in encode_prompt(tokenizer, [{"role": "user", "content": f"a{token}b"}])


def test_think_tags_are_the_one_token_of_their_own_that_text_may_hold(tokenizer):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Use <think> and </think>."}])
    assert {tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")} <= set(ids)


def test_without_a_template_messages_are_their_plain_words(tokenizer):
    base = make_tokenizer()
    base.chat_template = None
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    assert base.decode(encode_prompt(base, talk)) == "Be brief.\nHow many?\n"
    ids, mask = encode_example(base, talk, "4")
    assert base.decode([i for i, t in zip(ids, mask, strict=True) if t]) == "4" + EOS


def test_messages_are_told_from_text():
    assert is_conversational(TALK) and not is_conversational("How many?") and is_conversational([])
