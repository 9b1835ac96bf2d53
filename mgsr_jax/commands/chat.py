"""`mgsr chat`: a conversation with a model in the terminal."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import Dtype, LoadedModel, check_sampling, load

if TYPE_CHECKING:
    from mgsr_jax.data.conversations import Message
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.decoding.decode import Decoding

RESET, EXIT = "/reset", "/exit"


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Settings of chat.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision).
      template: "chat" for the tokenizer's chat template, or the path of a template
        file (.jinja).
      template_args: further variables of the chat template, such as
        {enable_thinking: false}.
      system: text of a system message.
      max_length: longest conversation in tokens; the size of the cache.
      temperature: sampling temperature; 0 decodes greedily.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      seed: seed of sampling.
      dtype: precision of weights and cache.
    """

    model: str
    template: str = "chat"
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
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
    from mgsr_jax.data.conversations import Message

    check_sampling(
        config.temperature, config.top_k, config.top_p, max_length=config.max_length
    )
    loaded = load(config.model, _encoding(config))
    # A missing or unsuitable template is found before the weights are read.
    loaded.encoder.prompt([Message("user", "Hello")])
    model, messages = _Chat(config, loaded), []
    for line in _lines():
        if line == EXIT:
            break
        if line == RESET:
            messages = []
            print("new conversation", file=sys.stderr)
            continue
        question = Message("user", line)
        try:
            response = model.respond([*messages, question])
        except ValueError as error:
            print(f"{error}; or begin again with {RESET}", file=sys.stderr)
            continue
        messages += [question, Message("assistant", response)]
    return DONE


def _encoding(config: ChatConfig) -> "Encoding":
    from mgsr_jax.data.encoding_settings import TEMPLATES, Encoding

    if config.template in TEMPLATES and config.template != "chat":
        raise ValueError(
            f"template={config.template!r}; expected chat, or the path of a template "
            "file"
        )
    return Encoding(
        config.template, template_args=config.template_args, system=config.system
    )


class _Chat:
    """A model with its weights, ready to respond."""

    def __init__(self, config: ChatConfig, loaded: LoadedModel):
        import jax

        self.config, self.loaded, self.responses = config, loaded, 0
        self.eos_ids = loaded.eos_ids()
        unstack = functools.partial(loaded.model.decode_params, dtype=config.dtype)
        self.params = jax.jit(unstack, donate_argnums=0)(loaded.params(config.dtype))

    def respond(self, messages: list["Message"]) -> str:
        """Print the response to a conversation while it is drawn, and return it.

        Raises:
          ValueError: the conversation leaves no room for a response.
        """
        text, ids = "", []
        self.responses += 1
        try:
            for token in self._tokens(messages):
                ids += [] if token in self.eos_ids else [token]
                whole = self.loaded.text(ids)
                if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                    print(whole[len(text) :], end="", flush=True)
                    text = whole
        except KeyboardInterrupt:
            pass
        print()
        return text

    def _tokens(self, messages: list["Message"]) -> Iterator[int]:
        import jax
        import jax.numpy as jnp

        from mgsr_jax.decoding.streaming import stream

        config = self.config
        return stream(
            self.loaded.model,
            self.params,
            self.loaded.encoder.prompt(messages),
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
            eos_ids=self.eos_ids,
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
