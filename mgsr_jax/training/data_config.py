"""Settings of the data: where it is, how it is read, and how long its rows are."""

import dataclasses
import os
from glob import glob
from typing import Any, Literal

from mgsr_jax import settings
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.source_settings import (
    DataSource,
    as_sources,
    check_columns,
    is_files,
)

Sources = str | list[str | DataSource]
"""One source or several; a `DataSource` has a weight, a split, names of columns or a
teacher."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data and how it becomes token rows.

    Attributes:
      train: data to train on: a file (.jsonl, .json or .parquet; the first two also
        with .gz, .xz or .zst), a pattern such as parts/*.jsonl, a folder of data files
        or of datasets' save_to_disk, or a hub data set (org/name, org/name:config,
        org/name:config@revision). Several in brackets are concatenated. Where each is
        given as {path: ..., weight: ...}, examples are drawn in proportion to the
        weights, until every source has been used up once.
      valid: validation data, given like `train` but without weights; none: no
        validation.
      train_split: training split of a folder or hub data set.
      valid_split: validation split of a folder or hub data set.
      columns: the data's names of columns that it names differently, such as {prompt:
        query, completion: text}.
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
      teacher_prompt: what the teacher reads in place of the last turn of the student's
        prompt: a text with {prompt} and, for the first response of the data,
        {reference}. The responses that both read are the same. For self-distillation
        (OPSD), where the teacher is the student's own start. none: the same prompt.
      max_teacher_prompt_length: longest such prompt in tokens; none: `max_length`.
        Examples with a longer one are dropped.
      default_teacher: name of the teacher of records that name none in their column
        teacher, where there are several; none: every record has to name one. A source
        given as {path: ..., teacher: NAME} has one teacher for all its records.
      cache_dir: folder for tokenised data; default: the datasets library's cache, which
        is never cleared automatically.
    """

    train: Sources
    valid: Sources | None = None
    train_split: str = "train"
    valid_split: str = "validation"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
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
    teacher_prompt: str | None = None
    max_teacher_prompt_length: int | None = None
    default_teacher: str | None = None
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
        self._check_sources()

    def check_validation(self) -> None:
        """Refuse validation data that is trained on.

        Raises:
          ValueError: names the data and its split.
        """
        trained = {_identity(s, self.train_split) for s in self.train_sources}
        for source in self.valid_sources:
            if (same := _identity(source, self.valid_split)) in trained:
                raise ValueError(
                    f"data.train and data.valid are both {' '.join(same)!r}; validate "
                    "on data that is not trained on"
                )

    def _check_sources(self) -> None:
        sources = [*self.train_sources, *self.valid_sources]
        for columns in [self.columns, *(source.columns for source in sources)]:
            check_columns(columns or {})
        for path in (source.path for source in sources):
            if path[:1] in ("[", "{") and not (os.path.exists(path) or glob(path)):
                raise ValueError(
                    f"data has the source {path!r}, which begins like a list or a "
                    "record and is none; expected [{path: FILE, weight: NUMBER, split: "
                    "NAME, columns: {OURS: THEIRS}, teacher: NAME}, ...], of which "
                    "only path is required"
                )
        weights = [source.weight for source in self.train_sources]
        given = [weight for weight in weights if weight is not None]
        if given and (len(given) < len(weights) or not min(given) > 0):
            raise ValueError(
                f"data.train has the weights {weights}; give every source a weight "
                "above 0, or none of them"
            )
        if any(source.weight is not None for source in self.valid_sources):
            raise ValueError(
                "data.valid has weights, but every validation example counts once; "
                "leave the weights out"
            )

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The sources of the training data."""
        return as_sources(self.train)

    @property
    def valid_sources(self) -> tuple[DataSource, ...]:
        """The sources of the validation data; empty without validation."""
        return as_sources(self.valid or [])

    def columns_of(self, source: DataSource) -> dict[str, str]:
        """The names of a source's columns."""
        return self.columns if source.columns is None else source.columns

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
            teacher_prompt=self.teacher_prompt,
            max_teacher_prompt_length=self.max_teacher_prompt_length,
        )


def _identity(source: DataSource, split: str) -> tuple[str, ...]:
    """A source's path, and its split unless it is a file, which has none."""
    if is_files(source.path):
        return (os.path.normpath(source.path),)
    return (source.path, source.split or split)
