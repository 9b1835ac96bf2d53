"""Methods by name: files of settings in mgsr_jax/recipes, one method each.

A recipe is read before all other settings, so that files and options override it key by
key. The first line says what the method is, the header what is its authors' and what is
ours.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig

FOLDER = Path(__file__).parents[1] / "recipes"

METHOD = {
    "objective": ("sft", "token", "span", "divergence", "sample_divergence"),
    "rollout": ("policy",),
}
"""Settings that choose a method, by section; the others only adjust one."""

_SECTIONS = {"objective": Objective, "rollout": RolloutConfig}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method.

    Attributes:
      name: of its file.
      text: of its file.
    """

    name: str
    text: str

    @property
    def summary(self) -> str:
        """The method in one line."""
        return self.text.partition("\n")[0].removeprefix("# ")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of train, as in a YAML file."""
        return yaml.safe_load(self.text)

    @property
    def objective(self) -> Objective:
        """The losses of the method."""
        return Objective(**self.settings["objective"])

    @property
    def rollout(self) -> RolloutConfig:
        """The source of a step's rows."""
        return RolloutConfig(**self.settings["rollout"])


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
      ValueError: no recipe has this name.

    >>> load_recipe("gkd").objective.divergence
    'jensen_shannon'
    """
    return Recipe(name, recipe_file(name).read_text(encoding="utf-8"))


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
      ValueError: no recipe has this name.
    """
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"recipe={name!r}; expected one of {', '.join(names)}, which mgsr recipes "
            f"explains{meant}"
        )
    return FOLDER / f"{name}.yaml"


def default_recipe(given: Mapping[str, Any]) -> str | None:
    """The recipe of a run whose settings name none.

    With a teacher it is MGSR, without one SFT. Settings that choose a method stand for
    themselves: then there is no recipe, and what is not given has its own default.

    Args:
      given: the settings that files and options set, in sections as in a YAML file.

    >>> default_recipe({"student": "s"}), default_recipe({"teacher": "t"})
    ('sft', 'mgsr')
    >>> default_recipe({"teacher": "t", "rollout": {"policy": "off"}})
    """
    for section, fields in METHOD.items():
        if any(field in given.get(section, {}) for field in fields):
            return None
    return "sft" if given.get("teacher") is None else "mgsr"


def closest_recipe(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The recipe that a run follows, and the settings in which it differs from it.

    Compared are all settings of objective and rollout, and everything else that the
    recipe sets.

    Args:
      settings: all settings of the run, as from `dataclasses.asdict`.
    """
    recipes = map(load_recipe, recipe_names())
    found = {recipe.name: dict(_differences(recipe, settings)) for recipe in recipes}
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def _differences(
    recipe: Recipe, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Name and value of each of a run's settings that is not the recipe's."""
    expected = recipe.settings | {
        section: dataclasses.asdict(getattr(recipe, section)) for section in _SECTIONS
    }
    for name, value in expected.items():
        if not isinstance(value, dict):
            value, actual, prefix = {name: value}, settings, ""
        else:
            actual, prefix = settings[name], f"{name}."
        for field in value:
            if actual[field] != value[field]:
                yield prefix + field, actual[field]
