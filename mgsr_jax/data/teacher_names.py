"""Names of several teachers in the data: each record goes to one of them."""

import dataclasses

from mgsr_jax.data.conversations import Unusable


@dataclasses.dataclass(frozen=True)
class TeacherNames:
    """The teachers of a run, and how a source's records name theirs.

    Attributes:
      names: all teachers; a record gets an index into them.
      always: teacher of every record of the source, whose column is not read.
      default: teacher of records that name none; None: there has to be a name.
    """

    names: tuple[str, ...]
    always: str | None = None
    default: str | None = None

    def index(self, name: object, label: str) -> int:
        """Index of the teacher of a record with this `name` in the column `label`.

        >>> TeacherNames(("math", "code"), default="math").index("code", "teacher")
        1

        Raises:
          Unusable: there is no such teacher, or no name where one is needed.
        """
        given = self.default if name is None or name == "" else name
        chosen = given if self.always is None else self.always
        if chosen is None:
            raise Unusable(
                f"no {label!r}, expected one of {', '.join(self.names)}; name it, or "
                "set data.default_teacher"
            )
        if chosen not in self.names:
            raise Unusable(
                f"{label!r} is {chosen!r}, expected one of {', '.join(self.names)}"
            )
        return self.names.index(str(chosen))
