"""Checkpoints of a run: restored exactly, checked by name, never overwritten."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax import sharding
from mgsr_jax.checkpoint import state as checkpoint
from mgsr_jax.train_step import init_state
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer
from mgsr_jax.training.replay import ReplayBuffer

HOST = {"data": {"next": 7}, "ratio": {"ratio": 0.25, "reference": None}, "pushed": 3}


def make_state(kernel=(8, 3), extra=()):
    """A train state after one update, so that no moment is zero."""
    layer = {"kernel": jnp.arange(24.0).reshape(kernel), "bias": jnp.ones(3)}
    params = {"student": layer, "clip_network": {"bias": jnp.zeros(2), **dict(extra)}}
    optimizer = make_optimizer(OptimizerConfig(), 5)
    state = init_state(params, optimizer, seed=3)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = optimizer.update(grads, state.opt_state, params)
    return dataclasses.replace(state, step=jnp.int32(4), opt_state=opt_state)


def make_replay(capacity=3, width=4):
    buffer = ReplayBuffer.empty(capacity, width)
    buffer.rows.tokens[:] = np.arange(capacity * width).reshape(capacity, width)
    return buffer.arrays


def like(tree, place=None):
    place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def raw(tree):
    """The tree with random keys as the numbers in them."""

    def numbers(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(numbers, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of step 4, its state and its replay buffer."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state, replay = make_state(), make_replay()
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, 4, state=state, host=HOST, replay=replay)
    return folder, state, replay


def test_state_host_and_replay_are_restored(saved):
    folder, state, replay = saved
    with checkpoint.open_manager(folder) as manager:
        assert manager.latest_step() == 4
        restored, host, buffer = checkpoint.restore(
            manager, 4, state=like(state), replay=make_replay()
        )
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, raw(restored), raw(state))
    assert restored.key.dtype == state.key.dtype
    assert host == HOST
    assert all(isinstance(leaf, np.ndarray) for leaf in buffer.values())
    jax.tree.map(np.testing.assert_array_equal, buffer, replay)


def test_a_state_is_restored_onto_another_mesh(saved):
    folder, state, _ = saved
    mesh = sharding.make_mesh(2, 4)
    place = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    place.params["student"]["kernel"] = split
    expected = jax.tree.map(like, state, place)
    with checkpoint.open_manager(folder) as manager:
        restored, *_ = checkpoint.restore(
            manager, 4, state=expected, replay=make_replay()
        )
    kernel = restored.params["student"]["kernel"]
    assert kernel.sharding == split
    np.testing.assert_array_equal(kernel, state.params["student"]["kernel"])


def wrong_dtype():
    state = make_state()
    kernel = state.params["student"]["kernel"]
    state.params["student"]["kernel"] = kernel.astype(jnp.bfloat16)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: make_state(kernel=(4, 6)),
            r"kernel is float32\[8, 3\], expected float32\[4, 6\]",
        ),
        (
            wrong_dtype,
            r"params/student/kernel is float32\[8, 3\], expected bfloat16\[8, 3\]",
        ),
        (
            lambda: make_state(extra=[("more", jnp.ones(2))]),
            "params/clip_network/more is not in it",
        ),
    ],
)
def test_the_error_for_another_state_names_the_array(saved, state, message):
    folder, *_ = saved
    with checkpoint.open_manager(folder) as manager:
        with pytest.raises(ValueError, match=f"checkpoint 4 in .*{message}"):
            checkpoint.restore(manager, 4, state=like(state()), replay=make_replay())


def test_a_state_with_fewer_arrays_than_the_checkpoint_raises(saved):
    folder, state, _ = saved
    smaller = dataclasses.replace(state, params={"student": state.params["student"]})
    with checkpoint.open_manager(folder) as manager:
        with pytest.raises(ValueError, match="checkpoint 4 in .* does not fit"):
            checkpoint.restore(manager, 4, state=like(smaller), replay=make_replay())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 4), r"earlier_responses is bool\[3, 4\], expected bool\[5, 4\]"),
        ((3, 6), r"earlier_responses is bool\[3, 4\], expected bool\[3, 6\]"),
    ],
)
def test_the_error_for_a_buffer_of_another_size_names_the_array(saved, sizes, message):
    folder, state, _ = saved
    with checkpoint.open_manager(folder) as manager:
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(
                manager, 4, state=like(state), replay=make_replay(*sizes)
            )


def test_a_missing_step_raises(saved):
    folder, state, replay = saved
    with checkpoint.open_manager(folder) as manager:
        with pytest.raises(ValueError, match="checkpoint 9 in .*missing"):
            checkpoint.restore(manager, 9, state=like(state), replay=replay)


def test_an_existing_step_is_not_overwritten(saved):
    folder, state, replay = saved
    other = dataclasses.replace(state, step=jnp.int32(99))
    with checkpoint.open_manager(folder) as manager:
        with pytest.raises(ValueError, match="checkpoint 4 in .* exists"):
            checkpoint.save(manager, 4, state=other, host={}, replay=replay)
        restored, host, _ = checkpoint.restore(
            manager, 4, state=like(state), replay=make_replay()
        )
    assert int(restored.step) == 4 and host == HOST


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    tree = {"params": {"a": jnp.zeros(2)}}
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, state=tree, host={}, replay=make_replay())
        assert manager.all_steps() == [2, 3]


@pytest.mark.parametrize(
    ("metric", "kept"), [("valid/loss", [2, 5]), ("eval/rouge_l", [3, 5])]
)
def test_the_best_checkpoint_is_kept_beside_the_latest(tmp_path, metric, kept):
    """The lowest loss, or the highest score; step 1 and the last have no value."""
    values = {2: 0.5, 3: 0.9, 4: 0.7}
    for steps in ((1, 2), (3, 4, 5)):  # a manager that is opened again has them too
        with checkpoint.open_manager(tmp_path, keep=1, best_metric=metric) as manager:
            for step in steps:
                checkpoint.save(
                    manager,
                    step,
                    state={"x": jnp.ones(2)},
                    host=HOST,
                    replay=make_replay(),
                    metrics={metric: values[step]} if step in values else None,
                )
            remaining = sorted(manager.all_steps())
    assert remaining == kept
    assert checkpoint.best_step(tmp_path, metric) == kept[0]


def test_without_a_value_there_is_no_best_checkpoint(saved, tmp_path):
    for folder in (saved[0], tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no checkpoint .* valid/loss"):
            checkpoint.best_step(folder, "valid/loss")
    assert not (tmp_path / "none").exists()


def test_only_the_parameters_can_be_restored(saved):
    folder, state, _ = saved
    expected = like({"student": state.params["student"]})
    for step in (None, 4):
        params = checkpoint.restore_params(folder, step, expected)
        assert set(params) == {"student"}
        jax.tree.map(
            np.testing.assert_array_equal, params["student"], state.params["student"]
        )


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"kernel": jnp.zeros((3, 8))}, r"kernel is float32\[8, 3\], expected"),
        ({"kernel": jnp.zeros((8, 3), jnp.bfloat16)}, "expected bfloat16"),
        ({"scale": jnp.zeros(3)}, "params/student/scale is not in it"),
    ],
)
def test_the_error_for_other_parameters_names_the_array(saved, leaves, message):
    folder, *_ = saved
    for expected in (like(leaves), jax.eval_shape(lambda: leaves)):
        with pytest.raises(ValueError, match=f"checkpoint 4 in .*{message}"):
            checkpoint.restore_params(folder, None, {"student": expected})


def test_a_missing_checkpoint_raises_and_creates_no_folder(saved, tmp_path):
    folder, *_ = saved
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 9 in .* holds \[4\]"):
        checkpoint.restore_params(folder, 9, {})
    with pytest.raises(FileNotFoundError, match="no checkpoint in .* holds none"):
        checkpoint.restore_params(tmp_path / "typo", None, {})
    assert not (tmp_path / "typo").exists()


def test_only_a_manager_that_writes_removes_unfinished_checkpoints(saved):
    """A reader must not: a run may be writing the unfinished checkpoint."""
    folder, state, _ = saved
    unfinished = folder / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    checkpoint.restore_params(folder, None, like({"student": state.params["student"]}))
    assert unfinished.exists()
    with checkpoint.open_manager(folder) as manager:
        assert manager.all_steps() == [4]
        deadline = time.monotonic() + 10  # orbax removes it in the background
        while unfinished.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not unfinished.exists()
