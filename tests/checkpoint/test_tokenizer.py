"""Tokenizers stored as tokenizer.json, vocab.json + merges.txt, or tokenizer.model."""

import json

import jax
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, trainers

from mgsr_jax import models
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.chat_template import ChatTemplate
from mgsr_jax.checkpoint.tokenizer import eos_ids

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A dog and a fox: they sleep, they jump; 12 times!",
    "Être ou ne pas être, das ist hier die Frage.",
]
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
}


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE like GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture
def json_folder(tmp_path, bpe):
    bpe.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "pad_token": "<|pad|>",
        "model_max_length": 64,
        "chat_template": CHAT,
        # The name of code in the checkpoint, which must never run.
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran remote code')")
    return tmp_path


@pytest.fixture
def vocab_folder(tmp_path, bpe):
    bpe.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def check(tokenizer, reference):
    assert tokenizer.is_fast and tokenizer.backend_tokenizer is not None
    for text in TEXTS:
        got = tokenizer(text, return_offsets_mapping=True)
        expected = reference(text, return_offsets_mapping=True)
        assert got["input_ids"] == expected["input_ids"]
        assert got["offset_mapping"] == expected["offset_mapping"]
        assert tokenizer.decode(got["input_ids"], skip_special_tokens=True) == text
    for name in ("bos", "eos", "pad", "unk"):
        key = f"{name}_token_id"
        assert getattr(tokenizer, key) == getattr(reference, key)


def test_tokenizer_json_is_loaded(json_folder):
    tokenizer = hf.load_tokenizer(json_folder)
    check(tokenizer, transformers.PreTrainedTokenizerFast.from_pretrained(json_folder))
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    assert tokenizer.model_max_length == 64
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>Hi"
    (json_folder / "chat_template.jinja").write_text("newer")
    assert hf.load_tokenizer(json_folder).chat_template == "newer"


def test_special_tokens_of_older_files_are_loaded(json_folder):
    (json_folder / "tokenizer_config.json").unlink()
    assert hf.load_tokenizer(json_folder).eos_token is None
    tokens = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|pad|>"]}
    (json_folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokenizer = hf.load_tokenizer(json_folder)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.all_special_ids == [0, 1]


def test_vocab_and_merges_are_loaded(vocab_folder, bpe):
    tokenizer = hf.load_tokenizer(vocab_folder)
    check(tokenizer, transformers.AutoTokenizer.from_pretrained(vocab_folder))
    ids = bpe.encode(TEXTS[0]).ids
    assert tokenizer(TEXTS[0])["input_ids"] == ids
    assert tokenizer.eos_token_id == 0


def test_a_sentencepiece_model_is_loaded(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = hf.load_tokenizer(tmp_path)
    check(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        expected = [tokenizer.bos_token_id, *reference.encode(text)]
        assert tokenizer(text)["input_ids"] == expected


def test_missing_and_broken_files_raise(tmp_path, vocab_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json"):
        hf.load_tokenizer(empty)
    config = {"tokenizer_class": "OddTokenizer"}
    (vocab_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'OddTokenizer'; expected one of GPT2"):
        hf.load_tokenizer(vocab_folder)
    (vocab_folder / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        hf.load_tokenizer(vocab_folder)
    (vocab_folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        hf.load_tokenizer(vocab_folder)


def test_fingerprints_of_different_vocabularies_of_equal_size_differ(
    json_folder, tmp_path_factory
):
    tokenizer = hf.load_tokenizer(json_folder)
    fingerprint = hf.tokenizer_fingerprint(tokenizer)
    assert fingerprint == hf.tokenizer_fingerprint(hf.load_tokenizer(json_folder))
    other = tmp_path_factory.mktemp("other")
    state = json.loads((json_folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(state))
    swapped = hf.load_tokenizer(other)
    assert len(swapped) == len(tokenizer)
    assert hf.tokenizer_fingerprint(swapped) != fingerprint


@pytest.mark.parametrize("kind", ["json_folder", "vocab_folder"])
def test_an_export_contains_the_tokenizer(kind, request, tmp_path_factory):
    folder = request.getfixturevalue(kind)
    out = tmp_path_factory.mktemp("export") / "out"
    model = models.from_config({**GPT2, "eos_token_id": 0})
    params = jax.jit(model.init)(jax.random.key(0))
    hf.save_pretrained(out, model, params, tokenizer_from=folder)
    assert not list(out.glob("*.py"))
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    check(hf.load_tokenizer(out), loaded)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0 and "pad_token_id" not in generation


def test_several_end_ids_of_generation_config_end_a_text_and_are_exported(
    json_folder, tmp_path_factory
):
    config = {**GPT2, "eos_token_id": 0}
    given = {"eos_token_id": [0, 77], "do_sample": True, "temperature": 0.6}
    (json_folder / "config.json").write_text(json.dumps(config))
    (json_folder / "generation_config.json").write_text(json.dumps(given))
    model = models.from_config(json_folder)
    assert eos_ids(hf.load_tokenizer(json_folder), model) == (0, 77)
    out = tmp_path_factory.mktemp("export") / "out"
    params = jax.jit(model.init)(jax.random.key(0))
    hf.save_pretrained(out, model, params, tokenizer_from=json_folder)
    assert json.loads((out / "generation_config.json").read_text()) == given
    assert models.from_config(out) == model


def test_the_end_of_a_chat_templates_turn_ends_a_response(json_folder):
    """The tokenizer's end-of-sequence ends documents, another token ends turns."""
    (json_folder / "config.json").write_text(json.dumps({**GPT2, "eos_token_id": 0}))
    model, tokenizer = models.from_config(json_folder), hf.load_tokenizer(json_folder)
    end = tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.chat_template = None
    assert eos_ids(tokenizer, model) == (0,)
    turns = "{% for m in messages %}{{ m.content }}<|pad|>\n{% endfor %}"
    own = ChatTemplate(tokenizer, turns)
    assert eos_ids(tokenizer, model, own) == (0, end)
    tokenizer.chat_template = turns
    assert eos_ids(tokenizer, model) == (0, end)
    # A template that cannot be rendered ends nothing; training would refuse it.
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert eos_ids(tokenizer, model) == (0,)


@pytest.mark.parametrize("ids", [0, [0], None])
def test_end_ids_that_config_has_already_leave_it_unchanged(json_folder, ids):
    config = {**GPT2, "eos_token_id": 0}
    (json_folder / "config.json").write_text(json.dumps(config))
    text = json.dumps({} if ids is None else {"eos_token_id": ids})
    (json_folder / "generation_config.json").write_text(text)
    assert models.from_config(json_folder).config.eos_token_id == 0


def test_a_gpt2_folder_of_the_hub_names_its_tokens_only_by_id(json_folder):
    (json_folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    config = {**GPT2, "bos_token_id": 0, "eos_token_id": 0}
    (json_folder / "config.json").write_text(json.dumps(config))
    tokenizer = hf.load_tokenizer(json_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(json_folder)
    assert tokenizer.eos_token == theirs.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token == theirs.bos_token
    # A token that the tokenizer's own files name, or deny, is not replaced.
    (json_folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|pad|>", "bos_token": null}'
    )
    tokenizer = hf.load_tokenizer(json_folder)
    assert tokenizer.eos_token_id == 1 and tokenizer.bos_token is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_pointer_of_git_lfs_is_named_for_what_it_is(tmp_path, name):
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 9\n"
    )
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        hf.load_tokenizer(tmp_path)
