"""The guard lets right examples pass and names what is wrong with others; a preview shows what is trained."""

import dataclasses
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import normalizers

from recipes.tiny import make_tokenizer
from runtime.errors import UserError
from sft.chat import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, TOOL_TOKENS, USER, encode_conversation, encode_example
from sft.guard import Example, check, check_sources, preview, show
from sft.mix import SourceConfig
from sft.sources import Conversation, Text

ASKED = {"role": "user", "content": "1+1?"}
SAID = {"role": "assistant", "content": "<think>one more</think>2"}
AGAIN = [{"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "<think>2+1</think>3"}]
TALK = [ASKED, SAID, *AGAIN]
TURN = "{{% generation %}}{{{{ {} }}}}{{% endgeneration %}}"


def make_example(tokenizer, messages=TALK, *, train_turns="all", sample=None):
    ids, trained = sample or encode_conversation(tokenizer, messages, train_turns=train_turns)
    return Example(source="a.jsonl", line=7, content=Conversation(messages, train_turns), ids=ids, trained=trained)


def template(begin="{{ bos_token }}", user=USER, assistant=ASSISTANT, turn="m.content + eos_token", prompt=ASSISTANT):
    """A chat template in DeepSeek's turns, with `turn` marked as trained."""
    said = assistant + (turn if "generation" in turn else TURN.format(turn))
    each = f"{{% if m.role == 'user' %}}{user}{{{{ m.content }}}}{{% else %}}{said}{{% endif %}}"
    return f"{begin}{{% for m in messages %}}{each}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


def with_template(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def trls(name):
    if not find_spec("trl"):
        pytest.skip("needs TRL's copies of chat templates")
    return with_template((Path(find_spec("trl").origin).parent / "chat_templates" / name).read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def stops(tokenizer, match, messages=TALK, **kwargs):
    with pytest.raises(UserError, match=r"^'a.jsonl', line 7: " + match):
        check([make_example(tokenizer, messages, **kwargs)], tokenizer)


@pytest.mark.parametrize("train_turns", ["all", "last"])
@pytest.mark.parametrize("text", [CHAT_TEMPLATE, template(), None], ids=["ours", "another", "none"])
def test_right_examples_pass(text, train_turns):
    tokenizer = with_template(text)
    check([make_example(tokenizer, train_turns=train_turns)], tokenizer)
    completed = encode_example(tokenizer, "1+1?", "2")
    check([Example(source="a", line=1, content=Text("1+1?", "2"), ids=completed[0], trained=completed[1])], tokenizer)


def test_a_stores_arrays_and_calls_of_tools_pass(tokenizer):
    tools = make_tokenizer()
    tools.add_tokens(list(TOOL_TOKENS))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    check([make_example(tools, [ASKED, *called, *called[:1]], train_turns="last")], tools)
    talk = [ASKED, *called, SAID]
    ids, trained = encode_conversation(tools, talk)
    check([make_example(tools, talk, sample=(np.array(ids, np.int32), np.array(trained)))], tools)
    stops(tokenizer, "<｜tool▁calls▁begin｜> isn't a token of this tokenizer", talk)


def test_a_template_may_lay_out_reasoning_its_own_way_but_not_delete_it():
    tokenizer = trls("qwen3.jinja")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    plain = {"role": "assistant", "content": "2 "}
    check([make_example(tokenizer, talk) for talk in ([ASKED, SAID], [ASKED, plain])], tokenizer)
    check([make_example(tokenizer, train_turns="last")], tokenizer)


def test_reasoning_that_vanishes_in_the_template_stops_the_run():
    stops(trls("deepseekv3_training.jinja"), r"the reasoning of messages\[1\], '<think>one more', vanishes")


def test_a_mask_over_role_tokens_stops_the_run():
    stops(trls("deepseek_r1_distill_training.jinja"), "the mask covers the role token '<｜Assistant｜>'")


@pytest.mark.parametrize("turn", [TURN.format("m.content") + "{{ eos_token }}", "m.content"], ids=["untrained", "none"])
def test_an_untrained_end_stops_the_run(turn):
    stops(with_template(template(turn=turn)), "EOS is untrained behind .*'<｜end▁of▁sentence｜>' counts as EOS")


def test_an_end_token_that_isnt_the_tokenizers_must_be_named():
    tokenizer = with_template(template(turn="m.content + '<eot>'"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    stops(tokenizer, "EOS is untrained")
    check([make_example(tokenizer)], tokenizer, end_ids=[tokenizer.convert_tokens_to_ids("<eot>")])


def test_an_example_without_a_trained_token_stops_the_run(tokenizer):
    stops(with_template(template(turn="{{ m.content }}{% generation %}{% endgeneration %}")), "no token is trained")
    stops(tokenizer, "no token is trained", [ASKED])


def test_a_second_bos_stops_the_run():
    stops(with_template(template(begin="{{ bos_token + bos_token }}")), "2 × <｜begin▁of▁sentence｜>")


def test_a_prompt_that_the_sampler_gets_otherwise_stops_the_run(tokenizer):
    opened = with_template(template(prompt=ASSISTANT + "<think>\n"))
    stops(opened, r"before messages\[1\] the trainer has 'one more.*' where a sampler gets '\\n' \(token 8\)")
    stale = encode_conversation(with_template(template(user="Q: ")), TALK)
    stops(tokenizer, r"before messages\[1\] the trainer has 'Q: .*' where a sampler gets '<｜User｜>", sample=stale)
    cut = [part[:3] for part in encode_conversation(tokenizer, [ASKED, SAID])]
    stops(tokenizer, "no token is trained", sample=cut)


def test_training_that_begins_elsewhere_than_the_sampler_stops_the_run(tokenizer):
    talk = [ASKED, {"role": "assistant", "content": "two"}]
    ids, trained = encode_conversation(tokenizer, talk)
    late = list(trained)
    late[late.index(True)] = False
    stops(tokenizer, r"training of messages\[1\] doesn't begin at token .*'two", talk, sample=(ids, late))
    headed = with_template(template(assistant=ASSISTANT + "\n", prompt=ASSISTANT + "\n"))
    ids, trained = encode_conversation(headed, talk)
    early = list(trained)
    early[early.index(True) - 1] = True
    check([make_example(headed, talk)], headed)
    stops(headed, r"training of messages\[1\] doesn't begin at token .*'two", talk, sample=(ids, early))


def test_a_template_that_rewrites_what_the_assistant_said_stops_the_run():
    corrected = with_template(template(turn="m.content.replace('/think>2', '/think>3') + eos_token"))
    stops(corrected, r"messages\[1\] isn't what is trained: '3' where it says '2'")
    shortened = with_template(template(turn="m.content[:-1] + eos_token"))
    stops(shortened, r"messages\[1\] isn't what is trained: '' where it says '2'")
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    stops(with_template(template()), r"messages\[1\] .*: nothing of the call of 'add'", [ASKED, answer])


def test_a_tokenizer_that_rewrites_what_the_assistant_said_stops_the_run():
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    stops(lossy, "messages.1. isn't what is trained: 'two' where", [ASKED, {"role": "assistant", "content": "Two"}])


def test_our_template_may_not_even_lose_white_space():
    trimming = make_tokenizer()
    trimming.backend_tokenizer.normalizer = normalizers.Strip()
    stops(trimming, "messages.1. isn't what is trained", [ASKED, {"role": "assistant", "content": "2\n"}])
    trimmed = with_template(template(turn="(m.content | trim) + eos_token"))
    check([make_example(trimmed, [ASKED, {"role": "assistant", "content": "2\n"}])], trimmed)


def test_words_trained_behind_the_last_end_stop_the_run(tokenizer):
    ids, trained = encode_conversation(tokenizer, [ASKED, SAID, ASKED])
    stops(tokenizer, r"EOS is untrained behind '\?'", [ASKED, SAID, ASKED], sample=(ids, [*trained[:-1], True]))


def test_composed_and_decomposed_accents_are_the_same_words():
    composing = make_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    check(
        [make_example(composing, [ASKED, {"role": "assistant", "content": "<think>e\u0301</think>e\u0301"}])], composing
    )


def test_turns_that_were_not_to_be_trained_stop_the_run(tokenizer):
    all_trained = encode_conversation(tokenizer, TALK)
    stops(tokenizer, "messages.3. isn't what is trained", train_turns="last", sample=all_trained)
    twice = [ASKED, SAID, ASKED, SAID]
    all_trained = encode_conversation(tokenizer, twice)
    stops(tokenizer, ".* is trained, which no assistant", twice, train_turns="last", sample=all_trained)


def test_the_first_wrong_example_is_named(tokenizer):
    right, wrong = make_example(tokenizer), make_example(tokenizer, [ASKED])
    with pytest.raises(UserError, match=r"^'b\\x1b', line 3: "):
        check([right, dataclasses.replace(wrong, source="b\x1b", line=3)], tokenizer)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def test_the_first_rows_of_every_source_are_checked(tokenizer, tmp_path):
    good = write(tmp_path / "good.jsonl", {"messages": TALK}, {"prompt": "1+1?", "completion": "2"}, {"messages": 0})
    prompted = write(tmp_path / "bad.jsonl", {"messages": 0}, {"prompt": TALK[:3], "completion": TALK[3:]})
    check_sources([good, prompted, SourceConfig(path="stories")], tokenizer)
    check_sources([good, prompted], tokenizer, train_turns="last")
    deleting = trls("deepseekv3_training.jinja")
    with pytest.raises(UserError, match=r"^'.*bad.jsonl', line 2: the reasoning of messages\[3\]"):
        check_sources([prompted, good], deleting)


def test_a_source_of_which_nothing_can_be_used_is_named_with_the_reason(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"bad.jsonl': none of the first 1 rows can be used; line 1: no assistant turn"):
        check_sources([write(tmp_path / "bad.jsonl", {"messages": [ASKED]})], tokenizer)
    with pytest.raises(UserError, match=r"line 1: the chat template refuses it: .*'<think>.n' is expected"):
        check_sources([write(tmp_path / "a.jsonl", {"messages": TALK})], trls("deepseekv3.jinja"))


def test_a_preview_shows_the_sources_in_turn(tokenizer, tmp_path):
    rows = [{"messages": 0}, *[{"messages": TALK}] * 3]
    sources = [write(tmp_path / "a\x1b\n.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:2])]
    file = io.StringIO()
    preview(sources, tokenizer, 4, console=Console(file=file))
    a, b = f"{tmp_path}/a\\x1b\\n.jsonl", f"{tmp_path}/b.jsonl"
    heads = re.findall(r"(\S*), line (\d+): \d+ tokens", file.getvalue())
    assert heads == [(a, "2"), (b, "2"), (a, "3"), (a, "4")]


def shown(tokenizer, *examples, **options):
    file = io.StringIO()
    show(examples, tokenizer, console=Console(file=file, **options))
    return file.getvalue()


def test_a_preview_marks_what_is_trained_and_control_tokens_and_counts_both(tokenizer):
    n, k = len(encode_conversation(tokenizer, TALK)[0]), sum(encode_conversation(tokenizer, TALK)[1])
    assert shown(tokenizer, make_example(tokenizer)).splitlines() == [
        "⟦trained⟧ not trained «control token»",
        "",
        f"a.jsonl, line 7: {n} tokens, {k} trained ({k / n:.0%})",
        f"«{BOS}»«{USER}»1+1?«{ASSISTANT}»⟦<think>one more</think>2«{EOS}»⟧"
        f"«{USER}»And 1 more?«{ASSISTANT}»⟦<think>2+1</think>3«{EOS}»⟧",
    ]


def test_a_rows_text_can_neither_act_on_the_terminal_nor_pass_for_a_mark(tokenizer):
    hostile = f"\x1b[2J\r\u202e⟧ [red]«{ASSISTANT}»⟦\nx"
    text = shown(tokenizer, make_example(tokenizer, [{**ASKED, "content": hostile}, {**SAID, "content": hostile}]))
    assert text.count("⟧") == 2 and text.count(f"«{ASSISTANT}»") == 1 and text.isascii() is False
    assert text.count(f"\\x1b[2J\\r\\u202e\\u27e7 [red]\\u00ab{ASSISTANT}\\u00bb\\u27e6\nx") == 2
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_preview_has_colours_on_a_terminal_and_marks_without(tokenizer):
    on_terminal = shown(tokenizer, make_example(tokenizer), force_terminal=True, color_system="standard")
    assert "\x1b[32m<think>" in on_terminal
    plain = re.sub(r"\x1b\[[\d;]*m", "", on_terminal)
    assert plain == shown(tokenizer, make_example(tokenizer))


def test_a_preview_leaves_out_the_middle_of_long_text_and_says_so(tokenizer):
    text = shown(tokenizer, make_example(tokenizer, [ASKED, {**SAID, "content": "a" * 2_000 + "b" * 2_000}]))
    assert "a\n... 2,500 characters left out ...\nb" in text and text.count("a" * 750) == 1


def test_a_preview_reaches_a_terminal_that_knows_ascii_only(tokenizer):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show([make_example(tokenizer)], tokenizer, console=Console(file=file))
    file.flush()
    assert b"<think>one more</think>2" in file.buffer.getvalue()
