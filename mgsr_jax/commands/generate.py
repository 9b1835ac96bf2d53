"""`mgsr generate`: sample or decode responses to prompts."""

import dataclasses
from typing import Literal

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import Dtype, LoadedModel, check_sampling, load


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Settings of generate.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision).
      prompt: an instruction, or a list of instructions in brackets.
      input: context that is added to each instruction (the field `input` of Alpaca).
      template: "alpaca", "chat" for the tokenizer's chat template, or "none" for the
        plain text.
      add_special_tokens: whether the tokenizer adds its special tokens (such as bos)
        to a prompt.
      max_length: longest prompt and response in tokens.
      temperature: sampling temperature; 0 decodes greedily.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      seed: seed of sampling.
      dtype: precision of weights and cache.
    """

    model: str
    prompt: str | list[str]
    input: str = ""
    template: Literal["alpaca", "chat", "none"] = "alpaca"
    add_special_tokens: bool = True
    max_length: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 10
    dtype: Dtype = "float32"


def generate(config: GenerateConfig) -> int:
    """Print a response to each prompt."""
    import jax
    import jax.numpy as jnp

    from mgsr_jax import rows
    from mgsr_jax.decoding import decode
    from mgsr_jax.decoding.sampling import Sampling

    check_sampling(
        config.temperature, config.top_k, config.top_p, max_length=config.max_length
    )
    loaded = load(config.model)
    texts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
    ids = [_prompt_ids(config, loaded, text) for text in texts]
    prompts = rows.from_lists(ids, [[]] * len(ids), width=config.max_length)
    responses = decode.generate(
        loaded.model,
        loaded.params(config.dtype),
        jax.tree.map(jnp.asarray, prompts),
        key=jax.random.key(config.seed),
        decoding=decode.Decoding(
            max_length=config.max_length,
            eos_ids=loaded.eos_ids(),
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            vocab_size=len(loaded.tokenizer),
        ),
        dtype=jnp.dtype(config.dtype),
    )
    for tokens, start, end in zip(
        responses.tokens, responses.prompt_lengths, responses.lengths, strict=True
    ):
        text = loaded.tokenizer.decode(
            tokens[int(start) : int(end)].tolist(), skip_special_tokens=True
        )
        print(text)
    return DONE


def _prompt_ids(config: GenerateConfig, loaded: LoadedModel, text: str) -> list[int]:
    from mgsr_jax.data.encoding import encode_prompt

    if config.template == "none":
        ids = loaded.tokenizer(text, add_special_tokens=config.add_special_tokens)
        ids = ids["input_ids"]
    else:
        ids = encode_prompt(
            loaded.tokenizer,
            text,
            config.input,
            template=config.template,
            add_special_tokens=config.add_special_tokens,
        )
    if len(ids) >= config.max_length:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room for a response in "
            f"max_length={config.max_length}; raise max_length"
        )
    return ids
