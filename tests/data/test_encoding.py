"""Encoding of prompts and responses."""

import pytest
from instruction_data import BOS, BOS_ID, EOS, EOS_ID, TOKENIZER, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgsr_jax.data.encoding import (
    Encoding,
    encode_prompt,
    encode_response,
)
from mgsr_jax.data.plain_text import alpaca_prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def test_alpaca_template_is_the_published_one():
    assert alpaca_prompt("Do {it}.") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nDo {it}.\n\n"
        "### Response:\n"
    )
    assert alpaca_prompt("Do.", "{x}") == (
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nDo.\n\n### Input:\n{x}\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("template", "begins_with_bos"),
    [
        (None, False),
        (f"{BOS} $A", True),
        (f"{BOS} $A {EOS}", True),
        (f"$A {EOS}", False),
    ],
)
def test_prompt_has_at_most_one_bos_and_no_eos(template, begins_with_bos):
    tokenizer = make_tokenizer(template)
    ids = encode_prompt(tokenizer, "Say hi.")
    assert ids.count(BOS_ID) == begins_with_bos and EOS_ID not in ids
    assert (ids[0] == BOS_ID) == begins_with_bos
    without_bos = encode_prompt(tokenizer, "Say hi.", add_special_tokens=False)
    assert without_bos == ids[begins_with_bos:]
    assert tokenizer.decode(without_bos) == alpaca_prompt("Say hi.")


def test_special_tokens_inside_a_text_are_encoded_as_text():
    text = f"a {EOS} b {BOS}"
    for ids in (encode_prompt(TOKENIZER, text), encode_response(TOKENIZER, text)):
        assert not {EOS_ID, BOS_ID} & set(ids)
        assert text in TOKENIZER.decode(ids)


def test_chat_template_adds_one_bos():
    tokenizer = make_tokenizer(f"{BOS} $A", chat_template=CHAT)
    ids = encode_prompt(tokenizer, "Say hi.", "Now.", template="chat")
    expected = f"{BOS}[user] Say hi.\n\nNow.\n[assistant]\n"
    assert tokenizer.decode(ids) == expected and ids.count(BOS_ID) == 1


def test_chat_template_runs_in_a_sandbox():
    tokenizer = make_tokenizer(chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(Exception, match="access to attribute '__class__'"):
        encode_prompt(tokenizer, "Say hi.", template="chat")


def test_chat_without_a_template_raises():
    with pytest.raises(ValueError, match="has no chat template; use the path"):
        encode_prompt(TOKENIZER, "Say hi.", template="chat")


@pytest.mark.parametrize("text", ["Hi", " Hi", "\n\nHi", "naïve 😀", "\r\n x"])
def test_response_decodes_to_its_text(text):
    assert TOKENIZER.decode(encode_response(TOKENIZER, text)) == text


def test_response_has_no_added_space_before_its_first_word():
    # Metaspace puts a mark before every text, as the tokenizers of LLaMA do.
    backend = Tokenizer(
        models.BPE({"▁": 0, "a": 1, "\n": 2, "▁a": 3}, [("▁", "a")], unk_token="a")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer("a").input_ids == [3]
    assert encode_response(tokenizer, "a") == [1]
    assert encode_response(tokenizer, "a a") == [1, 3]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"template": "vicuna"}, "template is 'vicuna'; expected one of"),
        ({"too_long": "keep"}, "too_long is 'keep'; expected one of"),
        (
            {"max_prompt_length": 512},
            "max_prompt_length is 512; expected 1 to 511, less than max_length=512",
        ),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; expected 1 to 511"),
        ({"template": "chat", "too_long": "truncate"}, "beginning of a chat template"),
        ({"train_on": "first"}, "train_on is 'first'; expected one of"),
        (
            {"system": "Be brief.", "template": "none"},
            "template 'none' has no place for it",
        ),
        ({"max_length": 1}, "max_prompt_length is 0; expected"),
    ],
)
def test_invalid_settings_raise(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Encoding(**fields)
