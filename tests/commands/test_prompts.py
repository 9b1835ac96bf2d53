"""How prompts of `generate` become tokens."""

import io
import json

import pytest
import tiny

from mgsr_jax.checkpoint.hf import load_tokenizer
from mgsr_jax.commands.prompts import Request, encode_request, read_requests
from mgsr_jax.data.conversations import Message
from mgsr_jax.data.encoding import Encoder, Encoding

BOS, EOS = 391, 0


@pytest.fixture(scope="module")
def surrounded(tmp_path_factory):
    """A tokenizer that puts <s> before a text and <|end|> behind it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": BOS, "content": "<s>", "special": True, **flags}
    state["added_tokens"].append(token)
    names = {"<s>": BOS, "<|end|>": EOS}
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    parts += [{"Sequence": {"id": "A", "type_id": 0}}]
    parts += [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": {
            name: {"id": name, "ids": [id_], "tokens": [name]}
            for name, id_ in names.items()
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {"eos_token": "<|end|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def encode(tokenizer, text, input="", **settings):
    encoder = Encoder(tokenizer, Encoding("none", **settings))
    return encode_request(encoder, Request([Message("user", text)], input))


def test_a_bare_text_has_one_bos_and_no_end_of_sequence(surrounded):
    plain = encode(surrounded, "the dog", add_special_tokens=False)
    assert surrounded("the dog").input_ids == [BOS, *plain, EOS]
    assert encode(surrounded, "the dog") == [BOS, *plain]
    assert encode(surrounded, "<s>the dog") == [BOS, *plain]
    # A text may end a turn of its own.
    assert encode(surrounded, "the dog<|end|>") == [BOS, *plain, EOS]


def test_an_input_follows_a_bare_text(surrounded):
    both = encode(surrounded, "the dog", "a cat")
    assert both == encode(surrounded, "the dog\n\na cat")


def test_a_prompt_that_the_template_refuses_is_named(surrounded):
    encoder = Encoder(surrounded, Encoding("none"))
    system = [Message("system", "a"), Message("user", "b")]
    with pytest.raises(
        ValueError, match=r"p\.jsonl:3: template 'none' has a place for"
    ):
        encode_request(encoder, Request(system, source="p.jsonl:3"))
    with pytest.raises(ValueError, match="prompt is empty; give at least one token"):
        encode_request(encoder, Request([Message("user", "")]))


def test_a_file_may_name_its_columns_differently(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"query": "the dog", "id": 3}\n')
    (request,) = read_requests(None, str(file), "", columns={"prompt": "query"})
    assert [message.content for message in request.messages] == ["the dog"]
    with pytest.raises(ValueError, match="with the setting columns: {prompt: COLUMN"):
        read_requests(None, str(file), "")


def test_an_empty_input_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    with pytest.raises(ValueError, match="^standard input holds no prompt; give"):
        read_requests(None, None, "")
    (tmp_path / "some.txt").touch()
    with pytest.raises(ValueError, match="some.txt holds no prompt"):
        read_requests(None, str(tmp_path / "some.txt"), "")
    with pytest.raises(ValueError, match="^the list holds no prompt"):
        read_requests([], None, "")
