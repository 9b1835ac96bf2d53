"""Settings of the data: where it is, how it is read, and how long its rows are."""

import dataclasses
from typing import Any, Literal

from mgsr_jax import settings
from mgsr_jax.data.encoding import Encoding


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Instruction data and how it becomes token rows.

    Attributes:
      train: JSONL or Parquet file, or a hub data set's name.
      valid: validation data, given like `train`; none: no validation.
      train_split: training split of a hub data set.
      valid_split: validation split of a hub data set.
      template: "chat" for the tokenizer's own chat template, the path of a template
        file (.jinja), "alpaca", "none" for the texts as they are, or "auto": chat where
        the tokenizer has a template, otherwise alpaca.
      template_args: further variables of the chat template, such as
        {enable_thinking: false}.
      system: system message for conversations that begin without one.
      train_on: "last" response of a conversation, or "all" of them. Rollouts always
        replace the last.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos). A
        chat template writes its own.
      max_prompt_length: longest prompt in tokens; none: half of `max_length`.
      max_length: longest prompt and response in tokens; the width of rows.
      buckets: additional, narrower widths such as [128,256]. Batches then hold examples
        of similar length, and a step on the data's or on replayed rows is only as wide
        as its rows need. A step's loss is a mean over its tokens, so a token in a batch
        of short examples counts more. Each width compiles the step again.
      too_long: "drop" longer examples, or "truncate" them; both are counted.
      max_bad_fraction: share of malformed records above which the run refuses to start.
      chunker: "textblob", "spacy" (needs the extra and a model), or your own as
        "module:function", from a text to the (start, end) of its phrases.
      spacy_model: name of spaCy's model.
      cache_dir: folder for tokenised data; default: the datasets library's cache, which
        is never cleared automatically.
    """

    train: str
    valid: str | None = None
    train_split: str = "train"
    valid_split: str = "validation"
    template: str = "auto"
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    train_on: Literal["last", "all"] = "last"
    add_special_tokens: bool = True
    max_prompt_length: int | None = None
    max_length: int = 512
    buckets: tuple[int, ...] = ()
    too_long: Literal["drop", "truncate"] = "drop"
    max_bad_fraction: float = 0.05
    chunker: str = "textblob"
    spacy_model: str = "en_core_web_sm"
    cache_dir: str | None = None

    def check(self) -> None:
        """Refuse values that do not work, alone or with one another.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_choices(self, "data.")
        self.encoding  # noqa: B018  the record checks itself
        widths = self.widths
        if min(widths) < 2 or sorted(set(widths)) != list(widths):
            raise ValueError(
                f"data.buckets={list(self.buckets)}; expected ascending widths from 2 "
                f"to below data.max_length={self.max_length}"
            )
        if self.chunker not in ("textblob", "spacy") and ":" not in self.chunker:
            raise ValueError(
                f"data.chunker={self.chunker!r}; expected textblob, spacy, or a "
                "function as module:function"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Allowed widths of rows, ascending."""
        return (*self.buckets, self.max_length)

    @property
    def encoding(self) -> Encoding:
        """The settings that turn a record into tokens."""
        return Encoding(
            template=self.template,
            template_args=self.template_args,
            system=self.system,
            train_on=self.train_on,
            add_special_tokens=self.add_special_tokens,
            max_prompt_length=self.max_prompt_length,
            max_length=self.max_length,
            too_long=self.too_long,
        )
