"""End ids and chat template that an exported student was trained with."""

import dataclasses
import json
from pathlib import Path

_TEMPLATE_FILE = "chat_template.jinja"
_GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """End ids and chat template of a training, for an exported student's folder.

    Without it, other programs go on behind the end of a turn that the chat template
    writes, and render prompts by another template.

    Attributes:
      eos_ids: tokens that end a response.
      chat_template: text of the template file that the student was trained with; None:
        it was the tokenizer's own template, or no chat template.
    """

    eos_ids: tuple[int, ...]
    chat_template: str | None = None

    def write(self, folder: Path, model_eos: int | tuple[int, ...] | None) -> None:
        """Add it to a checkpoint's folder.

        Args:
          folder: a Hugging Face folder with its tokenizer.
          model_eos: end ids that the folder already names.
        """
        if self.chat_template is not None:
            file = folder / _TEMPLATE_FILE
            file.write_text(self.chat_template, encoding="utf-8")
        known = model_eos if isinstance(model_eos, tuple) else (model_eos,)
        if set(known) == set(self.eos_ids):
            return
        file = folder / _GENERATION_FILE
        settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        settings["eos_token_id"] = list(self.eos_ids)
        # transformers would take the ids of config.json instead.
        settings.pop("_from_model_config", None)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_format(file: Path, response_format: ResponseFormat) -> None:
    """Write it as JSON."""
    text = json.dumps(dataclasses.asdict(response_format), indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def load_format(file: Path) -> ResponseFormat | None:
    """Read what `save_format` wrote; None if there is no file, as in older runs.

    Raises:
      ValueError: the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return ResponseFormat(tuple(values["eos_ids"]), values["chat_template"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove it: an export then has the end ids "
            "and the template of the student's own folder"
        ) from error
