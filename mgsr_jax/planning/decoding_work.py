"""How much a run decodes: trips of the loops that data decide, and the bytes needed.

All rows are taken to be as long as they may be: a prompt of the longest length, and a
response that fills the row. A token that is corrected or taken over is in the middle of
its response.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsr_jax import sharding
from mgsr_jax.decoding.decode import TOKENS_PER_CHECK
from mgsr_jax.decoding.reading import BLOCK
from mgsr_jax.decoding.scoring import positions_at_a_time
from mgsr_jax.models import LanguageModel
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.programs import tokens_per_chunk


def new_tokens(config: TrainConfig) -> int:
    """Tokens of a response: as many as fit behind the longest prompt."""
    room = config.data.max_length - config.data.encoding.prompt_limit
    limits = config.rollout.max_new_tokens
    if limits is None:
        return room
    most = limits if isinstance(limits, int) else max(tokens for _, tokens in limits)
    return min(room, most)


def loop_trips(
    config: TrainConfig, student: LanguageModel, mesh: Mesh
) -> dict[str, int]:
    """Trips of the loops whose trips data decide, by name; see `roofline.Trips`."""
    new, half = new_tokens(config), math.ceil(new_tokens(config) / 2)
    rows = config.batch_size // config.micro_batches
    responses = config.batch_size * config.rollout.samples
    at_a_time = config.rollout.decode_rows or responses
    block = BLOCK if mesh.shape["fsdp"] == 1 else config.data.max_length
    scored = positions_at_a_time(responses, at_a_time)
    chunk = tokens_per_chunk(config, student, mesh)
    overlap = 1 if config.objective.span else 0
    tokens = math.ceil(rows / sharding.row_parts(mesh)) * new
    return {
        "exchange": math.ceil(responses / at_a_time),
        "decode/extend": math.ceil(new / TOKENS_PER_CHECK),
        "rewrite/decode/extend": math.ceil(half / TOKENS_PER_CHECK),
        "hand_over/decode/extend": math.ceil(half / TOKENS_PER_CHECK),
        "read_whole/extend": 1,
        "read_on/extend": math.ceil(half / block),
        "write_together/extend": math.ceil(new / config.rollout.draft_tokens),
        "token_kl": math.ceil(new / scored),
        "locate_error": 1,
        "chunks": math.ceil(tokens / (chunk - overlap)),
    }


def decoded_bytes(config: TrainConfig, student: LanguageModel) -> float:
    """Bytes that decoding has to read over all devices, if no byte is read twice.

    For every token position: the weights once for all rows, and the keys and values
    that exist by then.
    """
    new, dtype = new_tokens(config), jnp.dtype(config.dtype)
    rewrites = config.rollout.intervention == "scrg"
    steps = new + (config.rollout.rounds * math.ceil(new / 2) if rewrites else 0)
    params = student.abstract_params()
    if not student.config.tie_word_embeddings:
        params = {name: part for name, part in params.items() if name != "embed"}
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    width = config.data.encoding.prompt_limit + new / 2
    rows = config.batch_size * config.rollout.samples
    cache = jax.eval_shape(lambda: student.init_cache(rows, 1, dtype))
    slots = sum(math.prod(x.shape) for x in jax.tree.leaves(cache))
    return steps * dtype.itemsize * (weights + slots * width)
