"""Conversations as tokens: chat templates as models have them, and their traps."""

import datetime
import json

import pytest
from chat_templates import (
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    QWEN3,
    REALISTIC,
    decoded,
    encoder,
    messages,
    metaspace_tokenizer,
    of_transformers,
    with_template,
)
from instruction_data import make_tokenizer, write
from transformers.utils import chat_template_utils

from mgsr_jax.checkpoint.chat_template import RenderingError, same_template
from mgsr_jax.data import dataset, spans
from mgsr_jax.data.conversations import Message
from mgsr_jax.data.encoding import Encoder, Encoding, encode_prompt, resolved
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.data.prompts import load_prompts
from mgsr_jax.data.records import Example
from mgsr_jax.data.templates import Turns
from mgsr_jax.rows import UNTRAINED


@pytest.mark.parametrize("name", REALISTIC)
@pytest.mark.parametrize(
    "conversation",
    [
        messages("Say hi."),
        messages("Say hi.", "Hi! naïve 😀", "Again,\n\nplease."),
        messages("Say hi.", system="Be brief."),
    ],
    ids=["one turn", "three turns", "system"],
)
def test_tokens_are_those_of_transformers(name, conversation, monkeypatch):
    """Prompt, and prompt with response up to the end of its turn."""
    fix_date(monkeypatch, datetime.datetime(2024, 7, 26))
    template, end = REALISTIC[name]
    if name == "gemma" and conversation[0].role == "system":
        with pytest.raises(RenderingError, match="roles.*'system'.*not supported"):
            encoder(template).prompt(conversation)
        return
    ours = encoder(template)
    prompt = of_transformers(ours.tokenizer, conversation, add_generation_prompt=True)
    assert ours.prompt(conversation) == prompt
    response = "The old dog 😀\nis on  the mat."
    whole = of_transformers(
        ours.tokenizer, [*conversation, Message("assistant", response)]
    )
    turns = ours.turns(conversation, "", response)
    joint = turns.prompt + turns.response
    assert turns.prompt == prompt and whole[: len(joint)] == joint
    assert turns.response[-1] == ours.tokenizer.convert_tokens_to_ids(end)
    assert not decoded(ours, whole[len(joint) :]).strip()
    assert response in decoded(ours, turns.response)


def fix_date(monkeypatch, day):
    """Set the clock of transformers."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", REALISTIC)
def test_control_tokens_in_the_data_stay_text(name, special):
    """This holds in prompts and responses, and for tokens not marked as special."""
    template, end = REALISTIC[name]
    tokenizer = with_template(template, special=special)
    ours = Encoder(tokenizer, Encoding(template="chat"))
    bad = f"what is {end} for, {end}<|begin|>?"
    plain = ours.turns(messages("what", "is", "this"), "", "for")
    turns = ours.turns(messages(bad, bad, bad), "", bad)
    control = {id_ for id_, t in tokenizer.added_tokens_decoder.items()}
    for got, want in zip(turns[:2], plain[:2], strict=True):
        found = [[i for i in ids if i in control] for ids in (got, want)]
        assert found[0] == found[1]
    assert decoded(ours, turns.prompt).count(bad) == 3
    assert decoded(ours, turns.response).count(bad) == 1


def test_tokens_that_a_response_may_write_are_parsed():
    """<think> is a token of the vocabulary, but no control token."""
    ours = encoder(CHATML)
    response = ours.turns(messages("Say hi."), "", "<think>\nhm\n</think>\nHi").response
    think = ours.tokenizer.convert_tokens_to_ids("<think>")
    assert response[0] == think and decoded(ours, response).startswith("<think>\nhm\n")


def test_a_response_is_cut_off_where_its_text_merges_with_the_prompt():
    """The prompt ends with a line break, and the response begins with one."""
    ours = encoder(CHATML)
    tokenizer = ours.tokenizer
    turns = ours.turns(messages("Say hi."), "", "\nHi")
    assert turns.prompt == ours.prompt(messages("Say hi."))
    assert decoded(ours, turns.response) == "\nHi<|im_end|>"
    assert turns.response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_instruction_with_an_input_is_one_turn_of_the_user():
    ours = encoder(CHATML, system="Be brief.")
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hi.\n\nNow."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decoded(ours, ours.prompt(messages("Say hi."), "Now.")) == expected
    own = ours.prompt(messages("Say hi.", system="Be long."))
    assert "Be long." in decoded(ours, own) and "Be brief." not in decoded(ours, own)


def test_a_template_and_a_tokenizer_that_both_write_bos_give_one():
    ours = encoder(LLAMA3)
    assert ours.tokenizer("a").input_ids[0] == ours.tokenizer.bos_token_id
    turns = ours.turns(messages("Say hi."), "", "Hi")
    assert (turns.prompt + turns.response).count(ours.tokenizer.bos_token_id) == 1


def test_a_template_that_drops_the_last_end_of_turn_is_completed_with_eos():
    drops = CHATML.replace(
        "<|im_end|>\n", "{% if not loop.last %}<|im_end|>\n{% endif %}"
    )
    drops = drops.replace(
        "{% if add", "{% if add_generation_prompt %}<|im_end|>\n{% endif %}{% if add"
    )
    ours = encoder(drops)
    response = ours.turns(messages("Say hi."), "", "Hi \n").response
    assert decoded(ours, response) == "Hi \n<|end|>"
    assert "writes no token behind the last response" in ours.notes[1]
    assert "end-of-sequence <|end|> ends it" in ours.notes[1]
    with pytest.raises(ValueError, match="no token that ends a turn.*train_on to last"):
        encoder(drops, train_on="all").turns(messages("Say hi."), "", "Hi")


def test_a_template_without_control_tokens_is_completed_with_eos():
    ours = encoder(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    turns = ours.turns(messages("Say hi."), "", "Hi \n")
    assert decoded(ours, turns.response) == "[assistant] Hi \n<|end|>"


def test_a_response_is_what_the_template_writes_of_it():
    turns = encoder(LLAMA3).turns(messages("Say hi."), "", "  Hi \n\n")
    assert decoded(encoder(LLAMA3), turns.response) == "Hi<|eot|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
            r"writes '<think>\\n' in a conversation up to a turn, but 'Hi<\|im_end\|>",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "leaves out the assistant's text",
        ),
    ],
)
def test_a_template_that_a_response_cannot_be_cut_out_of_is_refused(template, reason):
    refused = (
        f"the tokenizer's chat template {reason}.*set template to a file of your own"
    )
    ours = encoder(template)
    assert ours.prompt(messages("Say hi."))  # prompts are fine
    with pytest.raises(ValueError, match=refused):
        ours.turns(messages("Say hi."), "", "Hi")


def test_arguments_reach_the_template():
    thinks = encoder(QWEN3).turns(messages("Say hi."), "", "Hi")
    fast = encoder(QWEN3, template_args={"enable_thinking": False})
    turns = fast.turns(messages("Say hi."), "", "Hi")
    assert decoded(fast, thinks.response) == "<think>\n\n</think>\n\nHi<|im_end|>"
    assert decoded(fast, turns.response) == "Hi<|im_end|>"
    assert thinks.prompt + thinks.response == turns.prompt + turns.response


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tokenize": True}, "template_args has 'tokenize', which is no variable"),
        ({"messages": []}, "template_args has 'messages'"),
        ({"today": "yesterday"}, "today='yesterday' is not a day; write it as 2024-07"),
    ],
)
def test_arguments_that_are_no_variables_of_a_template_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        encoder(CHATML, template_args=arguments)


def test_rows_do_not_depend_on_the_day(monkeypatch, tmp_path):
    file = write(tmp_path, [{"instruction": "Say.", "output": "Hi"}])

    def digest(day, **settings):
        fix_date(monkeypatch, datetime.datetime(2026, 1, day))
        ours = encoder(LLAMA3, system="Be brief.", max_length=200, **settings)
        table, _ = dataset.load(
            file,
            ours.tokenizer,
            ours.encoding,
            chunker=None,
            cache_dir=tmp_path / str((day, settings)),
        )
        return dataset.fingerprint(table), decoded(ours, table[0]["prompt"]), ours

    first, text, ours = digest(1)
    assert "Today Date: 26 Jul 2024" in text and digest(2)[:2] == (first, text)
    assert "always that of 2024-07-26, which template_args.today sets" in ours.notes[1]
    other = digest(1, template_args={"today": "2025-01-31"})
    assert other[0] != first and "Today Date: 31 Jan 2025" in other[1]
    unknown = LLAMA3.replace("'%d %b %Y'", "format")
    with pytest.raises(ValueError, match="rows would depend on the day"):
        encoder(unknown)


def trained(encoder, turns):
    """The text of every trained part."""
    parts = [turns.prompt[start:end] for start, end in turns.earlier]
    return [decoded(encoder, part) for part in (*parts, turns.response)]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_all_responses_of_a_conversation_are_marked(name):
    template, end = REALISTIC[name]
    ours = encoder(template, train_on="all")
    conversation = messages("Say hi.", "Hi!", "Again.", f"Hi {end} again", "Bye.")
    turns = ours.turns(conversation, "", "Bye!")
    space = " " if name == "mistral" else ""
    texts = ["Hi!", f"Hi {end} again", "Bye!"]
    assert trained(ours, turns) == [space + text + end for text in texts]
    last = encoder(template).turns(conversation, "", "Bye!")
    assert last == Turns(turns.prompt, turns.response)


def test_an_earlier_response_has_the_tokens_of_a_last_one():
    """Also where its text merges with the prompt's last token."""
    ours = encoder(CHATML, train_on="all")
    alone = ours.turns(messages("Say hi."), "", "\n\nHi").response
    turns = ours.turns(messages("Say hi.", "\n\nHi", "Bye."), "", "Bye!")
    ((start, end),) = turns.earlier
    assert turns.prompt[start:end] == alone


def test_thoughts_that_a_template_removes_from_earlier_turns():
    conversation = messages("Say hi.", "<think>hm</think>\nHi", "Bye.")
    last = encoder(QWEN3)
    turns = last.turns(conversation, "", "Bye!")
    assert "assistant\nHi<|im_end|>" in decoded(last, turns.prompt)
    with pytest.raises(ValueError, match="cannot be trained on; set train_on to last"):
        encoder(QWEN3, train_on="all").turns(conversation, "", "Bye!")
    # A template that changes only turns with a thought is refused record by record.
    some = QWEN3.replace("m.role == 'assistant' and loop.last", "false")
    ours = encoder(some, train_on="all")
    assert len(ours.turns(messages("Hi.", "Hi", "Bye."), "", "Bye!").earlier) == 1
    with pytest.raises(RenderingError, match="writes '<think>hm</think>"):
        ours.turns(conversation, "", "Bye!")


def test_a_system_message_that_a_template_moves():
    """Mistral's template writes it into the last turn, if that is one of the user."""
    ours = encoder(MISTRAL.replace("loop.first", "loop.last"))
    conversation = messages("Say hi.", system="Be brief.")
    assert "Be brief." in decoded(ours, ours.prompt(conversation))
    with pytest.raises(RenderingError, match=r"writes 'Be brief\."):
        ours.turns(conversation, "", "Hi")


def test_a_template_that_needs_a_system_message():
    needs = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('none') }}{% endif %}"
    )
    ours = encoder(needs + CHATML, train_on="all", system="Be brief.")
    turns = ours.turns(messages("Say hi.", "Hi", "Bye."), "", "Bye!")
    assert trained(ours, turns) == ["Hi<|im_end|>", "Bye!<|im_end|>"]


def test_a_conversation_that_begins_with_the_assistant():
    conversation = [Message("assistant", "Hello!"), *messages("Say hi.")]
    assert encoder(CHATML).turns(conversation, "", "Hi").earlier == ()
    with pytest.raises(RenderingError, match="no prompt; set train_on to last"):
        encoder(CHATML, train_on="all").turns(conversation, "", "Hi")


def test_auto_is_the_tokenizers_own_template_where_it_has_one():
    auto = Encoding(template="auto")
    own = Encoder(with_template(CHATML), auto)
    assert own.encoding.template == "chat" and own.encoding.template_text == CHATML
    assert own.notes == ("template: the tokenizer's chat template (auto)",)
    none = Encoder(make_tokenizer(), auto)
    assert none.encoding == Encoding()
    assert none.notes == (
        "template: alpaca (auto: the tokenizer has no chat template)",
    )
    assert resolved(own.encoding, own.tokenizer) == own.encoding
    with pytest.raises(ValueError, match="template 'alpaca' has no place for it"):
        Encoder(make_tokenizer(), Encoding(template="auto", template_args={"x": 1}))
    with pytest.raises(ValueError, match="too_long='drop' with a chat template"):
        Encoder(with_template(CHATML), Encoding(template="auto", too_long="truncate"))


def test_a_template_file_of_ones_own(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    tokenizer = with_template(GEMMA)
    ours = Encoder(tokenizer, Encoding(template=str(file)))
    prompt = ours.prompt(messages("Say hi."))
    assert prompt == encoder(CHATML).prompt(messages("Say hi."))
    assert ours.notes == (f"template: {file}",)
    with pytest.raises(FileNotFoundError, match="nowhere.jinja is missing"):
        Encoder(tokenizer, Encoding(template="nowhere.jinja"))


def test_alpaca_has_a_system_message_and_earlier_turns():
    ours = Encoder(make_tokenizer(), Encoding())
    turns = ours.turns(messages("a", "b", "c", system="Be brief."), "d", "Hi")
    assert ours.tokenizer.decode(turns.prompt) == (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\nb\n\n"
        "### Instruction:\nc\n\n### Input:\nd\n\n### Response:\n"
    )
    given = Encoder(make_tokenizer(), Encoding(system="Be brief."))
    assert given.turns(messages("a", "b", "c"), "d", "Hi") == turns
    alone = ours.turns(messages("c"), "d", "Hi").prompt
    assert ours.tokenizer.decode(alone) == alpaca_prompt("c", "d")


def test_alpaca_refuses_what_it_has_no_form_for():
    ours = Encoder(make_tokenizer(), Encoding())
    turns = [Message("user", "a"), Message("user", "b")]
    with pytest.raises(RenderingError, match="take turns.*got the roles .'user', 'us"):
        ours.prompt(turns)
    trained = Encoder(make_tokenizer(), Encoding(train_on="all"))
    with pytest.raises(RenderingError, match="set train_on to last"):
        trained.turns(messages("a", "b", "c"), "", "Hi")


def test_without_a_template_texts_are_as_they_are():
    ours = Encoder(with_template(CHATML), Encoding(template="none"))
    turns = ours.turns(messages("The old"), "", " dog")
    tokenizer = ours.tokenizer
    joint = tokenizer("The old dog").input_ids
    assert turns.prompt + turns.response == [*joint, tokenizer.eos_token_id]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turns = ours.turns(messages(rendered), "", "Hi<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turns.prompt.count(end) == 1 and turns.response.count(end) == 1
    assert turns.response[-1] == end  # it ends by itself


def test_templates_of_two_tokenizers_are_compared():
    same = with_template(CHATML), with_template(CHATML)
    assert same_template(*same) and same_template(make_tokenizer(), make_tokenizer())
    assert not same_template(with_template(CHATML), with_template(GEMMA))
    assert not same_template(with_template(CHATML), make_tokenizer())


def test_a_control_token_in_a_question_is_text():
    """The template writes one end token, and the question has the text of another."""
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}"
    )
    for template, count in (("alpaca", 0), ("chat", 1)):
        ids = encode_prompt(tokenizer, "what is <|end|> for", template=template)
        assert ids.count(tokenizer.eos_token_id) == count


def test_a_set_is_read_with_its_template(tmp_path):
    file = write(tmp_path, [{"instruction": "Say.", "output": "Hi"}])
    ours = encoder(LLAMA3, max_length=200)
    (prompt,), _ = load_prompts(file, ours.tokenizer, ours.encoding)
    turns = ours.turns(messages("Say."), "", "Hi")
    assert [list(prompt.tokens), list(prompt.response)] == [*turns[:2]]


def test_records_that_a_template_refuses_are_counted(tmp_path, monkeypatch):
    records = [{"instruction": "Say.", "output": "Hi"}] * 3
    picky = GEMMA.replace(
        "{% for m",
        "{% if messages[0].content == 'No.' %}"
        "{{ raise_exception('not this') }}{% endif %}{% for m",
        1,
    )
    file = write(tmp_path, [*records, {"instruction": "No.", "output": "Hi"}])
    ours = encoder(picky, max_length=200)
    settings = dict(max_bad_fraction=0.5)
    _, report = dataset.load(
        file, ours.tokenizer, ours.encoding, cache_dir=tmp_path, **settings
    )
    (prompts, second) = load_prompts(file, ours.tokenizer, ours.encoding, **settings)
    assert len(prompts) == 3 and second.messages == report.messages
    assert (report.kept, report.malformed) == (3, 1)
    assert "some.jsonl:4: the tokenizer's chat template refuses" in report.messages[0]
    assert json.dumps(report.messages[0]).count("not this") == 1


def test_phrases_of_each_trained_response(tmp_path, monkeypatch):
    """Rows of conversations have the phrases of every response, and no others."""
    ours = encoder(CHATML, train_on="all", max_length=300)
    example = Example(
        tuple(messages("The old dog.", "The old dog is here.", "On the mat?")),
        "",
        ("On the mat.",),
        True,
        "some.jsonl:1",
    )
    single = example._replace(messages=tuple(messages("Say hi.")))
    rows = [dataset._encode(each, ours) for each in (example, single)]
    dataset._mark_phrases(rows, ours.tokenizer, "textblob", "")
    row, alone = rows
    texts = ["The old dog is here.<|im_end|>", "On the mat.<|im_end|>"]
    turns = ours.turns(example.messages, "", example.references[0])
    ((start, end),) = turns.earlier
    ids = row["earlier_span_ids"]
    assert len(ids) == len(row["prompt"])
    outside = ids[:start] + ids[end:]
    assert set(outside) == {UNTRAINED} and decoded(ours, turns.response) == texts[1]
    for text, got in zip(texts, (ids[start:end], row["span_ids"]), strict=True):
        tokens = ours.tokenizer(text, add_special_tokens=False).input_ids
        response, offsets = spans.token_offsets(ours.tokenizer, tokens)
        (expected,) = spans.chunk([response], [offsets])
        assert got == expected.tolist() and max(got) >= 0
    assert alone["earlier_span_ids"] == []


def test_only_data_of_all_responses_has_their_column(tmp_path):
    file = write(tmp_path, [{"instruction": "Say.", "output": "Hi"}])
    columns = {}
    for train_on in ("last", "all"):
        ours = encoder(CHATML, train_on=train_on)
        table, _ = dataset.load(file, ours.tokenizer, ours.encoding, cache_dir=tmp_path)
        columns[train_on] = table.column_names
    assert columns["last"] == ["prompt", "response", "span_ids"]
    assert columns["all"] == [*columns["last"], dataset.EARLIER]


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_tokenizers_that_put_a_space_before_a_text(scheme):
    """LLaMA 2 and Mistral do so: a piece of a text has other tokens when alone."""
    tokenizer = metaspace_tokenizer(scheme, MISTRAL)
    ours = Encoder(tokenizer, Encoding(template="chat"))
    conversation = messages("say hi", "hi there", "say what is a text")
    turns = ours.turns(conversation, "", "there is")
    last = Message("assistant", "there is")
    whole = of_transformers(tokenizer, [*conversation, last])
    assert turns.prompt + turns.response == whole
    assert ours.prompt(conversation) == turns.prompt
    bad = f"what is a {tokenizer.eos_token} text"
    marked = ours.turns(messages(bad), "", bad)
    plain = ours.turns(messages("what is a text"), "", "what is a text")
    assert ours.tokenizer.decode(marked.response[:-1]).split() == bad.split()
    for got, want in zip(marked[:2], plain[:2], strict=True):
        ends = [ids.count(tokenizer.eos_token_id) for ids in (got, want)]
        assert ends[0] == ends[1]
