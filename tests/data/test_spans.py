"""Spans: offsets of sampled ids, phrases, and the tokens in each phrase."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mgsr_jax.data import spans

TEXTS = [
    "The dog's tail is wagging on the old mat.",
    "naïve café, 3.5% of $1,200.50 — “quoted” it’s",
    "and/or http://foo.com/a?b=1 &slash; a_b\n\n1. First 😀 item\r\n\tSecond 👩‍👩‍👧",
    "日本語のテキスト and \u200b zero width \u00a0 no-break",
    "",
    " \n ",
]


def byte_level_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["the old dog is on the mat"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0]
    )


def byte_fallback_tokenizer():
    """A tokenizer as LLaMA's: a mark stands for a space, and a byte may be a token."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "l"), ("▁", "d")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", *map("".join, merges)]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=[byte_level_tokenizer, byte_fallback_tokenizer])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_partition_the_decoded_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded, offsets = spans.token_offsets(tokenizer, ids)
    assert decoded == tokenizer.decode(ids) == text
    assert [0] + [end for _, end in offsets] == [start for start, _ in offsets] + [
        len(text)
    ]


def test_a_character_belongs_to_the_token_of_its_last_byte(tokenizer):
    ids = tokenizer("a 😀", add_special_tokens=False).input_ids
    text, offsets = spans.token_offsets(tokenizer, ids)
    assert text[slice(*offsets[-1])].strip() == "😀"
    with_emoji = [i for i, (a, b) in enumerate(offsets) if "😀" in text[a:b]]
    assert with_emoji == [len(ids) - 1]
    assert sum(a == b for a, b in offsets) >= 2  # the bytes before the last


def test_special_tokens_add_no_character(tokenizer):
    eos = tokenizer.eos_token_id
    ids = tokenizer("the dog", add_special_tokens=False).input_ids
    text, offsets = spans.token_offsets(tokenizer, [eos, *ids, eos])
    assert text == "the dog"
    assert offsets[0] == (0, 0) and offsets[-1] == (7, 7)
    (span_ids,) = spans.chunk([text], [offsets], lambda t: [(0, len(t))])
    assert span_ids[0] == span_ids[-1] == -1 and (span_ids[1:-1] == 0).all()


def test_random_ids_have_offsets_that_partition_their_text(tokenizer):
    rng = np.random.default_rng(0)
    valid = 0
    for _ in range(300):
        ids = rng.integers(0, len(tokenizer), rng.integers(1, 12)).tolist()
        text, offsets = spans.token_offsets(tokenizer, ids)
        assert [0] + [b for _, b in offsets] == [a for a, _ in offsets] + [len(text)]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in decoded:
            assert text == decoded
            valid += 1
    assert valid > 20


def test_a_character_stays_although_later_bytes_revoke_it():
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<0xD1>", "<0xB4>", "<0xFF>", "a"])
    assert "\u0474" not in tokenizer.decode(ids)
    text, offsets = spans.token_offsets(tokenizer, ids)
    assert (text, offsets[:2]) == ("\u0474\ufffda", [(0, 0), (0, 1)])


@pytest.mark.parametrize("unknown", [["<0xEF>", "<0xBF>", "<0xBD>"], ["<0xFF>"]])
def test_an_unknown_character_does_not_take_the_next_tokens_phrase(unknown):
    """U+FFFD itself, and a byte that is not valid: the word after it has its phrase."""
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", *unknown, "▁d", "o", "g"])
    text, offsets = spans.token_offsets(tokenizer, ids)
    assert text == "the\ufffd dog"
    assert offsets[-4:] == [(3, 4), (4, 6), (6, 7), (7, 8)]
    (ids,) = spans.chunk([text], [offsets], lambda t: [(0, 3), (5, 8)])
    assert ids.tolist() == [0, *[-1] * len(unknown), 1, 1, 1]


def test_characters_before_an_incomplete_one_keep_their_token():
    pieces = [["\ufffd", "é"], ["ab\ufffd", "ab\ufffd", "abé"], ["\ufffd"] * 2]
    lengths = [spans._lengths([*texts, texts[-1] + " car"]) for texts in pieces]
    assert lengths == [[0, 0, 1, 5], [0, 2, 2, 3, 7], [0, 0, 1, 5]]


def test_an_incomplete_last_character_is_left_out():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("ab😀").input_ids[:-1]
    assert spans.token_offsets(tokenizer, ids)[0] == "ab"


def test_a_tokenizer_without_backend_raises():
    with pytest.raises(ValueError, match="object has no tokenizers backend"):
        spans.token_offsets(object(), [1])


def phrases(text):
    return [text[start:end] for start, end in spans.textblob_phrases(text)]


def test_textblob_finds_noun_verb_and_prepositional_phrases():
    assert phrases("The red car has been driving to the big house.") == [
        "The red car",
        "has been driving",
        "to the big house",
    ]


def test_textblob_phrases_do_not_cross_lines_or_sentences():
    assert phrases("the old dog\nthe cat. The mat") == [
        "the old dog",
        "the cat",
        "The mat",
    ]


def test_textblob_splits_contractions_and_ignores_symbols():
    assert phrases("The king won't see the dog — 😀 it’s") == [
        "The king",
        "won't see",
        "the dog",
        "it",
    ]
    assert phrases("☂ ☂ — … ~ 😀") == []


@pytest.mark.parametrize("text", TEXTS + [t * 7 for t in TEXTS])
def test_textblob_phrases_are_disjoint_words_of_the_text(text):
    last = 0
    for start, end in spans.textblob_phrases(text):
        assert last <= start < end <= len(text)
        assert (
            text[start:end] == text[start:end].strip() and "\n" not in text[start:end]
        )
        last = end


def test_textblob_needs_no_download(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    assert phrases("the old dog") == ["the old dog"]


def test_the_error_without_textblob_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "textblob.en", None)
    spans._textblob_parser.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[train\]'"):
        spans.textblob_phrases("a dog")
    spans._textblob_parser.cache_clear()


def chunk_one(text, offsets, phrases):
    return spans.chunk([text], [offsets], lambda _: phrases)[0].tolist()


def test_the_leading_space_of_a_token_is_ignored():
    # The phrase "red car" starts at "red"; the token starts at the space before it.
    assert chunk_one("a red car", [(0, 1), (1, 5), (5, 9)], [(2, 9)]) == [-1, 0, 0]


def test_a_token_that_exceeds_the_phrase_is_in_none():
    assert chunk_one("a red car.", [(0, 1), (1, 5), (5, 10)], [(2, 9)]) == [-1, 0, -1]


def test_white_space_between_the_words_of_a_phrase_belongs_to_it():
    tokens = [(0, 1), (1, 2), (2, 3), (3, 6), (6, 7)]
    assert chunk_one("a  red ", tokens, [(0, 6)]) == [0, 0, 0, 0, -1]


def test_phrases_in_any_order_get_ids_in_the_order_of_the_text():
    tokens = [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert chunk_one("aabbccdd", tokens, [(4, 8), (0, 4)]) == [0, 0, 1, 1]


def test_chunk_returns_one_int32_id_a_token():
    span_ids = spans.chunk(["a dog", ""], [[(0, 1), (1, 5)], []])
    assert [ids.dtype for ids in span_ids] == [np.int32, np.int32]
    assert [ids.tolist() for ids in span_ids] == [[0, 0], []]


@pytest.mark.parametrize("phrases", [[(0, 3), (2, 5)], [(0, 6)], [(2, 2)], [(-1, 2)]])
def test_invalid_phrases_of_a_chunker_raise(phrases):
    with pytest.raises(ValueError, match="must return disjoint phrases"):
        chunk_one("abcde", [(0, 5)], phrases)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="chunker 'nltk' is unknown"):
        spans.chunk(["a"], [[(0, 1)]], "nltk")
    with pytest.raises(ValueError, match="got 1 texts and 2 lists of offsets"):
        spans.chunk(["a"], [[(0, 1)], []])


def test_the_error_without_spacy_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    spans._spacy_pipeline.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[spacy\]'"):
        spans.chunk(["a"], [[(0, 1)]], "spacy")


def test_the_error_without_the_spacy_model_names_the_download():
    pytest.importorskip("spacy", reason="spaCy (the extra mgsr_jax[spacy]) is missing")
    with pytest.raises(ImportError, match="python -m spacy download no_such_model"):
        spans.chunk(["a"], [[(0, 1)]], "spacy", spacy_model="no_such_model")


def test_spacy_finds_noun_verb_and_prepositional_phrases():
    spacy = pytest.importorskip(
        "spacy", reason="spaCy (the extra mgsr_jax[spacy]) is missing"
    )
    rows = [  # word, head, dependency, part of speech
        ("The", 1, "det", "DET"),
        ("dog", 4, "nsubj", "NOUN"),
        ("has", 4, "aux", "AUX"),
        ("not", 4, "neg", "PART"),
        ("jumped", 4, "ROOT", "VERB"),
        ("out", 4, "prep", "ADP"),
        ("of", 5, "prep", "ADP"),
        ("the", 8, "det", "DET"),
        ("window", 6, "pobj", "NOUN"),
        ("and", 4, "cc", "CCONJ"),
        ("picked", 4, "conj", "VERB"),
        ("up", 10, "prt", "ADP"),
        ("a", 13, "det", "DET"),
        ("ball", 10, "dobj", "NOUN"),
        (".", 4, "punct", "PUNCT"),
    ]
    words, heads, deps, pos = zip(*rows, strict=True)
    doc = spacy.tokens.Doc(
        spacy.blank("en").vocab,
        words=list(words),
        heads=list(heads),
        deps=list(deps),
        pos=list(pos),
    )
    assert [doc.text[start:end] for start, end in spans.spacy_phrases(doc)] == [
        "The dog",
        "has not jumped",
        "out of the window",
        "picked",
        "a ball",
    ]
