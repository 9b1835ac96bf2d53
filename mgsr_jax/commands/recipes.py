"""`mgsr recipes`: the methods that `--recipe` accepts."""

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.training.recipes import load_recipe, recipe_names


def recipes(*, show: str | None = None) -> int:
    """List the methods that --recipe accepts, with a line each.

    Args:
      show: name of a recipe, whose file is printed in place of the list.
    """
    if show is not None:
        print(load_recipe(show).text, end="")
        return DONE
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {load_recipe(name).summary}")
    return DONE
