"""Forms of records: recognised by their columns, and read into conversations."""

import json

import pytest

from mgsr_jax.data.forms import recognise
from mgsr_jax.data.records import Example, Message, Rejected, read_examples
from mgsr_jax.data.sources import open_source

USER, ANSWER = Message("user", "Hi?"), Message("assistant", "Ho.")
SYSTEM, MORE = Message("system", "Be brief."), Message("user", "Why?")


def turns(*messages, role="role", content="content", names=None):
    """Messages as a data set has them."""
    names = names or {}
    return [{role: names.get(m.role, m.role), content: m.content} for m in messages]


def share_gpt(*messages):
    names = {"user": "human", "assistant": "gpt"}
    return turns(*messages, role="from", content="value", names=names)


def write(folder, *records):
    file = folder / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def form_of(folder, *records, columns=None):
    return recognise(open_source(write(folder, *records)), columns)


def read(folder, *records, columns=None):
    return list(read_examples(write(folder, *records), columns=columns))


INSTRUCTION = {"instruction": "Hi?", "output": "Ho."}
FORMS = [
    ("instruction", INSTRUCTION, [USER], ["Ho."]),
    (
        "instruction",
        {"instruction": "Hi?", "context": "", "response": "Ho.", "category": "qa"},
        [USER],
        ["Ho."],
    ),
    (
        "instruction",
        {
            "instruction": "Why?",
            "output": ["Ho.", "So."],
            "system": "Be brief.",
            "history": [["Hi?", "Ho."]],
        },
        [SYSTEM, USER, ANSWER, MORE],
        ["Ho.", "So."],
    ),
    ("prompt-completion", {"prompt": "Hi?", "completion": "Ho."}, [USER], ["Ho."]),
    (
        "prompt-completion",
        {"prompt": turns(SYSTEM, USER), "completion": turns(ANSWER)},
        [SYSTEM, USER],
        ["Ho."],
    ),
    (
        "prompt-completion",
        {"prompt": turns(USER), "completion": turns(ANSWER, MORE, ANSWER)},
        [USER, ANSWER, MORE],
        ["Ho."],
    ),
    ("chat", {"messages": turns(USER, ANSWER)}, [USER], ["Ho."]),
    (
        "chat",
        {"messages": turns(SYSTEM, USER, ANSWER, MORE, ANSWER), "prompt": "Hi?"},
        [SYSTEM, USER, ANSWER, MORE],
        ["Ho."],
    ),
    (
        "chat",
        {"messages": {"role": ["user", "assistant"], "content": ["Hi?", "Ho."]}},
        [USER],
        ["Ho."],
    ),
    (
        "chat",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}]
            + turns(ANSWER)
        },
        [USER],
        ["Ho."],
    ),
    (
        "ShareGPT",
        {"conversations": share_gpt(SYSTEM, USER, ANSWER)},
        [SYSTEM, USER],
        ["Ho."],
    ),
    (
        "ShareGPT",
        {"conversations": share_gpt(USER, ANSWER), "system": "Be brief."},
        [SYSTEM, USER],
        ["Ho."],
    ),
    ("question-answer", {"question": "Hi?", "answer": "Ho."}, [USER], ["Ho."]),
    ("question-answer", {"question": "Hi?", "answer": ["a", "b"]}, [USER], ["a", "b"]),
    ("prompts only", {"prompt": "Hi?"}, [USER], []),
    ("prompts only", {"prompt": turns(SYSTEM, USER)}, [SYSTEM, USER], []),
    ("prompts only", {"question": "Hi?"}, [USER], []),
    ("prompts only", {"instruction": "Hi?"}, [USER], []),
    ("prompts only", {"instruction": "Hi?", "output": None}, [USER], []),
    ("prompts only", {"messages": turns(USER, ANSWER, MORE)}, [USER, ANSWER, MORE], []),
    ("prompts only", {"conversations": share_gpt(USER)}, [USER], []),
]


@pytest.mark.parametrize(("name", "record", "messages", "references"), FORMS)
def test_a_form_is_recognised_and_read(tmp_path, name, record, messages, references):
    form = form_of(tmp_path, record)
    assert form.name == name and form.prompts_only == (not references)
    assert read(tmp_path, record) == [
        Example(tuple(messages), "", tuple(references), True, "some.jsonl:1")
    ]


def test_columns_may_have_other_names(tmp_path):
    record = {"query": "Hi?", "text": "Ho.", "sys": "Be brief."}
    columns = {"prompt": "query", "completion": "text", "system": "sys"}
    assert form_of(tmp_path, record, columns=columns).name == "prompt-completion"
    assert read(tmp_path, record, columns=columns) == [
        Example((SYSTEM, USER), "", ("Ho.",), True, "some.jsonl:1")
    ]


def test_an_error_of_a_record_has_the_name_that_the_data_has(tmp_path):
    columns = {"prompt": "query", "completion": "text"}
    good = {"query": "Hi?", "text": "Ho."}
    _, rejected = read(tmp_path, good, {"query": "Hi?"}, columns=columns)
    assert rejected == Rejected("malformed", "some.jsonl:2: no 'text'")


def test_columns_that_are_not_read_are_listed(tmp_path):
    messages = [{"role": "user", "content": "Hi?", "name": None, "weight": 1}]
    form = form_of(
        tmp_path,
        {"messages": messages + turns(ANSWER), "id": 3, "tools": None},
        {"messages": turns(USER, ANSWER), "instruction": "a", "output": "b"},
    )
    assert form.read == ("messages",)
    assert form.unread == ("id", "instruction", "output", "messages.weight")
    form = form_of(tmp_path, INSTRUCTION | {"response": "b", "input": "c"})
    assert form.read == ("instruction", "output", "input")
    assert form.unread == ("response",)


def test_columns_of_no_form_are_named_with_all_forms(tmp_path):
    with pytest.raises(ValueError, match="has the columns .'query', 'text'") as error:
        form_of(tmp_path, {"query": "Hi?", "text": "Ho."})
    for name in ("messages", "conversations", "completion", "question", "columns: {"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"promt": "query"}, "has the name 'promt'; expected messages, conv"),
        ({"prompt": "qury"}, r"'qury' for prompt, but .* has the columns \['query', "),
    ],
)
def test_a_wrong_name_of_a_column_is_named(tmp_path, columns, match):
    with pytest.raises(ValueError, match=match):
        form_of(tmp_path, {"query": "Hi?", "text": "Ho."}, columns=columns)


def test_the_first_objects_decide_even_after_bad_records(tmp_path):
    file = write(tmp_path, 3, {"output": "a"}, INSTRUCTION)
    kinds = [type(example) for example in read_examples(file)]
    assert kinds == [Rejected, Rejected, Example]


def test_a_file_without_an_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match="among 2; first: some.jsonl:1: got a int, ex"):
        form_of(tmp_path, 3, "x")


IMAGE = [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "Hi?"}]
CHAT = {"messages": turns(USER, ANSWER)}


@pytest.mark.parametrize(
    ("good", "bad", "problem", "reason"),
    [
        (CHAT, {"messages": turns(USER)}, "malformed", "'messages' is by the user"),
        (CHAT, {"messages": turns(ANSWER)}, "malformed", "before the response is miss"),
        (CHAT, {"messages": turns(SYSTEM, ANSWER)}, "malformed", "is by the system"),
        (CHAT, {"messages": []}, "empty", "empty 'messages'"),
        (CHAT, {"messages": "Hi?"}, "malformed", "a str, expected a list of messages"),
        (CHAT, {"messages": ["Hi?"]}, "malformed", "'messages' has a str, expected"),
        (CHAT, {"other": 1}, "malformed", "no 'messages'"),
        (
            CHAT,
            {"messages": turns(Message("tool", "3"), ANSWER)},
            "malformed",
            "a turn of the role 'tool'; expected one of system, user",
        ),
        (
            CHAT,
            {"messages": [*turns(USER), turns(ANSWER)[0] | {"tool_calls": [{}]}]},
            "malformed",
            "has tool calls, which are not read",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": IMAGE}, *turns(ANSWER)]},
            "malformed",
            "content of the type 'image_url'; only text is read",
        ),
        (
            CHAT,
            {"messages": turns(USER, Message("assistant", " "))},
            "empty",
            "empty 'messages: content of assistant'",
        ),
        (
            CHAT,
            {"messages": turns(SYSTEM, USER, ANSWER), "system": "Be long."},
            "malformed",
            "both 'system' and a system turn are given",
        ),
        (
            INSTRUCTION,
            INSTRUCTION | {"history": [["Hi?"]]},
            "malformed",
            "'history' is not a list of pairs",
        ),
        (INSTRUCTION, INSTRUCTION | {"history": "Hi?"}, "malformed", "list of pairs"),
        (INSTRUCTION, INSTRUCTION | {"system": 3}, "malformed", "'system' is a int"),
        (
            {"prompt": "Hi?"},
            {"prompt": "Hi?", "completion": "Ho."},
            "malformed",
            "has a response, but the first records are prompts only",
        ),
        (
            {"messages": turns(USER)},
            CHAT,
            "malformed",
            "has a response, but the first records are prompts only",
        ),
        (
            {"prompt": "Hi?", "completion": "Ho."},
            {"prompt": "Hi?", "completion": turns(USER)},
            "malformed",
            "the last turn of 'completion' is by the user",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path, good, bad, problem, reason):
    before, rejected, after = read(tmp_path, *[good] * 16, bad, good)[15:]
    assert isinstance(before, Example) and isinstance(after, Example)
    assert isinstance(rejected, Rejected) and rejected.problem == problem
    assert rejected.message.startswith("some.jsonl:17: ") and reason in rejected.message
