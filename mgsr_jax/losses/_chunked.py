"""A loss over many tokens in the memory of a few: gradients formed chunk by chunk.

The logits of a batch are the largest arrays of distillation, several times over. Here
only those of one chunk of tokens exist. While they are alive the chunk's gradient is
formed too, so that nothing is kept for a backward pass and nothing computed twice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree

from mgsr_jax.losses._projection import Projection, Taped, add_product, varying_as

ChunkLoss = Callable[[Any, Array, Any], tuple[Array, Any]]


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
    """A sum over tokens, chunk by chunk, with the gradients formed on the way.

    (loss, metrics) = sum_c fn(shared, tokens[c], aux[c])

    `fn(shared, tokens_chunk, aux_chunk)` returns a weighted scalar and a tree of metric
    sums. Its chunks hold consecutive tokens, all leading axes flattened into one, and
    the last `overlap` of them are the first of the next chunk: they are there to be
    read, for a loss of neighbours, and must add nothing themselves. Tokens are padded
    with zeros to whole chunks (False, 0): padding must weigh nothing, as it does when
    every value is multiplied by a weight from `aux` and masked by a `where` from there.

    Gradient in the forward pass is how Liger Kernel's chunked losses work
    (arXiv 2410.10989). A backward pass only multiplies by one number: so weights come
    first, and the metrics have no gradient. Second derivatives do not exist.

    `fn` may call `chunked` once more, on the logits that it forms: they are the tokens
    there, read a few rows at a time, and their gradient takes their place. A loss that
    needs eight arrays of the size of the logits needs that of a few rows then.

    Args:
      fn: a pure function. Nothing that is differentiated may be closed over.
      shared: what every chunk reads whole: the heads of student and teacher, a clip
        network. Gradients are formed for the leaves that are differentiated alone;
        they are summed in float32.
      tokens: the student's hidden states. [..., D]
      aux: what is cut with the tokens, and has no gradient: labels, weights, masks, the
        teacher's hidden states. Leaves [..., *], with the leading axes of `tokens`.
      chunk_size: the most tokens that are computed at once, the overlap included.
      overlap: how many tokens a chunk reads of the next one.
      where: tokens that weigh anything, such as those of responses. They are computed
        first, in their order, and chunks that hold none of them are left out.
      batch_axes: mesh axes that the first axis of `tokens` is split over. The loop then
        runs on each device for its own tokens, and sums meet once, after it. Rows must
        be whole: a device reads nothing of the next one's. In a shard_map over them
        the gradient of `shared` is the device's own where `shared` is (`lax.pcast`);
        without them it is summed over all axes of `tokens`. On Explicit axes it is read
        from the type, and `fn` names `vocab_axis` where the head is split.
      shared_specs: PartitionSpecs of `shared`, or of its first levels, over other axes
        than those: a head that is split over V. `fn` then names `vocab_axis`.

    Returns:
      The float32 sum, differentiable in `shared` and `tokens`, and the metrics' sums.

    Raises:
      ValueError: `overlap` is negative, `chunk_size` below twice that; a leaf of `aux`
        has other leading axes; tokens do not divide over `batch_axes`.
      TypeError: `fn` closes over what is differentiated (jax tells of a tracer); pass
        it in `shared`.

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
            "least 0 and a chunk_size of at least 1 and twice the overlap"
        )
    _check_aux(tokens, aux)
    aux = aux, where
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    manual = _manual_axes()
    if manual.issuperset(axes):  # within the caller's shard_map, if in any
        axes = ()
    places = _placement(axes, shared_specs, shared, tokens, aux)
    if places.explicit:
        shared, tokens, aux = jax.tree.map(
            reshard, (shared, tokens, aux), (places.shared, places.tokens, places.aux)
        )
    elif manual and not batch_axes:
        # What all devices share is summed over them once.
        shared = jax.tree.map(lambda x: varying_as(x, tokens), shared)
    run = functools.partial(_run, fn, chunk_size, overlap, places)

    @jax.custom_vjp
    def loss(shared: PyTree, tokens: Array, aux: PyTree) -> tuple[Array, PyTree]:
        wanted = [False] * len(jax.tree.leaves(shared))
        return run(wanted, False, shared, tokens, aux)[:2]

    def forward(*primals: PyTree) -> Any:
        values = jax.tree.map(lambda leaf: leaf.value, primals)
        wanted = [leaf.perturbed for leaf in jax.tree.leaves(primals[0])]
        value, metrics, *gradients = run(wanted, True, *values)
        return (value, metrics), gradients

    def backward(gradients: Any, cotangents: Any) -> Any:
        by = cotangents[0]
        by = jnp.zeros(()) if isinstance(by, SymbolicZero) else by
        shared, tokens = jax.tree.map(lambda d: (by * d).astype(d.dtype), gradients)
        return shared, tokens, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss(shared, tokens, aux)


def default_chunk_size(columns: int, platform: str | None = None) -> int:
    """Tokens whose logits fill 24 MiB on a CPU and 256 MiB elsewhere; at least 64.

    `columns` are those that a device holds; `platform` is by default the one at hand.
    Few tokens a chunk and the head's gradient is added up often; many and their logits
    are what fills the memory.
    """
    size = (24 if (platform or jax.default_backend()) == "cpu" else 256) * 2**20
    return max(64, size // (4 * columns))


class _Placement(NamedTuple):
    """Where everything lies; a device's loop sees its part of what is split.

    Attributes:
      batch: mesh axes that the first axis of tokens is split over.
      manual: those, and on an Explicit mesh all others that split anything.
      explicit: whether the types say so.
      shared, tokens, aux: a spec for every leaf.
    """

    batch: tuple[str, ...]
    manual: frozenset[str]
    explicit: bool
    shared: Any
    tokens: Any
    aux: Any


def _placement(
    batch_axes: tuple[str, ...],
    shared_specs: PyTree,
    shared: PyTree,
    tokens: Array,
    aux: PyTree,
) -> _Placement:
    """From the arguments, or from the types where they tell of Explicit axes."""
    leaves = jax.tree.leaves((shared, tokens, aux))
    explicit = any(any(jax.typeof(x).sharding.spec) for x in leaves)
    if explicit:
        batch_axes = _names(_spec(tokens)[:1])

    def whole(x: Array) -> P:
        kept = [tuple(n for n in _names([s]) if n not in batch_axes) for s in _spec(x)]
        return P(*(names or None for names in kept))

    if explicit:
        of_shared = jax.tree.map(whole, shared)
    else:
        of_shared = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part),
            P() if shared_specs is None else shared_specs,
            shared,
            is_leaf=_is_spec,
        )
    rows = P(batch_axes or None)
    specs = (of_shared, rows, jax.tree.map(lambda _: rows, aux))
    named = _names(
        [part for spec in jax.tree.leaves(specs, is_leaf=_is_spec) for part in spec]
    )
    return _Placement(batch_axes, frozenset(named), explicit, *specs)


def _run(
    fn: ChunkLoss,
    chunk_size: int,
    overlap: int,
    places: _Placement,
    wanted: list[bool],
    wanted_of_tokens: bool,
    shared: PyTree,
    tokens: Array,
    aux: PyTree,
) -> tuple[Array, PyTree, PyTree, Array | None]:
    """Value, metrics, gradients of `shared` and of `tokens`; None where not wanted."""

    def local(shared: PyTree, tokens: Array, aux: PyTree) -> Any:
        return _loop(
            fn, chunk_size, overlap, wanted, wanted_of_tokens, shared, tokens, aux
        )

    if not places.manual:
        return local(shared, tokens, aux)

    def on_device(shared: PyTree, tokens: Array, aux: PyTree) -> Any:
        # As a part of its own on each device: the gradient of what is shared would
        # otherwise be summed over the devices in every chunk.
        shared = jax.tree.map(
            lambda x: lax.pcast(x, places.batch, to="varying"), shared
        )
        *sums, d_tokens = local(shared, tokens, aux)
        return *lax.psum(sums, places.batch), d_tokens

    flat, tree = jax.tree.flatten(places.shared, is_leaf=_is_spec)
    d_shared = [s if w else None for s, w in zip(flat, wanted, strict=True)]
    return jax.shard_map(
        on_device,
        in_specs=(places.shared, places.tokens, places.aux),
        out_specs=(P(), P(), jax.tree.unflatten(tree, d_shared), places.tokens),
        axis_names=set(places.manual),
    )(shared, tokens, aux)


def _loop(
    fn: ChunkLoss,
    chunk_size: int,
    overlap: int,
    wanted: list[bool],
    wanted_of_tokens: bool,
    shared: PyTree,
    tokens: Array,
    aux: PyTree,
) -> tuple[Array, PyTree, PyTree, Array | None]:
    """`_run` on one device: a loop over chunks of its tokens."""
    leaves, tree = jax.tree.flatten(shared, is_leaf=_is_projection)
    whole = jax.tree.structure(shared)
    shape, leading = tokens.shape, tokens.ndim - 1
    tokens, (aux, where) = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[leading:]), (tokens, aux)
    )
    chunks, stride, order = _division(len(tokens), chunk_size, overlap, where)
    kinds = list(zip(leaves, wanted, strict=True))
    chosen = [x for x, w in kinds if w]

    def of_chunk(varied: list[Any], tokens: Array, aux: PyTree) -> Any:
        given = iter(varied)
        both = [_put(x, next(given)) if w else x for x, w in kinds]
        value, metrics = fn(jax.tree.unflatten(tree, both), tokens, aux)
        return value.astype(jnp.float32), metrics

    def body(i: Any, carry: Any) -> Any:
        sums, totals, tokens, of_next = carry
        window = _Window(i * stride, stride, overlap, order)
        read = jax.tree.map(window.read, (tokens, aux))
        if not wanted_of_tokens:
            found = of_chunk(chosen, *read)
            return jax.tree.map(jnp.add, sums, found), totals, tokens, of_next
        gradient = jax.value_and_grad(of_chunk, (0, 1), has_aux=True)
        varied = [_varied(x, read[0]) for x in chosen]
        found, (d_varied, d_read) = gradient(varied, *read)
        sums = jax.tree.map(jnp.add, sums, found)
        totals = [_add(t, d) for t, d in zip(totals, d_varied, strict=True)]
        tokens = window.write(tokens, d_read[:stride], of_next)
        return sums, totals, tokens, d_read[stride:]

    first = jax.tree.map(_Window(0, stride, overlap, order).read, (tokens, aux))
    carry = (
        _zeros_of(lambda: of_chunk([_varied(x, first[0]) for x in chosen], *first)),
        [jnp.zeros_like(_matrix(x), jnp.float32) for x in chosen],
        tokens,  # in place of those that were read, their gradient
        jnp.zeros_like(tokens, shape=(overlap, *tokens.shape[1:])),
    )
    sums, totals, tokens, _ = lax.fori_loop(0, chunks, body, carry)
    if not wanted_of_tokens:
        return *sums, whole.unflatten([None] * len(leaves)), None
    if where is not None:
        tokens = jnp.where(where[:, None], tokens, 0)
    found = iter(totals)
    d_shared = [next(found).astype(_matrix(x).dtype) if w else None for x, w in kinds]
    return *sums, whole.unflatten(d_shared), tokens.reshape(shape)


def _division(
    tokens: int, chunk_size: int, overlap: int, where: Array | None
) -> tuple[Any, int, Array | None]:
    """How many chunks to compute, their own tokens, and the order of all tokens."""
    chunks = max(1, math.ceil(tokens / (chunk_size - overlap)))
    # Of equal size, so that little is padded.
    stride = min(tokens, max(overlap, math.ceil(tokens / chunks)))
    if where is None:
        return chunks, stride, None
    order = jnp.argsort(~where, stable=True)
    return -(-jnp.sum(where) // stride), stride, order


def _is_projection(x: Any) -> bool:
    return isinstance(x, Projection)


def _matrix(leaf: Any) -> Array:
    return leaf.kernel if _is_projection(leaf) else leaf


def _varied(leaf: Any, tokens: Array) -> Any:
    """What a chunk is differentiated in: of a projection its tape, not its kernel."""
    return leaf.new_tape(tokens) if _is_projection(leaf) else leaf


def _put(leaf: Any, varied: Any) -> Any:
    return Taped(leaf.kernel, varied) if _is_projection(leaf) else varied


def _add(total: Array, gradient: Any) -> Array:
    if isinstance(gradient, tuple):
        return add_product(total, *gradient)
    return total + gradient.astype(total.dtype)


class _Window(NamedTuple):
    """The tokens of one chunk among all of a device.

    Attributes:
      start: the chunk's first token.
      stride: how many are its own.
      overlap: how many it reads of the next chunk.
      order: in which tokens are counted; None is the order in which they lie.
    """

    start: Any
    stride: int
    overlap: int
    order: Array | None

    def read(self, x: Array) -> Array:
        """Rows of the chunk's own tokens and of the overlap; zeros beyond the last.

        The last chunk begins earlier, to be whole: what it has twice is zero.
        """
        if self.order is not None:
            return x.at[self._rows(self.order)].get(mode="fill", fill_value=0)
        first, new = self._place(x)
        own = lax.dynamic_slice_in_dim(x, first, self.stride)
        own = jnp.where(new, own, jnp.zeros_like(own))
        following = self.start + self.stride + jnp.arange(self.overlap)
        return jnp.concatenate([own, x.at[following].get(mode="fill", fill_value=0)])

    def write(self, x: Array, own: Array, of_next: Array) -> Array:
        """The transpose of `read`, in place of what it read.

        `of_next` is what the chunk before has found for the first of these rows.
        """
        if self.order is not None:
            rows = self._rows(self.order)
            x = x.at[rows[: self.stride]].set(own, mode="drop")
            return x.at[rows[: self.overlap]].add(of_next, mode="drop")
        first, new = self._place(x)
        own = jnp.where(new, own, lax.dynamic_slice_in_dim(x, first, self.stride))
        x = lax.dynamic_update_slice_in_dim(x, own, first, axis=0)
        return x.at[self.start + jnp.arange(self.overlap)].add(of_next, mode="drop")

    def _rows(self, order: Array) -> Array:
        """Where the tokens lie; beyond the last of all there is none."""
        count = self.start + jnp.arange(self.stride + self.overlap)
        return order.at[count].get(mode="fill", fill_value=len(order))

    def _place(self, x: Array) -> tuple[Array, Array]:
        """Where `stride` rows begin that are all there, and which of them are new."""
        first = jnp.minimum(self.start, len(x) - self.stride)
        new = jnp.arange(self.stride) >= self.start - first
        return first, new.reshape(-1, *[1] * (x.ndim - 1))


def _zeros_of(fn: Callable[[], Any]) -> Any:
    """Zeros of the types that `fn` returns; it is traced, and nothing is computed."""
    return jax.jit(lambda: jax.tree.map(jnp.zeros_like, fn()))()


def _check_aux(tokens: Array, aux: PyTree) -> None:
    leading = tokens.shape[:-1]
    for path, leaf in jax.tree.leaves_with_path(aux):
        if leaf.shape[: len(leading)] != leading:
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)} {leaf.shape} for tokens "
                f"{tokens.shape}; expected the leading axes {leading}: what every "
                "chunk reads whole, such as the teacher's head, belongs into shared"
            )


def _manual_axes() -> set[str]:
    """The axes of the shard_map that this is called in."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Manual}


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _spec(x: Array) -> tuple[Any, ...]:
    return tuple(jax.typeof(x).sharding.spec)


def _names(parts: Any) -> tuple[str, ...]:
    """The axis names in parts of a spec."""
    names = []
    for part in parts:
        names += [part] if isinstance(part, str) else list(part or ())
    return tuple(names)
