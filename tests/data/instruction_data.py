"""A small byte-level tokenizer and instruction files for the tests of this folder."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mgsr_jax.data.encoding import Encoding, encode_prompt
from mgsr_jax.data.plain_text import alpaca_prompt

EOS, BOS = "<|end|>", "<|begin|>"


def make_tokenizer(template=None, **options):
    """A tokenizer whose padding and end-of-sequence are the same token.

    Args:
      template: the special tokens around a text, such as "<|begin|> $A".
      options: of PreTrainedTokenizerFast.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [alpaca_prompt("the old dog", "is on the mat")], trainer
    )
    if template:
        special = [(token, backend.token_to_id(token)) for token in (EOS, BOS)]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    options = {"eos_token": EOS, "pad_token": EOS, "bos_token": BOS} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


TOKENIZER = make_tokenizer()
EOS_ID, BOS_ID = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id
LONG = Encoding(max_prompt_length=200, max_length=300)

MIXED = [
    {"instruction": "Say hi.", "output": "Hi"},
    '{"instruction": "Say',
    {"instruction": "", "output": "Hi"},
    {"instruction": "x" * 900, "output": "Hi"},
    {"instruction": "Say a lot.", "output": "y" * 900},
    {"instruction": "Say hi.", "output": ["Hi", "Hello"]},
]
"""Records of every kind: good, malformed, empty, a long prompt, a long response."""
LONG_PROMPT = len(encode_prompt(TOKENIZER, "x" * 900))


def write(folder, records, name="some.jsonl"):
    """Write records (dicts, or lines as they are) to a JSONL file."""
    file = folder / name
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file
