"""Spans: the phrase that each token of a text belongs to.

The span loss compares neighbouring tokens of one noun, verb or prepositional phrase
(arXiv 2407.10068). Everything here is Python and numpy, so that it runs on the host
while the device computes. Offsets are pairs (start, end) of character positions; end is
exclusive.
"""

import bisect
import functools
import importlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mgsr_jax.typing import Tokenizer

Offset = tuple[int, int]
Doc = Any  # spaCy's; spaCy is an extra
Token = Any
Chunker = str | Callable[[str], Iterable[Offset]]
"""A name ("textblob" or "spacy") or a function from a text to its phrases."""

NO_SPAN = -1

# TextBlob's own splitter loses the positions. It also splits "don't" into do, n, ', t,
# but its lexicon has do and n't. This pattern keeps positions and the lexicon's words.
_WORD = re.compile(
    r"""(?:https?://|www\.)[^\s<>"]*[^\s<>"'.,;:!?)\]]   # an address
      | (?:[^\W\d_]\.){2,}                               # U.S.
      | \d+(?:[.,:/]\d+)*                                # 1,200.50
      | \w+?(?=n['’]t\b) | n['’]t\b                      # do + n't
      | ['’](?:s|m|d|ll|re|ve)\b                         # it + 's
      | \w+(?:-\w+)*                                     # well-known
      | \.{3} | \S""",
    re.VERBOSE,
)
_SENTENCE_ENDS = {".", "!", "?", "..."}


def chunk(
    texts: Sequence[str],
    offsets: Sequence[Sequence[Offset]],
    chunker: Chunker = "textblob",
    *,
    spacy_model: str = "en_core_web_sm",
) -> list[np.ndarray]:
    """Phrase ids of every token: one int32 array a text, -1 outside phrases.

    A token is in a phrase if all its characters except white space are in the phrase. A
    token of only white space is in a phrase if it is between two of its words. A token
    without characters is in no phrase. Ids count the phrases of a text from 0.

    Args:
      texts: texts as `token_offsets` returns them.
      offsets: for each text, the character offsets of its tokens.
      chunker: "textblob" (its lexicon and rules need no download), "spacy", or a
        function from one text to its phrases as (start, end) pairs.
      spacy_model: pipeline for the chunker "spacy".

    Raises:
      ImportError: TextBlob, spaCy or its model is not installed.
      ValueError: the chunker is unknown, or its phrases overlap or exceed the text.

    >>> chunk(["a red car"], [[(0, 1), (1, 5), (5, 9)]], lambda text: [(2, 9)])
    [array([-1,  0,  0], dtype=int32)]
    """
    if len(texts) != len(offsets):
        raise ValueError(
            f"got {len(texts)} texts and {len(offsets)} lists of offsets; give one "
            "list a text"
        )
    if callable(chunker):
        phrases: Iterable[Iterable[Offset]] = map(chunker, texts)
    elif chunker == "textblob":
        phrases = map(textblob_phrases, texts)
    elif chunker == "spacy":
        phrases = map(spacy_phrases, _spacy_pipeline(spacy_model).pipe(texts))
    else:
        raise ValueError(
            f"chunker {chunker!r} is unknown; use 'textblob', 'spacy' or a function "
            "from a text to (start, end) pairs"
        )
    return [
        _assign(text, tokens, _in_order(text, of_text))
        for text, tokens, of_text in zip(texts, offsets, phrases, strict=True)
    ]


def _in_order(text: str, phrases: Iterable[Offset]) -> list[Offset]:
    in_order = sorted((int(start), int(end)) for start, end in phrases)
    last = 0
    for start, end in in_order:
        if not last <= start < end <= len(text):
            raise ValueError(
                f"phrase ({start}, {end}) overlaps another or exceeds the text of "
                f"{len(text)} characters; a chunker must return disjoint phrases"
            )
        last = end
    return in_order


def _assign(
    text: str, tokens: Sequence[Offset], phrases: Sequence[Offset]
) -> np.ndarray:
    ids = np.full(len(tokens), NO_SPAN, np.int32)
    starts = [start for start, _ in phrases]
    for i, (start, end) in enumerate(tokens):
        if start == end:
            continue
        piece = text[start:end]
        if bare := piece.strip():
            start += len(piece) - len(piece.lstrip())
            end = start + len(bare)
        last = bisect.bisect_right(starts, start) - 1
        if last >= 0 and end <= phrases[last][1]:
            ids[i] = last
    return ids


def textblob_phrases(text: str) -> list[Offset]:
    """Noun, verb and prepositional phrases by TextBlob's tagger and chunk rules.

    A prepositional phrase is the preposition together with the phrase that it governs.
    No phrase crosses a line break or the end of a sentence. The paper leaves open what
    happens to nested phrases; spans must be disjoint, so the outer phrase is used.

    Raises:
      ImportError: TextBlob is not installed.
    """
    parser = _textblob_parser()
    phrases: list[Offset] = []
    for words in _sentences(text):
        tagged = parser.find_tags([text[a:b].replace("’", "'") for a, b in words])
        for pair in tagged:
            # The tagger labels unknown symbols, such as an emoji or a dash, as nouns.
            if pair[1] == "NN" and not any(map(str.isalnum, pair[0])):
                pair[1] = "SYM"
        kind = ""
        for offset, (_, _, tag, governed) in zip(
            words, parser.find_chunks(tagged), strict=True
        ):
            previous, kind = kind, tag[2:]  # "B-NP" -> "NP", "O" -> ""
            if kind not in ("NP", "VP", "PP"):
                continue
            continues = tag.startswith("I-") and kind == previous
            if continues or (previous == "PP" and governed == "I-PNP"):
                phrases[-1] = (phrases[-1][0], offset[1])
            else:
                phrases.append(offset)
    return phrases


def _sentences(text: str) -> Iterator[list[Offset]]:
    """Words of each sentence; a line break ends a sentence too."""
    words: list[Offset] = []
    for match in _WORD.finditer(text):
        if words and "\n" in text[words[-1][1] : match.start()]:
            yield words
            words = []
        words.append(match.span())
        if match.group() in _SENTENCE_ENDS:
            yield words
            words = []
    if words:
        yield words


@functools.cache
def _textblob_parser() -> Any:
    try:
        from textblob.en import lexicon, parser
    except ImportError as error:
        raise ImportError(
            "chunker 'textblob' needs the package textblob; "
            "pip install 'mgsr_jax[train]' or choose another chunker"
        ) from error
    with warnings.catch_warnings():
        # TextBlob does not close the file of its lexicon.
        warnings.simplefilter("ignore", ResourceWarning)
        lexicon.load()
    return parser


def spacy_phrases(doc: Doc) -> list[Offset]:
    """Noun, verb and prepositional phrases of a parsed spaCy `Doc`.

    A noun phrase is a noun chunk. A noun chunk together with the prepositions directly
    before it that govern it is a prepositional phrase. A verb phrase is a run of verbs,
    auxiliaries, and the particles "to" and "not".
    """
    phrases: list[tuple[int, int]] = []  # in tokens of the Doc
    end = 0  # of the last phrase
    for noun in doc.noun_chunks:
        start = noun.start
        if start > end and noun.root.head.i == start - 1:
            while start > end and _is_preposition(doc[start - 1]):
                start -= 1
        phrases += _verb_runs(doc, end, start)
        phrases.append((start, noun.end))
        end = noun.end
    phrases += _verb_runs(doc, end, len(doc))
    return [(doc[a].idx, doc[b - 1].idx + len(doc[b - 1])) for a, b in phrases]


def _is_preposition(token: Token) -> bool:
    return token.pos_ == "ADP" and token.dep_ != "prt"


def _verb_runs(doc: Doc, start: int, end: int) -> Iterator[tuple[int, int]]:
    i = start
    while i < end:
        stop = i
        while stop < end and doc[stop].pos_ in ("VERB", "AUX", "PART"):
            stop += 1
        if any(token.pos_ != "PART" for token in doc[i:stop]):
            yield i, stop
        i = max(stop, i + 1)


@functools.cache
def _spacy_pipeline(model: str) -> Any:
    try:
        spacy = importlib.import_module("spacy")
    except ImportError as error:
        raise ImportError(
            "chunker 'spacy' needs the package spacy; pip install 'mgsr_jax[spacy]' or "
            "choose chunker 'textblob'"
        ) from error
    try:
        return spacy.load(model, exclude=["ner", "lemmatizer", "textcat"])
    except OSError as error:
        raise ImportError(
            f"spaCy has no model {model!r}; python -m spacy download {model}"
        ) from error


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Offset]]:
    """Text of token ids, and the characters that each token adds to it.

    The ids are decoded token by token, because encoding the text again may give other
    ids than the sampled ones. A character of several bytes belongs to the token that
    completes it; the tokens before add no character. An invalid byte is the character
    U+FFFD of its own token. Special tokens add none either.
    Bytes at the end that do not complete a character are not part of the text.

    Args:
      tokenizer: a transformers tokenizer with a `tokenizers` backend.
      ids: token ids of a response.

    Raises:
      ValueError: the tokenizer has no such backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizers backend, which spans need; "
            "load a fast tokenizer (tokenizer.json)"
        )
    pieces, offsets, end = [], [], 0
    # The DecodeStream of tokenizers does the same, but it fails where a byte-fallback
    # decoder revokes a character because invalid bytes follow it.
    context: list[int] = []  # last decoded tokens: white space depends on them
    pending: list[int] = []  # tokens that have not completed a character
    texts: list[str] = []  # text of `pending` up to each of its tokens
    for token in ids:
        pending.append(int(token))
        before = backend.decode(context, skip_special_tokens=True)
        after = backend.decode(context + pending, skip_special_tokens=True)
        text = after[len(before) :]
        if not after.startswith(before):
            text = backend.decode(pending, skip_special_tokens=True)
        texts.append(text if len(after) > len(before) else "")
        if texts[-1] and not after.endswith("\ufffd"):
            lengths = _lengths(texts)
            offsets += [(end + a, end + b) for a, b in itertools.pairwise(lengths)]
            end += lengths[-1]
            pieces.append(texts[-1])
            context, pending, texts = pending, [], []
    offsets += [(end, end)] * len(pending)
    return "".join(pieces), offsets


def _lengths(texts: Sequence[str]) -> list[int]:
    """Length of the final text after each token, from the texts up to each; 0 first.

    U+FFFD stands for bytes that do not complete a character. Where a later token does
    not replace it, it is a character of its own, of the last token that leaves it so:
    the character itself, or bytes that are invalid.
    """
    final, lengths = texts[-1], [0]
    shared = [len(os.path.commonprefix([text, final])) for text in texts]
    for i, text in enumerate(texts[:-1]):
        length = shared[i]
        if min(shared[i + 1 :]) <= length:  # a later token leaves it so too
            length = min(length, len(text.rstrip("\ufffd")))
        lengths.append(max(lengths[-1], length))
    return [*lengths, len(final)]


def resolve_chunker(name: str) -> Chunker:
    """The chunker that a setting names; "module:function" is imported.

    Raises:
      ValueError: the module or the function does not exist.
    """
    if ":" not in name:
        return name
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"data.chunker={name!r} cannot be imported ({error}); expected "
            "module:function of a module on the Python path"
        ) from error
