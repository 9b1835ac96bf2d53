"""`mgsr cache-teacher`, act by act: check, run the teacher over the data, write.

The teacher reads each example once, in batches of a few widths; its logits over the
whole vocabulary exist for a few hundred tokens at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from mgsr_jax import sharding
from mgsr_jax.data import teacher_cache
from mgsr_jax.data.batches import eval_batches
from mgsr_jax.data.teacher_cache import CachedExample, Manifest, Recipe
from mgsr_jax.losses import TopKTeacher, top_k_teacher
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.training.config import TrainConfig, check
from mgsr_jax.training.initial_state import load_teacher
from mgsr_jax.training.inputs import Setup, check_candidates, origin_of, read_inputs
from mgsr_jax.typing import Model, Params

TopKStep = Callable[[Params, Rows], TopKTeacher]

_CHUNK = 256  # tokens of one device whose logits exist at a time
_NARROWEST = 64  # width of the shortest batches
_ENOUGH_MASS = 0.95


def cache_teacher(
    config: TrainConfig,
    *,
    top_k: int,
    logits_dtype: teacher_cache.LogitsDtype = "float16",
    examples_per_shard: int = 1024,
    console: Console | None = None,
) -> Manifest:
    """Writes what the teacher says of the training data to the folder `config.output`.

    What is there of the same cache is kept: a stopped command goes on where it was.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a mistake in the settings, the
        data, a checkpoint, or what the folder holds; logits that are not finite.
    """
    console = console or Console(stderr=True)
    _check(config)
    setup = read_inputs(config, console=console)
    check_candidates(config, top_k, setup.vocab_size)
    recipe = Recipe(
        origin=origin_of(setup),
        examples=len(setup.train),
        vocab_size=setup.vocab_size,
        top_k=top_k,
        logits_dtype=logits_dtype,
        examples_per_shard=examples_per_shard,
    )
    folder = Path(config.output)
    if missing := teacher_cache.begin(folder, recipe):
        with jax.set_mesh(setup.mesh):
            _write(folder, recipe, missing, setup, console)
    manifest = teacher_cache.finish(folder, recipe)
    _tell(folder, manifest, console)
    return manifest


def make_top_k_step(
    teacher: Model, *, top_k: int, vocab_size: int, mesh: Mesh
) -> TopKStep:
    """A jitted `step(params, rows)`: the teacher's K classes of every scored position.

    Index r of the result is the r-th scored position of its row, that is position
    `prompt_lengths - 1 + r` of `next_token_view`; beyond the row's last it holds
    nothing of meaning. Unscored positions are not looked at, so a batch costs as many
    chunks of the vocabulary as its longest response needs.
    """
    rows_sharding = sharding.batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def step(params: Params, rows: Rows) -> TopKTeacher:
        hidden, _ = teacher.forward(params, next_token_view(rows).inputs)
        batch, length, _ = hidden.shape
        size = min(length, max(1, _CHUNK * parts // batch))
        # Once, and not for every chunk.
        head = lax.with_sharding_constraint(
            teacher.head_params(params), sharding.replicated(mesh)
        )

        def one(i: Any, found: TopKTeacher) -> TopKTeacher:
            first = rows.prompt_lengths[:, None] - 1 + i * size
            at = first + jnp.arange(size)[None, :]
            chunk = jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")
            logits = teacher.unembed(head, chunk)
            part = top_k_teacher(logits, top_k, vocab_size=vocab_size)
            return jax.tree.map(
                lambda whole, piece: lax.dynamic_update_slice_in_dim(
                    whole, piece, i * size, axis=1
                ),
                found,
                part,
            )

        longest = jnp.max(rows.lengths - rows.prompt_lengths)
        shape = (batch, math.ceil(length / size) * size, top_k)
        empty = TopKTeacher(
            logits=jnp.zeros(shape, jnp.float32),
            indices=jnp.zeros(shape, jnp.int32),
            logsumexp=jnp.zeros(shape[:2], jnp.float32),
        )
        empty = lax.with_sharding_constraint(empty, rows_sharding)
        return lax.fori_loop(0, (longest + size - 1) // size, one, empty)

    return jax.jit(step, out_shardings=rows_sharding)


def _check(config: TrainConfig) -> None:
    if config.teacher_cache not in (None, config.output):
        raise ValueError(
            f"output is {config.output}, but teacher_cache, where training looks for "
            f"it, is {config.teacher_cache}; give --output {config.teacher_cache}"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"the cache is written by one process, got {jax.process_count()}; run "
            "mgsr cache-teacher on one host, any number of hosts can read it"
        )
    # The training that the cache is for must be possible.
    check(dataclasses.replace(config, teacher_cache=config.output))


def _write(
    folder: Path, recipe: Recipe, missing: list[int], setup: Setup, console: Console
) -> None:
    teacher, params = setup.teacher, load_teacher(setup)
    assert teacher is not None
    step = make_top_k_step(
        teacher, top_k=recipe.top_k, vocab_size=recipe.vocab_size, mesh=setup.mesh
    )
    total = sum(len(recipe.shard_examples(number)) for number in missing)
    if total < recipe.examples:
        done = recipe.examples - total
        console.print(f"{folder}: {done} of {recipe.examples} examples are there")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("teacher", total=total)
        for number in missing:
            examples: dict[int, CachedExample] = {}
            for found in _examples(setup, params, step, recipe.shard_examples(number)):
                examples |= found
                progress.advance(task, len(found))
            in_order = [examples[i] for i in sorted(examples)]
            teacher_cache.write_shard(folder, recipe, number, in_order)


def _examples(
    setup: Setup, params: Params, step: TopKStep, examples: range
) -> Iterator[dict[int, CachedExample]]:
    """Batch by batch, by example; the shortest first, each in the narrowest width."""
    pending = None
    for rows in _batches(setup, examples):
        started = step(params, sharding.put_batch(setup.mesh, rows))
        if pending is not None:  # the device works on the next one meanwhile
            yield _by_example(*pending)
        pending = rows, started
    if pending is not None:
        yield _by_example(*pending)


def _by_example(rows: Rows, teacher: TopKTeacher) -> dict[int, CachedExample]:
    teacher = jax.device_get(teacher)
    found = {}
    for b, example in enumerate(rows.example.tolist()):
        if example < 0:  # fills up the last batch
            continue
        start, end = int(rows.prompt_lengths[b]), int(rows.lengths[b])
        # A copy, for a view would keep the batch's padding until the file is written.
        own = jax.tree.map(lambda x, b=b, n=end - start: x[b, :n].copy(), teacher)
        if not np.isfinite(own.logsumexp).all():
            raise ValueError(
                f"the teacher's logits on example {example} are not finite; look at "
                "the checkpoint, or compute with teacher_dtype float32"
            )
        found[example] = CachedExample(rows.tokens[b, :end], start, own)
    return found


def _batches(setup: Setup, examples: range) -> Iterator[Rows]:
    """The examples' rows, in widths of the longest, its half, its quarter, ..."""
    config = setup.config
    own = np.array([*examples, -1], np.int32)  # -1 stays what fills up a batch
    for rows in eval_batches(
        setup.train.select(examples),
        config.batch_size // config.micro_batches,
        widths=_widths(config.data.max_length),
    ):
        yield dataclasses.replace(rows, example=own[rows.example])


def _widths(longest: int) -> list[int]:
    widths = [longest]
    while widths[0] // 2 >= _NARROWEST:
        widths.insert(0, widths[0] // 2)
    return widths


def _tell(folder: Path, manifest: Manifest, console: Console) -> None:
    recipe = manifest.recipe
    size = sum((folder / name).stat().st_size for name in recipe.shards)
    console.print(
        f"teacher cache: {folder}: {recipe.examples} examples, {manifest.positions} "
        f"tokens, {size / 1e6:.1f} MB ({size / max(manifest.positions, 1):.0f} bytes a "
        f"token); {recipe.top_k} classes hold {manifest.held_mass:.4f} of the "
        "teacher's probability",
        markup=False,
    )
    if manifest.held_mass < _ENOUGH_MASS:
        console.print(
            f"[yellow]{1 - manifest.held_mass:.3f} of the teacher's probability lies "
            f"outside the {recipe.top_k} classes, where the student learns only how "
            "much there is in all; raise --top_k"
        )
