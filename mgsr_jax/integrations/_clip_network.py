"""DAC-KL's clip network inside a student that another trainer optimises.

Tunix and MaxText differentiate and update the variables of one nnx module, so the
network becomes part of the student: checkpoints contain it, and the forward function
returns it with the logits.
"""

from collections.abc import Callable
from typing import Any

import jax

try:
    import optax
    from flax import nnx
except ImportError as error:
    raise ImportError(
        f"the adapters need flax and optax ({error}): both come with the trainer, as "
        "in pip install 'mgsr_jax[tunix]'"
    ) from error

from mgsr_jax.losses import init_clip_network
from mgsr_jax.typing import Params, PRNGKey

NAME = "mgsr_clip_network"


def attach_clip_network(
    student: nnx.Module, key: PRNGKey, *, num_candidates: int = 512, hidden: int = 128
) -> None:
    """Add the clip network to the student's variables, before the trainer is made.

    With LoRA these trainers update only `nnx.LoRAParam`, so the network's variables are
    of that kind in a student that has LoRA variables, and `nnx.Param` in any other.

    Args:
      student: changed in place; gains the attribute `mgsr_clip_network`.
      key, num_candidates, hidden: as in `mgsr_jax.losses.init_clip_network`.

    Raises:
      ValueError: the student has a clip network already.
    """
    if hasattr(student, NAME):
        raise ValueError(
            "the student has a clip network already; detach_clip_network(student) "
            "takes it out"
        )
    # LoRAParam only then: Tunix freezes all other variables where it finds one.
    lora = any(isinstance(v, nnx.LoRAParam) for _, v in nnx.iter_graph(student))
    params = init_clip_network(key, num_candidates=num_candidates, hidden=hidden)
    variables = jax.tree.map(nnx.LoRAParam if lora else nnx.Param, params)
    setattr(student, NAME, nnx.data(variables))


def clip_network_params(student: nnx.Module) -> Params:
    """The clip network's parameters for `mgsr_jax.losses.dac_kl`.

    Raises:
      ValueError: the student has none.
    """
    if not hasattr(student, NAME):
        raise ValueError(
            "the student has no clip network; call attach_clip_network(student, key) "
            "before the trainer is made"
        )
    return nnx.to_pure_dict(nnx.state(getattr(student, NAME)))


def detach_clip_network(student: nnx.Module) -> Params:
    """Detach the clip network, for export, and return its parameters.

    Raises:
      ValueError: the student has none.
    """
    params = clip_network_params(student)
    delattr(student, NAME)
    return params


def with_clip_network(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(model, ...)` that returns (its output, the model's clip network)."""

    def forward_and_clip(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(model, *args, **kwargs), clip_network_params(model)

    return forward_and_clip


def clip_network_optimizer(
    optimizer: optax.GradientTransformation, *, learning_rate: float = 1e-3
) -> optax.GradientTransformation:
    """`optimizer` for the student, Adam without weight decay for the clip network.

    At a student's learning rate the network's biases could hardly move.

    Args:
      optimizer: updates everything but the clip network.
      learning_rate: learning rate of the clip network.
    """

    def owner(path: Any, _: Any) -> str:
        return "clip" if any(getattr(k, "key", k) == NAME for k in path) else "student"

    return optax.partition(
        {"clip": optax.adam(learning_rate), "student": optimizer},
        lambda params: jax.tree_util.tree_map_with_path(owner, params),
    )
