"""Rows for a teacher that reads other prompts than its student does.

In self-distillation (OPSD) the teacher is the student's own start and reads a prompt
with more in it, such as the reference answer. Its rows have its prompt and the
student's response.
"""

import dataclasses

import datasets
import numpy as np

from mgsr_jax.data.dataset import TEACHER_PROMPT
from mgsr_jax.rows import Rows, from_lists

_FILLER = [0]  # the prompt of a row that only fills up a batch


@dataclasses.dataclass(frozen=True)
class TeacherPrompts:
    """The teacher's prompts of a data set.

    Attributes:
      dataset: from `dataset.load`, with an encoding that has a `teacher_prompt`.
      limit: no prompt is longer than this.
    """

    dataset: datasets.Dataset
    limit: int

    def rows(self, rows: Rows) -> Rows:
        """Host rows with the responses of `rows` behind the teacher's prompts.

        Their width depends only on that of `rows`: one program a width.
        """
        examples = rows.example.tolist()
        own = [i for i in examples if i >= 0]
        prompts = iter(self.dataset[own][TEACHER_PROMPT] if own else [])
        spans = zip(rows.prompt_lengths, rows.lengths, strict=True)
        teacher_rows = from_lists(
            [_FILLER if i < 0 else next(prompts) for i in examples],
            [
                tokens[start:end].tolist()
                for tokens, (start, end) in zip(rows.tokens, spans, strict=True)
            ],
            width=self.limit + rows.tokens.shape[1] - 1,
            examples=examples,
        )
        return dataclasses.replace(
            teacher_rows, ground_truth=np.array(rows.ground_truth)
        )
