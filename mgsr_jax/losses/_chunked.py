"""A loss over many tokens in the memory of a few: gradients formed chunk by chunk.

The logits of a batch are several of the largest arrays of distillation. Here only the
logits of one chunk of tokens exist at a time. While they exist the chunk's gradient is
formed too, so that nothing is kept for a backward pass and nothing is computed twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, PyTree

from mgsr_jax.losses._chunk_loop import ChunkLoop, ChunkLoss, ChunkSums
from mgsr_jax.losses._chunk_placement import Placement, placement


def chunked(
    fn: ChunkLoss,
    shared: PyTree,
    tokens: Float[Array, "*B D"],
    aux: PyTree,
    *,
    chunk_size: int,
    overlap: int = 1,
    where: Bool[Array, "*B"] | None = None,
    batch_axes: str | tuple[str, ...] = (),
    shared_specs: PyTree = None,
) -> tuple[Float[Array, ""], PyTree]:
    """Sum a loss over chunks of tokens and form its gradients in the forward pass.

    (loss, metrics) = sum_c fn(shared, tokens[c], aux[c])

    `fn(shared, tokens_chunk, aux_chunk)` returns a weighted scalar and a tree of metric
    sums. All leading axes are flattened into one, and a chunk holds consecutive tokens.
    The last `overlap` tokens of a chunk are the first of the next chunk. A loss of
    neighbours may read them, but they must add nothing to the sums of this chunk.
    Tokens are padded with zeros (False, 0) to whole chunks. Padding must have weight 0:
    multiply every value by a weight from `aux`, and mask it by a `where` from `aux`.

    Gradients in the forward pass are how Liger Kernel's chunked losses work
    (arXiv 2410.10989). The backward pass only multiplies them by one number. So apply
    all weights inside `fn`. The metrics have no gradient, and there are no second
    derivatives.

    `fn` may itself call `chunked` on the logits that it forms. They are the tokens
    there, read a few rows at a time, and their gradient overwrites them. A loss that
    needs eight arrays of the size of the logits then needs only eight arrays of the
    size of a few rows.

    Args:
      fn: a pure function. It must not close over anything that is differentiated.
      shared: what every chunk reads whole: the heads of student and teacher, a clip
        network. Only leaves that are differentiated get gradients; these are summed in
        float32.
      tokens: the student's hidden states. [..., D]
      aux: what is divided into chunks with the tokens and has no gradient: labels,
        weights, masks, the teacher's hidden states. Leaves [..., *], with the leading
        axes of `tokens`.
      chunk_size: the largest number of tokens that are computed at once, the overlap
        included.
      overlap: number of tokens that a chunk reads of the next one.
      where: tokens that have any weight, such as those of responses. They are computed
        first, in their order, and chunks without any of them are skipped.
      batch_axes: mesh axes that the first axis of `tokens` is split over. Each device
        then runs the loop over its own tokens, and the sums are reduced over the
        devices once, after the loop. Rows must be whole on a device: a device does not
        read the tokens of the next one. In a shard_map over these axes the gradient of
        `shared` stays the device's own if `shared` is varying (`lax.pcast`); without
        `batch_axes` it is summed over all mesh axes of `tokens`. On Explicit axes the
        split is read from the type, and `fn` passes `vocab_axis` if the head is split.
      shared_specs: PartitionSpecs of `shared`, or of its first levels, over other mesh
        axes: a head that is split over V. `fn` then passes `vocab_axis`.

    Returns:
      The float32 sum, differentiable in `shared` and `tokens`, and the metrics' sums.

    Raises:
      ValueError: `overlap` is negative, or `chunk_size` is below 1 or twice `overlap`;
        a leaf of `aux` has other leading axes; tokens do not divide over `batch_axes`.
      TypeError: `fn` closes over what is differentiated (JAX reports a tracer); pass it
        in `shared`.

    >>> def fn(head, hidden, weights):
    ...     return jnp.sum(weights * jnp.square(hidden @ head)), jnp.sum(weights)
    >>> head, hidden, weights = jnp.ones(2), jnp.ones((5, 2)), jnp.full(5, 0.5)
    >>> loss = lambda *x: chunked(fn, *x, weights, chunk_size=2, overlap=0)
    >>> (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(head, hidden)
    >>> print(value, count, gradient)
    10.0 2.5 [10. 10.]
    """
    if overlap < 0 or chunk_size < max(1, 2 * overlap):
        raise ValueError(
            f"chunk_size={chunk_size}, overlap={overlap}; expected an overlap of at "
            "least 0, and a chunk_size of at least 1 and at least twice the overlap"
        )
    _check_aux(tokens, aux)
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    places = placement(axes, shared_specs, shared, tokens, (aux, where))
    arguments = places.put(shared, tokens, (aux, where))
    return _differentiable(ChunkLoop(fn, chunk_size, overlap), places)(*arguments)


def _differentiable(
    loop: ChunkLoop, places: Placement
) -> Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]:
    """The loop as a function whose forward pass also forms the gradients."""

    @jax.custom_vjp
    def loss(shared: PyTree, tokens: Array, aux: PyTree) -> tuple[Array, PyTree]:
        def local(shared: PyTree, tokens: Array, aux: PyTree) -> ChunkSums:
            return loop.sums(shared, tokens, *aux)

        sums = places.over_devices(local, wanted=None)(shared, tokens, aux)
        return sums.value, sums.metrics

    def forward(*primals: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
        values = jax.tree.map(lambda leaf: leaf.value, primals)
        wanted = [leaf.perturbed for leaf in jax.tree.leaves(primals[0])]

        def local(shared: PyTree, tokens: Array, aux: PyTree) -> ChunkSums:
            return loop.sums_and_gradients(shared, tokens, *aux, wanted=wanted)

        sums = places.over_devices(local, wanted=wanted)(*values)
        return (sums.value, sums.metrics), (sums.d_shared, sums.d_tokens)

    def backward(gradients: PyTree, cotangents: PyTree) -> PyTree:
        scale = cotangents[0]
        scale = jnp.zeros(()) if isinstance(scale, SymbolicZero) else scale
        d_shared, d_tokens = jax.tree.map(
            lambda d: (scale * d).astype(d.dtype), gradients
        )
        return d_shared, d_tokens, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def default_chunk_size(columns: int, platform: str | None = None) -> int:
    """Number of tokens whose logits fill 24 MiB on a CPU, 256 MiB elsewhere; >= 64.

    With few tokens per chunk the head's gradient is added up often; with many their
    logits fill the memory.

    Args:
      columns: the number of the vocabulary's columns per device.
      platform: "cpu", "gpu" or "tpu"; None means JAX's default backend.
    """
    size = (24 if (platform or jax.default_backend()) == "cpu" else 256) * 2**20
    return max(64, size // (4 * columns))


def _check_aux(tokens: Array, aux: PyTree) -> None:
    leading = tokens.shape[:-1]
    for path, leaf in jax.tree.leaves_with_path(aux):
        if leaf.shape[: len(leading)] != leading:
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)} {leaf.shape} for tokens "
                f"{tokens.shape}; expected the leading axes {leading}: what every "
                "chunk reads whole, such as the teacher's head, belongs into shared"
            )
