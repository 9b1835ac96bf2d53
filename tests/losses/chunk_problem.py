"""Losses of hidden states, dense and in chunks, for the tests of the chunked loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import losses
from mgsr_jax.losses import Projection, chunked, project

# V is the size of nothing else, so that a pattern in the program's text is conclusive.
B, T, D, WIDER, V, K = 3, 7, 5, 6, 83, 4
TOKENS = B * T


def unembed(head, hidden):
    """A head with everything that it may have: matrix, scale, bias, soft cap."""
    logits = 0.7 * project(2.0 * hidden, head["kernel"])
    bias = jnp.broadcast_to(head["bias"], logits.shape)
    return 3.0 * jnp.tanh((logits + bias) / 3.0)


def problem(seed=0, tokens=TOKENS, dtype=jnp.float32):
    """(differentiated: head, clip network), hidden states, (teacher's head), aux."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, shape), dtype)

    clip = losses.init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
    clip["output"]["kernel"] = jnp.full((4, 2), 0.3)
    trained = {
        "head": {"kernel": normal(V, D), "bias": jnp.linspace(-1, 1, V)},
        "clip": clip,
    }
    aux = {
        "teacher": normal(tokens, WIDER),
        "labels": jnp.asarray(rng.integers(0, V, tokens), jnp.int32),
        "where": jnp.asarray(rng.random(tokens) < 0.7),
        # Pairs are everywhere, so that some borders between chunks cut one.
        "span_ids": jnp.asarray(np.arange(tokens) // 5, jnp.int32),
        "weights": jnp.asarray(rng.uniform(0.1, 1, (tokens, 3)), jnp.float32),
    }
    return trained, normal(tokens, D), normal(V, WIDER), aux


def light_problem(seed=0, tokens=TOKENS):
    """`problem` for `light_loss`: without the clip network."""
    trained, *rest = problem(seed, tokens)
    return {"head": trained["head"]}, *rest


def of_logits(clip, student, aux, *, overlap=1):
    """Cross-entropy, DAC-KL and span correlation: weighted sum and metrics."""
    n = student.shape[0]
    where = aux["scored"] & (jnp.arange(n) < n - overlap)
    sft = losses.cross_entropy(student, aux["labels"], where=where)
    dac = losses.dac_kl(clip, student, aux["teacher"], where=where)
    span = losses.span_correlation(
        student, aux["teacher"], aux["span_ids"], where=aux["where"]
    )
    values = jnp.stack([sft, dac.loss, span], axis=-1)
    metrics = {
        "sft": losses.masked_sum(sft, where),
        "kept_mass": losses.masked_sum(dac.kept_mass, where),
    }
    return jnp.sum(aux["weights"] * values), metrics


def all_losses(shared, hidden, aux, *, overlap=1, rows=None, unembed=unembed):
    """The losses of hidden states; with `rows` the logits are read in inner chunks."""
    n = hidden.shape[0]
    student = unembed(shared["head"], hidden)
    teacher = jnp.einsum("nd,vd->nv", aux["teacher"], shared["teacher_head"])
    scored = aux["where"] & (jnp.arange(n) < n - overlap)
    aux = aux | {"teacher": teacher, "scored": scored}
    if rows is None:
        return of_logits(shared["clip"], student, aux, overlap=0)
    return chunked(of_logits, shared["clip"], student, aux, chunk_size=rows + 1)


def light_loss(shared, hidden, aux, *, overlap=1):
    """A loss per token and one per pair of neighbours, quick to compile.

    It reads the same arguments as `all_losses`, except for the clip network.
    """
    n = hidden.shape[0]
    own = jnp.arange(n) < n - overlap
    student = unembed(shared["head"], hidden)
    teacher = jnp.einsum("nd,vd->nv", aux["teacher"], shared["teacher_head"])
    token = jnp.mean(jnp.square(student - teacher), axis=-1)
    following = jnp.pad(student[1:], ((0, 1), (0, 0)))
    pair = jnp.mean(student * following, axis=-1)
    pairs = losses.span_pairs(aux["span_ids"], aux["where"])
    where = aux["where"] & own
    values = jnp.where(where, aux["weights"][:, 0] * token, 0.0)
    values += jnp.where(pairs, aux["weights"][:, 1] * pair, 0.0)
    return jnp.sum(values), {"token": losses.masked_sum(token, where)}


@functools.cache
def dense(loss=all_losses):
    """`loss` of all tokens at once."""

    def run(trained, hidden, teacher_head, aux):
        shared = trained | {"teacher_head": teacher_head}
        return loss(shared, hidden, aux, overlap=0)

    return run


@functools.cache
def in_chunks(chunk_size, loss=all_losses, batch_axes=(), **how):
    """The same in chunks, with the head's matrix as a Projection."""

    def run(trained, hidden, teacher_head, aux):
        head = trained["head"] | {"kernel": Projection(trained["head"]["kernel"])}
        shared = trained | {"head": head, "teacher_head": teacher_head}
        fn = functools.partial(loss, **how)
        sizes = {"chunk_size": chunk_size, "batch_axes": batch_axes}
        return chunked(fn, shared, hidden, aux, **sizes)

    return run


@functools.cache
def differentiated(function):
    """((value, metrics), gradients of the first two arguments), compiled once."""
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


def assert_close(got, want, rtol=2e-6):
    """Compare leaf by leaf, relative to the leaf's norm."""

    def close(path, a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        off = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert off <= rtol, (jax.tree_util.keystr(path), off)

    jax.tree_util.tree_map_with_path(close, got, want)
