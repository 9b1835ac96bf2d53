"""`mgsr cache-teacher`: run the teacher over the training data and write its cache.

The teacher reads each example once, in batches of a few widths. Its logits over the
whole vocabulary exist for a few hundred tokens at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress

from mgsr_jax import sharding
from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.train import reserve_gpu_memory
from mgsr_jax.losses import TopKTeacher, top_k_teacher
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.typing import Model, Params

if TYPE_CHECKING:
    from mgsr_jax.data.teacher_manifest import Manifest, Recipe
    from mgsr_jax.data.teacher_shards import CachedExample
    from mgsr_jax.training.inputs import RunInputs

TopKStep = Callable[[Params, Rows], TopKTeacher]

_CHUNK = 256  # tokens per device whose logits exist at a time
_NARROWEST = 64  # width of the shortest batches
_ENOUGH_MASS = 0.95


def cache_teacher(
    config: TrainConfig,
    *,
    top_k: int = 512,
    logits_dtype: Literal["float16", "float32"] = "float16",
) -> int:
    """Run the teacher over the training data once and write its outputs to disk.

    Takes the YAML file and the settings of train. It reads student (for the tokenizer),
    teacher, teacher_dtype, data, mesh, batch_size and micro_batches; output is the
    cache's folder. Afterwards, train reads this folder with --teacher_cache. A stopped
    command continues where it stopped. objective.span must be 0, because the span loss
    compares whole distributions.

    Args:
      top_k: K, the number of most probable classes kept per token. A token takes
        K * 4 + 4 bytes with float16 and a vocabulary of at most 65,536.
      logits_dtype: precision of the K logits on disk.
    """
    reserve_gpu_memory()
    write_teacher_cache(config, top_k=top_k, logits_dtype=logits_dtype)
    return DONE


def write_teacher_cache(
    config: TrainConfig,
    *,
    top_k: int,
    logits_dtype: Literal["float16", "float32"] = "float16",
    examples_per_shard: int = 1024,
    console: Console | None = None,
) -> "Manifest":
    """Write the teacher's most probable classes per training token to `config.output`.

    Shards of the same cache that exist already are kept.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a mistake in the settings, the
        data, a checkpoint, or the folder's contents; logits that are not finite.
    """
    from mgsr_jax.data import teacher_cache
    from mgsr_jax.training.inputs import (
        check_candidates,
        origin_of,
        read_inputs,
    )
    from mgsr_jax.training.run_models import with_local_models

    console = console or Console(stderr=True)
    _check(config)
    config = with_local_models(config)
    setup = read_inputs(config, console=console)
    check_candidates(config, top_k, setup.vocab_size)
    _check_responses(setup)
    recipe = teacher_cache.Recipe(
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
            _write_shards(folder, recipe, missing, setup, console)
    manifest = teacher_cache.finish(folder, recipe)
    _report(folder, manifest, console)
    return manifest


def make_top_k_step(
    teacher: Model, *, top_k: int, vocab_size: int, mesh: Mesh
) -> TopKStep:
    """A jitted `step(params, rows)`: the teacher's K classes at every scored position.

    Index r of the result is the r-th scored position of its row, which is position
    `prompt_lengths - 1 + r` of `next_token_view`. Indices beyond the row's last scored
    position hold undefined values. Unscored positions are not projected, so a batch
    costs as many chunks of logits as its longest response needs.
    """
    rows_sharding = sharding.batch_sharding(mesh)
    row_parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def step(params: Params, rows: Rows) -> TopKTeacher:
        hidden, _ = teacher.forward(params, next_token_view(rows).inputs)
        batch, length, _ = hidden.shape
        size = min(length, max(1, _CHUNK * row_parts // batch))
        # All-gathered once, not per chunk.
        head = lax.with_sharding_constraint(
            teacher.head_params(params), sharding.replicated(mesh)
        )

        def add_chunk(i: Int[Array, ""], outputs: TopKTeacher) -> TopKTeacher:
            at = rows.prompt_lengths[:, None] - 1 + i * size + jnp.arange(size)[None, :]
            chunk = _take_positions(hidden, at)
            logits = teacher.unembed(head, chunk)
            chunk_outputs = top_k_teacher(logits, top_k, vocab_size=vocab_size)
            return jax.tree.map(
                lambda all_chunks, chunk: lax.dynamic_update_slice_in_dim(
                    all_chunks, chunk, i * size, axis=1
                ),
                outputs,
                chunk_outputs,
            )

        longest = jnp.max(rows.lengths - rows.prompt_lengths)
        shape = (batch, math.ceil(length / size) * size, top_k)
        empty = lax.with_sharding_constraint(_empty(shape), rows_sharding)
        return lax.fori_loop(0, (longest + size - 1) // size, add_chunk, empty)

    return jax.jit(step, out_shardings=rows_sharding)


def _take_positions(
    hidden: Float[Array, "B T D"], at: Int[Array, "B C"]
) -> Float[Array, "B C D"]:
    return jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")


def _empty(shape: tuple[int, int, int]) -> TopKTeacher:
    return TopKTeacher(
        logits=jnp.zeros(shape, jnp.float32),
        indices=jnp.zeros(shape, jnp.int32),
        logsumexp=jnp.zeros(shape[:2], jnp.float32),
    )


def _check(config: TrainConfig) -> None:
    if config.teacher_cache not in (None, config.output):
        raise ValueError(
            f"output={config.output} and teacher_cache={config.teacher_cache} differ, "
            "but training reads the cache from teacher_cache; set --output "
            f"{config.teacher_cache}"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"one process writes the cache, got {jax.process_count()} processes; run "
            "mgsr cache-teacher on one host, then any number of hosts can read it"
        )
    # Training with the cache must be possible too.
    dataclasses.replace(config, teacher_cache=config.output).check()


def _check_responses(setup: "RunInputs") -> None:
    if not setup.train[0]["response"]:
        raise ValueError(
            "data.train holds prompts only, so there is no response for the teacher to "
            "read; train without a teacher cache"
        )


def _write_shards(
    folder: Path,
    recipe: "Recipe",
    missing: list[int],
    setup: "RunInputs",
    console: Console,
) -> None:
    from mgsr_jax.data import teacher_shards
    from mgsr_jax.models import LanguageModel
    from mgsr_jax.training.initial_state import load_teacher

    config, teacher, mesh = setup.config, setup.teacher, setup.mesh
    # `origin_of` has refused several teachers, or none.
    assert isinstance(teacher, LanguageModel) and isinstance(config.teacher, str)
    params = load_teacher(
        config.teacher, teacher, mesh=mesh, dtype=config.teacher_dtype
    )
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
            for batch in _run_batches(
                setup, params, step, recipe.shard_examples(number)
            ):
                examples |= batch
                progress.advance(task, len(batch))
            in_order = [examples[i] for i in sorted(examples)]
            teacher_shards.write_shard(folder, recipe, number, in_order)


def _run_batches(
    setup: "RunInputs", params: Params, step: TopKStep, examples: range
) -> Iterator[dict[int, "CachedExample"]]:
    """The teacher's outputs per batch, keyed by example; short batches come first."""
    pending = None
    for rows in _batches(setup, examples):
        started = step(params, sharding.put_batch(setup.mesh, rows))
        if pending is not None:  # fetched while the device computes the next batch
            yield _by_example(*pending)
        pending = rows, started
    if pending is not None:
        yield _by_example(*pending)


def _by_example(rows: Rows, teacher: TopKTeacher) -> dict[int, "CachedExample"]:
    from mgsr_jax.data.teacher_shards import CachedExample

    teacher = jax.device_get(teacher)
    examples = {}
    for b, example in enumerate(rows.example.tolist()):
        if example < 0:  # a filler row of the last batch
            continue
        start, end = int(rows.prompt_lengths[b]), int(rows.lengths[b])
        # A view would keep the batch's padding in memory until the shard is written.
        row = jax.tree.map(lambda x, b=b, n=end - start: x[b, :n].copy(), teacher)
        if not np.isfinite(row.logsumexp).all():
            raise ValueError(
                f"the teacher's logits on example {example} are not finite; check the "
                "checkpoint, or set teacher_dtype to float32"
            )
        examples[example] = CachedExample(rows.tokens[b, :end], start, row)
    return examples


def _batches(setup: "RunInputs", examples: range) -> Iterator[Rows]:
    """Rows of the examples, each in the narrowest width that holds it."""
    from mgsr_jax.data.batches import eval_batches

    config = setup.config
    index = np.array([*examples, -1], np.int32)  # filler rows keep the index -1
    for rows in eval_batches(
        setup.train.select(examples),
        config.batch_size // config.micro_batches,
        widths=_widths(config.data.max_length),
    ):
        yield dataclasses.replace(rows, example=index[rows.example])


def _widths(longest: int) -> list[int]:
    """Ascending widths: ..., a quarter and a half of the longest, the longest."""
    widths = [longest]
    while widths[0] // 2 >= _NARROWEST:
        widths.insert(0, widths[0] // 2)
    return widths


def _report(folder: Path, manifest: "Manifest", console: Console) -> None:
    recipe = manifest.recipe
    size = sum((folder / name).stat().st_size for name in recipe.shards)
    console.print(
        f"teacher cache: {folder}: {recipe.examples} examples, {manifest.positions} "
        f"tokens, {size / 1e6:.1f} MB ({size / max(manifest.positions, 1):.0f} bytes "
        f"per token); {recipe.top_k} classes hold {manifest.held_mass:.4f} of the "
        "teacher's probability",
        markup=False,
    )
    if manifest.held_mass < _ENOUGH_MASS:
        console.print(
            f"[yellow]{1 - manifest.held_mass:.3f} of the teacher's probability is "
            f"outside the {recipe.top_k} classes, where the student learns only the "
            "total; raise --top_k"
        )
