"""`mgsr chat`: a conversation with a model in the terminal."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import Dtype, LoadedModel, check_sampling, load
from mgsr_jax.commands.prompts import encode_messages

if TYPE_CHECKING:
    from mgsr_jax.decoding.decode import Decoding

RESET, EXIT = "/reset", "/exit"


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Settings of chat.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision). Its tokenizer needs a chat template.
      system: text of a system message.
      template_args: further variables of the chat template, such as
        {enable_thinking: false}.
      max_length: longest conversation in tokens; the size of the cache.
      temperature: sampling temperature; 0 decodes greedily.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      seed: seed of sampling.
      dtype: precision of weights and cache.
    """

    model: str
    system: str = ""
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_length: int = 2048
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 10
    dtype: Dtype = "float32"


def chat(config: ChatConfig) -> int:
    """Talk with a model: one message a line, the response is shown as it is written.

    The whole conversation is rendered by the tokenizer's chat template for each
    response. /reset begins a new conversation, /exit or the end of the input ends the
    command, and Ctrl-C stops a response.
    """
    check_sampling(
        config.temperature, config.top_k, config.top_p, max_length=config.max_length
    )
    loaded = load(config.model)
    first = [{"role": "system", "content": config.system}] if config.system else []
    hello = {"role": "user", "content": "Hello"}
    # A missing or unsuitable template is found before the weights are read.
    encode_messages(loaded.tokenizer, [*first, hello], **config.template_args)
    model = _Chat(config, loaded)
    messages = list(first)
    for line in _lines():
        if line == EXIT:
            break
        if line == RESET:
            messages = list(first)
            print("new conversation", file=sys.stderr)
            continue
        question = {"role": "user", "content": line}
        try:
            response = model.respond([*messages, question])
        except ValueError as error:
            print(f"{error}; or begin again with {RESET}", file=sys.stderr)
            continue
        messages += [question, {"role": "assistant", "content": response}]
    return DONE


class _Chat:
    """A model with its weights, ready to respond."""

    def __init__(self, config: ChatConfig, loaded: LoadedModel):
        import jax

        self.config, self.loaded, self.responses = config, loaded, 0
        unstack = functools.partial(loaded.model.decode_params, dtype=config.dtype)
        self.params = jax.jit(unstack, donate_argnums=0)(loaded.params(config.dtype))

    def respond(self, messages: list[dict[str, str]]) -> str:
        """Print the response to a conversation while it is drawn, and return it.

        Raises:
          ValueError: the conversation leaves no room for a response.
        """
        text, stop_ids = "", self.loaded.eos_ids()
        ids: list[int] = []
        self.responses += 1
        try:
            for token in self._tokens(messages):
                ids += [] if token in stop_ids else [token]
                whole = self.loaded.text(ids)
                if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                    print(whole[len(text) :], end="", flush=True)
                    text = whole
        except KeyboardInterrupt:
            pass
        print()
        return text

    def _tokens(self, messages: list[dict[str, str]]) -> Iterator[int]:
        import jax
        import jax.numpy as jnp

        from mgsr_jax.decoding.streaming import stream

        config = self.config
        return stream(
            self.loaded.model,
            self.params,
            encode_messages(self.loaded.tokenizer, messages, **config.template_args),
            # A question that is asked again gets another sample.
            key=jax.random.fold_in(jax.random.key(config.seed), self.responses),
            decoding=self._decoding(),
            width=config.max_length,
            dtype=jnp.dtype(config.dtype),
        )

    def _decoding(self) -> "Decoding":
        from mgsr_jax.decoding.decode import Decoding
        from mgsr_jax.decoding.sampling import Sampling

        config = self.config
        return Decoding(
            max_length=config.max_length,
            eos_ids=self.loaded.eos_ids(),
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            vocab_size=len(self.loaded.tokenizer),
        )


def _lines() -> Iterator[str]:
    """Lines of standard input that are not empty; a terminal shows a prompt."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
