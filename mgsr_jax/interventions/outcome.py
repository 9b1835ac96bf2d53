"""The models, the result and the statistics that all interventions share."""

import dataclasses
from typing import NamedTuple

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.rows import Rows
from mgsr_jax.sharding import constrain
from mgsr_jax.typing import Model, Params


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two models of a rollout, with their weights.

    Attributes:
      student: the model that writes.
      student_params: its weights, from `student.decode_params`.
      teacher: the model that intervenes.
      teacher_params: its weights as loaded, with stacked layers.
    """

    student: Model
    student_params: Params
    teacher: Model
    teacher_params: Params

    def heads(self) -> tuple[Params, Params]:
        """The student's head and the teacher's, all-gathered over fsdp.

        Taken before a loop, so that no chunk and no block gathers them again.
        """
        heads = (
            self.student.head_params(self.student_params),
            self.teacher.head_params(self.teacher_params),
        )
        return constrain(heads, P("tensor"))


class InterventionInfo(NamedTuple):
    """Tokens of the teacher in generated rows, and the work of both models.

    Attributes:
      teacher_wrote: tokens of the finished row that the teacher wrote. [B, S]
      kl: KL(teacher || student) in nats for the first of them; 0 where there is none.
        [B]
      student_generated: tokens that the student decoded, with those that were cut away
        again. [B]
      teacher_scored: positions of the row that the teacher read, prompt included, each
        as often as it was read; 0 where the teacher did not run. [B]
    """

    teacher_wrote: Bool[Array, "B S"]
    kl: Float[Array, "B"]
    student_generated: Int[Array, "B"]
    teacher_scored: Int[Array, "B"]


class Outcome(NamedTuple):
    """Finished rows.

    Attributes:
      rows: the rows, which may have stale tokens beyond their lengths.
      info: their statistics.
      teacher_hidden: the teacher's hidden states on them, index t predicts token t + 1;
        None where the teacher did not run. [B, S, D]
    """

    rows: Rows
    info: InterventionInfo
    teacher_hidden: Float[Array, "B S D"] | None
