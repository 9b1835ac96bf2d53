"""Chat templates as well-known models have them, and tokenizers that have one."""

from instruction_data import make_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mgsr_jax.data.conversations import Message
from mgsr_jax.data.encoding import Encoder, Encoding

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}<|start|>system<|header|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ messages[0].content }}<|eot|>"
    "{% endif %}{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}"
    "<|header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system is defined %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if not loop.last "
    "else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
REALISTIC = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot|>"),
    "gemma": (GEMMA, "<end>"),
    "mistral": (MISTRAL, "<|end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|header|>", "<|eot|>"]
CONTROL += ["<turn>", "<end>", "[INST]", "[/INST]"]


def with_template(template, *, special=True):
    """The small tokenizer with control tokens, bos before a text, and a template."""
    tokenizer = make_tokenizer("<|begin|> $A", chat_template=template)
    tokenizer.add_tokens([AddedToken(t, special=special) for t in CONTROL])
    tokenizer.add_tokens(
        [AddedToken(t, special=False) for t in ("<think>", "</think>")]
    )
    return tokenizer


def messages(*contents, system=None):
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(contents)]
    return [Message("system", system), *turns] if system else turns


def encoder(template, **settings):
    return Encoder(with_template(template), Encoding(template="chat", **settings))


def decoded(encoder, ids):
    return encoder.tokenizer.decode(ids)


def of_transformers(tokenizer, conversation, **options):
    return tokenizer.apply_chat_template(
        [message._asdict() for message in conversation], return_dict=False, **options
    )


def metaspace_tokenizer(scheme, template):
    """A tokenizer that puts a space before a text.

    Args:
      scheme: "first" for the beginning of a text, "always" for every piece between
        control tokens, "legacy" for the same by a normaliser.
      template: its chat template.
    """
    backend = Tokenizer(models.BPE())
    when = "always" if scheme == "legacy" else scheme
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=when)
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    text = "say hi there, what is a text? [INST] </s> [/INST] \n"
    backend.train_from_iterator([text] * 9, trainer)
    if scheme == "legacy":
        replace = normalizers.Replace(" ", "\u2581")
        prepend = normalizers.Prepend("\u2581")
        backend.normalizer = normalizers.Sequence([prepend, replace])
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
