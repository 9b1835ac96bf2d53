"""Decoding without a cache: a Python loop over rows and tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mgsr_jax.decoding.decode import decode, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, row_keys, sample
from mgsr_jax.interventions.outcome import Pair


@partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    """Logits of one row, [S, V], from a forward pass over all of it."""
    hidden, _ = model.forward(params, tokens[None])
    return model.unembed(model.head_params(params), hidden)[0]


def generate(model, params, rows, key, decoding):
    """The tokens of every row, as lists."""
    result, width = [], rows.tokens.shape[1]
    keys = row_keys(key, rows.example, STUDENT_STREAM, 0)
    data = np.asarray(jax.random.key_data(keys))
    for b, length in enumerate(rows.prompt_lengths.tolist()):
        tokens = rows.tokens[b, :length].tolist()
        while len(tokens) < decoding.max_length:
            padded = jnp.asarray(tokens + [0] * (width - len(tokens)))
            logits = full_logits(model, params, padded)[len(tokens) - 1][None]
            row_key = jax.random.wrap_key_data(data[b])
            token_key = jax.random.fold_in(row_key, len(tokens))[None]
            token = int(sample(logits, token_key, decoding.sampling)[0])
            tokens.append(token)
            if token in decoding.eos_ids:
                break
        result.append(tokens)
    return result


def logits_of(named, tokens, width, vocab_size=None):
    """float64 logits at every position of a list of tokens."""
    padded = jnp.asarray(tokens + [0] * (width - len(tokens)))
    logits = np.asarray(full_logits(*named, padded), np.float64)
    logits[:, vocab_size or logits.shape[1] :] = -np.inf
    return logits


def tiny_pair(scale):
    """A student and a teacher of one layer, each a model and its parameters."""
    settings = dict(scale=scale, num_hidden_layers=1)
    return tiny.llama(0, **settings), tiny.llama(1, width=24, **settings)


def sampled(models, params, rows, key, decoding):
    """Both models as an intervention takes them, and the student's samples."""
    student, teacher = models
    copy = student.decode_params(params[0], jnp.float32)
    state = decode(
        student,
        copy,
        start(student, params[0], rows),
        keys=row_keys(key, rows.example, STUDENT_STREAM, 0),
        decoding=decoding,
    )
    return Pair(student, copy, teacher, params[1]), state


def key_data(key, rows, stream, round):
    """The keys of `row_keys`, as numbers."""
    return np.asarray(jax.random.key_data(row_keys(key, rows.example, stream, round)))


def draw(logits, keys, b, position):
    """The token that row b has at a position, by `key_data`."""
    return int(_draw(np.asarray(logits, np.float32), keys[b], position))


@jax.jit
def _draw(logits, row_key, position):
    key = jax.random.fold_in(jax.random.wrap_key_data(row_key), position)
    return sample(logits[None], key[None])[0]


def kl(teacher, student):
    """KL(teacher || student) of logits, in nats."""
    log_p = teacher - np.logaddexp.reduce(teacher)
    log_q = student - np.logaddexp.reduce(student)
    return float(np.sum(np.exp(log_p) * (log_p - log_q), where=log_p > -np.inf))


def as_lists(rows):
    """Prompt and response of every row."""
    return [
        tokens[:length].tolist()
        for tokens, length in zip(rows.tokens, rows.lengths, strict=True)
    ]
