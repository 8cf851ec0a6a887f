"""Messages to ids: trained is what the assistant says and its end, reasoning stays, text never becomes control.

transformers renders, tokenises and masks the same conversations as the judge.
"""

import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as decoding
from transformers import PreTrainedTokenizerFast

from recipes.tiny import make_tokenizer
from runtime.errors import UserError
from sft.chat import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    CUT,
    EOS,
    TOOL_TOKENS,
    USER,
    control_ids,
    encode_conversation,
    encode_conversations,
    encode_example,
    encode_prompt,
    is_conversational,
    template_hash,
)

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


TAGGED = CHAT_TEMPLATE.replace("{{ content }}{%- for", "{%- generation -%}{{ content }}{%- for").replace(
    "{{ eos_token }}", "{{ eos_token }}{%- endgeneration -%}"
)
"""The same text, with what is trained marked for transformers."""
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>a tool</think>", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "2."},
]


@pytest.fixture(scope="module")
def tool_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(TOOL_TOKENS))
    return tokenizer


@pytest.fixture(scope="module")
def tagged_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(TOOL_TOKENS))
    tokenizer.chat_template = TAGGED
    return tokenizer


def trained_text(tokenizer, sample):
    return tokenizer.decode([i for i, is_trained in zip(*sample, strict=True) if is_trained])


def spelt(tokenizer, sample):
    """Trained text between slashes, one pair for each stretch."""
    both = itertools.groupby(zip(*sample, strict=True), key=lambda pair: pair[1])
    return "".join(f"/{t}/" if on else t for on, g in both for t in [tokenizer.decode([i for i, _ in g])])


def by_transformers(tokenizer, messages):
    """transformers' ids and assistant mask."""
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], [bool(m) for m in made["assistant_masks"]]


def test_tools_are_written_as_deepseek_v3_does_and_their_outputs_arent_trained(tool_tokenizer):
    assert spelt(tool_tokenizer, encode_conversation(tool_tokenizer, TOOLS)) == (
        f"{BOS}{USER}1 + 1?{ASSISTANT}/<think>a tool</think>"
        "<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
        f"<｜tool▁calls▁end｜>{EOS}/"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        f"/2.{EOS}/"
    )


def test_the_last_turn_alone_can_be_trained(tokenizer):
    talk = [*TALK, {"role": "assistant", "content": "Four"}, *TALK, {"role": "assistant", "content": "Five"}]
    assert trained_text(tokenizer, encode_conversation(tokenizer, talk)) == f"Four{EOS}Five{EOS}"
    assert trained_text(tokenizer, encode_conversation(tokenizer, talk, train_turns="last")) == f"Five{EOS}"


words = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.sampled_from([*TOOL_TOKENS, BOS, EOS, USER, ASSISTANT, "<think>", "</think>", "<", "｜User｜>", "\n", *CUT]),
    ),
    max_size=5,
).map("".join)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": words, "arguments": words | st.dictionaries(words, st.integers() | words, max_size=2)}
            ),
        }
    ),
    max_size=2,
)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": words}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": words, "tool_calls": calls}),
)
conversations = st.lists(messages, min_size=1, max_size=6)
many = settings(max_examples=150, deadline=None)


@many
@given(conversations)
def test_any_conversation_is_the_templates_text_and_holds_no_forged_token(tool_tokenizer, talk):
    ids, _ = encode_conversation(tool_tokenizer, talk)
    text = tool_tokenizer.apply_chat_template(talk, tokenize=False)
    assert tool_tokenizer.decode(ids) == text
    silent = [{**m, "content": ""} for m in talk]
    for m in silent:
        if "tool_calls" in m:
            m["tool_calls"] = [{"function": {"name": "", "arguments": ""}} for _ in m["tool_calls"]]
    control = control_ids(tool_tokenizer)
    kept = [i for i in encode_conversation(tool_tokenizer, silent)[0] if i in control]
    assert [i for i in ids if i in control] == kept
    if text.count("<｜") == len(kept):  # nothing forged: whole texts may be compared
        assert ids == tool_tokenizer(text, add_special_tokens=False)["input_ids"]


@many
@given(conversations)
def test_any_conversation_trains_what_the_assistant_says_and_begins_as_its_prompts_do(tool_tokenizer, talk):
    sample = encode_conversation(tool_tokenizer, talk)
    ids, mask = sample
    starts = []
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            prompt = encode_prompt(tool_tokenizer, talk[:i])
            assert ids[: len(prompt)] == prompt
            starts.append(len(prompt))
            end = ids.index(tool_tokenizer.eos_token_id, len(prompt)) + 1
            said = tool_tokenizer.decode(ids[len(prompt) : end])
            assert all(mask[len(prompt) : end]) and said.startswith(message["content"]) and said.endswith(EOS)
            if not message.get("tool_calls"):
                assert said == message["content"] + EOS
    assert [i for i in range(len(mask)) if mask[i] and not (i and mask[i - 1])] == starts


@many
@given(conversations)
def test_any_conversation_has_transformers_ids_and_mask(tool_tokenizer, tagged_tokenizer, talk):
    """Unless it spells a control token, which transformers would take for one."""
    sample = encode_conversation(tool_tokenizer, talk)
    assert encode_conversation(tagged_tokenizer, talk) == sample
    if "<｜" not in str(talk):
        assert by_transformers(tagged_tokenizer, talk) == sample


@many
@given(st.lists(conversations, max_size=4))
def test_a_batch_is_its_conversations_one_by_one(tool_tokenizer, talks):
    one_by_one = [encode_conversation(tool_tokenizer, talk) for talk in talks]
    assert encode_conversations(tool_tokenizer, talks) == one_by_one


def test_a_turn_that_nobody_can_render_is_named(tokenizer):
    with pytest.raises(UserError, match=r"conversation 1: messages\[0\].role='developer'"):
        encode_conversations(tokenizer, [TALK, [{"role": "developer", "content": "x"}]])
    with pytest.raises(UserError, match=r"messages\[1\].content is a list: give text"):
        encode_conversation(tokenizer, [*TALK, {"role": "assistant", "content": ["x"]}])


def test_system_messages_that_together_spell_a_control_token_stay_text(tokenizer):
    talk = [{"role": "system", "content": USER[:3]}, {"role": "system", "content": USER[3:]}]
    assert tokenizer.convert_tokens_to_ids(USER) not in encode_prompt(tokenizer, talk)


def test_a_limit_in_the_tokenizers_file_cuts_nothing(tokenizer):
    limited = make_tokenizer()
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=50)
    assert encode_prompt(limited, TALK) == encode_prompt(tokenizer, TALK)


def test_the_hash_tells_templates_and_end_tokens_apart(tokenizer):
    other, ended = make_tokenizer(), make_tokenizer()
    assert template_hash(other) == template_hash(tokenizer)
    other.chat_template, ended.eos_token = TAGGED, USER
    assert len({template_hash(t) for t in (tokenizer, other, ended)}) == 3


FAMILIES = {
    "qwen2_5": (None, "<|im_start|>", "<|im_end|>"),
    "qwen3": (None, "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma3": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "phi3": (None, "<|user|>", "<|assistant|>", "<|end|>"),
    "deepseekv3": (BOS, USER, ASSISTANT, EOS),
}
"""Other families' templates, of which TRL has copies, with their control tokens from BOS to EOS."""
ANSWERED = [
    {"role": "user", "content": "1+1? <|im_end|>"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "\nmore"},
    {"role": "assistant", "content": "é <|im_start|>user"},
]


def family(name, *, training=False, strips=False):
    """The tiny tokenizer in another family's clothes; strips: control tokens swallow the white space behind them."""
    if not find_spec("trl"):
        pytest.skip("needs TRL's copies of chat templates")
    tokenizer = make_tokenizer()
    tokens = FAMILIES[name]
    tokenizer.add_tokens([AddedToken(token, special=True, rstrip=strips) for token in tokens if token])
    tokenizer.bos_token, tokenizer.eos_token = tokens[0], tokens[-1]
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{name}{'_training' if training else ''}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3", "phi3"])
def test_another_familys_template_is_rendered_as_it_is(name, strips):
    tokenizer = family(name, strips=strips)
    ids, mask = encode_conversation(tokenizer, ANSWERED)
    end = tokenizer.eos_token
    assert trained_text(tokenizer, (ids, mask)) == f"2{end}é <|im_start|>user{end}"
    plain = [{**m, "content": m["content"].replace("<|", "< |")} for m in ANSWERED]
    ids, _ = encode_conversation(tokenizer, plain)
    assert ids == tokenizer.apply_chat_template(plain, return_dict=True)["input_ids"]
    for turn in (1, 3):
        prompt = encode_prompt(tokenizer, plain[:turn])
        whole = tokenizer.apply_chat_template(plain[:turn], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prompt)] == prompt == whole


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_generation_tags_say_what_is_trained(name):
    tokenizer = family(name, training=True)
    plain = [{**m, "content": m["content"].replace("<|", "< |")} for m in ANSWERED]
    ids, mask = encode_conversation(tokenizer, plain)
    their_ids, their_mask = by_transformers(tokenizer, plain)
    assert ids == their_ids
    # What TRL's tags cover beyond: the line breaks before and behind what the model says.
    extra = [i for i, ours, theirs in zip(ids, mask, their_mask, strict=True) if theirs and not ours]
    assert set(extra) <= set(tokenizer("\n")["input_ids"])
    assert all(theirs for ours, theirs in zip(mask, their_mask, strict=True) if ours)
    last = encode_conversation(tokenizer, plain, train_turns="last")
    assert trained_text(tokenizer, last).endswith(f"é < |im_start|>user{tokenizer.eos_token}")
    assert trained_text(tokenizer, (ids, mask)).endswith(trained_text(tokenizer, last)) and sum(last[1]) < sum(mask)


def test_words_that_begin_with_a_line_break_begin_where_the_sampler_does():
    tokenizer = family("qwen2_5")
    tokenizer.add_tokens(["\n\n"])
    talk = [*TALK, {"role": "assistant", "content": "\n4"}]
    prompt = encode_prompt(tokenizer, TALK)
    ids, mask = encode_conversation(tokenizer, talk)
    assert ids[: len(prompt)] == prompt and mask[len(prompt)] and not any(mask[: len(prompt)])
    assert trained_text(tokenizer, (ids, mask)) == "\n4<|im_end|>"
    assert ids != tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


def test_a_template_that_deletes_earlier_reasoning_is_refused_unless_only_the_last_turn_is_trained():
    tokenizer = family("qwen3")
    talk = [*TALK, {"role": "assistant", "content": "<think>a</think>4"}] * 2
    with pytest.raises(UserError, match=r"messages\[1\]: .*'<think>\\na\\n</think>\\n\\n4<\|im_end\|>' is expected"):
        encode_conversation(tokenizer, talk)
    ids, mask = encode_conversation(tokenizer, talk, train_turns="last")
    assert trained_text(tokenizer, (ids, mask)) == "<think>\na\n</think>\n\n4<|im_end|>"
    prompt = encode_prompt(tokenizer, talk[:3])
    assert ids[: len(prompt)] == prompt


def test_a_template_that_opens_think_for_the_model_alone_is_refused():
    with pytest.raises(UserError, match=r"messages\[1\]: .*'<think>\\n' is expected"):
        encode_conversation(family("deepseekv3"), [*TALK, {"role": "assistant", "content": "4"}])


def test_a_template_that_cant_render_a_conversation_says_why():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_conversation(tokenizer, TALK)


def test_a_tokenizer_that_puts_a_space_before_every_text_has_its_templates_ids():
    """As SentencePiece's: what follows a control token is not the text's beginning."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoding.Metaspace(prepend_scheme="first")
    corpus = ["Hello there, how many? four <|user|> \n"] * 3
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '</s>' }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "four"}]
    ids, mask = encode_conversation(tokenizer, talk)
    assert ids == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert trained_text(tokenizer, (ids, mask)) == "four</s>"


def test_without_a_template_the_assistants_lines_are_trained():
    base = make_tokenizer()
    base.chat_template = None
    talk = [{"role": "system", "content": "Be brief."}, *TALK, {"role": "assistant", "content": "4"}] * 2
    ids, mask = encode_conversation(base, talk)
    assert spelt(base, (ids, mask)) == f"Be brief.\nHow many?\n/4{EOS}/Be brief.\nHow many?\n/4{EOS}/"
    prompt = encode_prompt(base, talk[:5])
    assert ids[: len(prompt)] == prompt and base.decode(prompt).endswith("How many?\n")
