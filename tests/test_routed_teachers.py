"""Several teachers divide the rows of a step: the sum of one step for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
import tiny
from tables import CLIP, COLUMNS, MGSR, PARAMS, ROWS, TEACHER, VOCAB, Table
from tiny import GPT2, LLAMA

from mgsr_jax import losses, models, sharding
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.step_loss import StepLoss, micro_batch_loss
from mgsr_jax.train_step import init_state, make_train_step, make_validation_step

NAMES = ("math", "code")
ROUTE = np.array([1, 0, 0, 1, 1, 0, 0, 1], np.int32)
SORTED = np.argsort(ROUTE, kind="stable")
LENGTHS = ((2, 5), (1, 9), (3, 1), (4, 6), (5, 3), (1, 2), (1, 8), (3, 4))


def take(rows, index):
    return jax.tree.map(lambda leaf: leaf[index], rows)


def routed(rows, route=ROUTE):
    return dataclasses.replace(rows, teacher=jnp.asarray(route))


def recorder():
    """An optimizer that changes nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def step_of(student, teacher, params, teacher_params, split, objective):
    """(loss, gradient, metrics) of one train step over micro-batches."""
    state = init_state(jax.tree.map(jnp.array, params), recorder(), 0)
    step = make_train_step(
        student, teacher, recorder(), objective, vocab_size=tiny.VOCAB, chunk_size=9
    )
    state, metrics = step(state, teacher_params, split)
    loss = metrics.pop("loss").total
    return jax.device_get((loss, state.opt_state, metrics))


@pytest.fixture(scope="module")
def pair():
    """A student and two teachers of other families, widths and depths."""
    student = models.from_config(LLAMA | {"num_hidden_layers": 1})
    gpt2 = {"n_embd": 24, "n_layer": 1, "initializer_range": 0.3}
    teachers = (
        models.from_config(GPT2 | gpt2),
        models.from_config(LLAMA | {"hidden_size": 32}),
    )
    own = jax.jit(student.init)(jax.random.key(0))
    params = {"student": own, "clip_network": CLIP}
    keys = jax.random.key(1), jax.random.key(2)
    inits = tuple(jax.jit(t.init)(key) for t, key in zip(teachers, keys, strict=True))
    return student, params, RoutedTeachers(NAMES, teachers, (0, 1)), inits


PARTS = {
    "token": Objective(sft=0.0, span=0.0, divergence="reverse_kl"),
    "learned limits": Objective(sft=0.0, span=0.0, num_candidates=6),
    "span": Objective(sft=0.0, token=0.0),
    "drifting": Objective(
        sft=0.0,
        span=0.0,
        divergence="forward_kl",
        token_weights="discrepancy",
        weight_gain=2.0,
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("part", "parts"),
    [("token", 1), ("token", 4), ("learned limits", 2), ("span", 1), ("drifting", 2)],
)
def test_a_step_of_two_teachers_is_the_sum_of_a_step_for_each(pair, part, parts):
    """Each is a mean over its own tokens, so the sum is weighted by their numbers."""
    (student, params, teacher, inits), objective = pair, PARTS[part]
    rows = tiny.complete(LENGTHS)
    size = len(LENGTHS) // parts
    order = np.arange(8) if parts == 1 else SORTED  # mixed, or one teacher in each
    batches = [order[i * size : (i + 1) * size] for i in range(parts)]
    split = tuple(take(routed(rows), batch) for batch in batches)
    loss, grads, metrics = step_of(student, teacher, params, inits, split, objective)
    name = "span" if part == "span" else objective.divergence
    shares, losses_, gradients = [], [], []
    for i, model in enumerate(teacher.models):
        own = take(rows, np.flatnonzero(i == ROUTE))
        alone = step_of(student, model, params, inits[i], (own,), objective)
        shares.append(alone[2][name].count / metrics[name].count)
        losses_.append(alone[0])
        gradients.append(alone[1])
        if name != "span":
            by_name = metrics[f"{name}/{NAMES[i]}"]
            assert by_name.count == alone[2][name].count > 0
            np.testing.assert_allclose(by_name.total, alone[2][name].total, rtol=1e-6)
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(loss, np.dot(shares, losses_), rtol=1e-6)
    want = jax.tree.map(lambda *g: np.tensordot(shares, g, 1), *gradients)
    assert_close(grads, want)


def assert_close(got, want, rtol=1e-6):
    """Every element to `rtol` of itself, or of the gradient's norm but at most of 1."""
    norm = float(optax.tree.norm(want))
    assert 0.01 < norm < 10

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * min(norm, 1))

    jax.tree.map(close, got, want)


@pytest.mark.exhaustive
def test_the_whole_objective_is_the_sum_with_the_weights_of_the_whole_step(pair):
    """Cross-entropy, DAC-KL and span together, on rows of the data and of samples."""
    student, params, teacher, inits = pair
    truth = jnp.arange(8) % 3 > 0
    rows = dataclasses.replace(tiny.complete(LENGTHS), ground_truth=truth)
    weights = position_weights(rows, MGSR)

    def run(teacher, teacher_params, index):
        spec = StepLoss(student, teacher, MGSR, tiny.VOCAB, chunk_size=9)
        own = take(routed(rows), index), take(weights, index)

        def loss(params):
            return micro_batch_loss(params, teacher_params, *own, spec=spec)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, metrics), grads = run(teacher, inits, np.arange(8))
    alone = [
        run(model, inits[i], np.flatnonzero(i == ROUTE))
        for i, model in enumerate(teacher.models)
    ]
    np.testing.assert_allclose(loss, sum(x[0][0] for x in alone), rtol=1e-6)
    assert_close(grads, jax.tree.map(jnp.add, *(x[1] for x in alone)))
    for name in ("sft", "dac_kl", "span", "kept_mass"):
        total = sum(x[0][1][name].total for x in alone)
        np.testing.assert_allclose(metrics[name].total, total, rtol=2e-6)


def tables_of(*seeds):
    return tuple(tables.logits(seed) for seed in seeds)


TWO = RoutedTeachers(NAMES, (Table("a"), Table("b")), (0, 1))


def evaluate(teacher, params, rows, objective=MGSR):
    return jax.device_get(tables.values(PARAMS, params, rows, objective, teacher))


@pytest.mark.parametrize("objective", [MGSR, PARTS["drifting"]], ids=["mgsr", "drift"])
def test_each_row_has_the_logits_of_its_own_teacher(objective):
    """Against one teacher whose table holds both teachers' rows."""
    first, second = tables_of(1, 4)
    chosen = jnp.where(ROUTE[:, None, None] == 0, first["logits"], second["logits"])
    want = evaluate(Table("t"), {"logits": chosen}, ROWS, objective)
    loss, metrics = evaluate(TWO, (first, second), routed(ROWS), objective)
    assert loss == want[0]
    for name, value in want[1].items():
        assert metrics[name] == value, name
    name = objective.divergence
    parts = [metrics[f"{name}/{teacher}"] for teacher in NAMES]
    np.testing.assert_allclose(sum(p.total for p in parts), want[1][name].total, 1e-6)
    swapped, _ = evaluate(TWO, (second, first), routed(ROWS), objective)
    assert abs(swapped - loss) > 1e-3


def test_two_names_may_share_one_model():
    both = RoutedTeachers(NAMES, (Table("a"),), (0, 0))
    loss, metrics = evaluate(both, (TEACHER,), routed(ROWS))
    want, want_metrics = evaluate(Table("a"), TEACHER, ROWS)
    assert loss == want and metrics["dac_kl"] == want_metrics["dac_kl"]
    counts = [metrics[f"dac_kl/{name}"].count for name in NAMES]
    assert min(counts) > 0 and sum(counts) == want_metrics["dac_kl"].count


def test_rows_that_fill_up_a_batch_have_no_teacher():
    """The last two rows have no scored position."""
    route = np.where(np.arange(8) < 6, ROUTE, -1)
    tables_ = tables_of(1, 4)
    loss, _ = evaluate(TWO, tables_, routed(ROWS, route))
    assert loss == evaluate(TWO, tables_, routed(ROWS))[0]
    hidden = TWO.forward(tables_, ROWS.tokens[:, :-1], jnp.asarray(route))
    assert (hidden.model[6:] == -1).all() and (hidden.model[:6] >= 0).all()
    logits = TWO.unembed(TWO.head_params(tables_), hidden)
    assert not logits[6:].any()
    np.testing.assert_array_equal(logits[0], tables_[1]["logits"][0])


runs: list[str] = []


@dataclasses.dataclass(frozen=True)
class Counted(Table):
    """Records when it really runs, not when it is traced."""

    def forward(self, params, tokens, *, positions=None, cache=None):
        jax.debug.callback(lambda: runs.append(self.name))
        return super().forward(params, tokens)


def test_a_model_runs_only_on_micro_batches_with_rows_of_its_own():
    teacher = RoutedTeachers(NAMES, (Counted("a"), Counted("b")), (0, 1))
    objective = PARTS["token"]
    step = make_train_step(Table(), teacher, optax.sgd(0.1), objective)
    for order, expected in ((SORTED, "aabb"), (np.arange(8), "aaaabbbb")):
        batches = np.split(order, 4)
        split = tuple(take(routed(ROWS), batch) for batch in batches)
        state = init_state(jax.tree.map(jnp.array, PARAMS), optax.sgd(0.1), 0)
        runs.clear()
        jax.block_until_ready(step(state, tables_of(1, 4), split))
        jax.effects_barrier()
        assert "".join(sorted(runs)) == expected


def test_validation_has_the_loss_of_each_teacher():
    step = make_validation_step(Table(), TWO, PARTS["token"], vocab_size=VOCAB)
    metrics = step(PARAMS, tables_of(1, 4), routed(ROWS))
    for name in ("reverse_kl", "teacher_sft"):
        parts = [metrics[f"{name}/{teacher}"] for teacher in NAMES]
        assert sum(part.count for part in parts) == metrics[name].count > 0
        total = sum(part.total for part in parts)
        np.testing.assert_allclose(total, metrics[name].total, rtol=1e-6)


@pytest.mark.slow
def test_a_teacher_that_reads_another_prompt_is_routed_too():
    """Rows with one more token of prompt; the table shifts with it."""
    wide = [
        {"logits": jnp.pad(t["logits"], ((0, 0), (1, 0), (0, 0)))}
        for t in tables_of(1, 4)
    ]
    read = dataclasses.replace(
        ROWS,
        tokens=jnp.pad(ROWS.tokens, ((0, 0), (0, 1))),
        earlier_responses=jnp.pad(ROWS.earlier_responses, ((0, 0), (0, 1))),
        prompt_lengths=ROWS.prompt_lengths + 1,
        lengths=ROWS.lengths + 1,
    )
    objective = PARTS["token"]
    weights = position_weights(ROWS, objective)
    arguments = PARAMS, tuple(wide), routed(ROWS), weights
    spec = StepLoss(Table(), TWO, objective, VOCAB)
    loss, _ = micro_batch_loss(*arguments, spec=spec, teacher_outputs=read)
    want, _ = evaluate(TWO, tables_of(1, 4), routed(ROWS), objective)
    np.testing.assert_allclose(loss, want, rtol=2e-6)


def test_rows_that_name_no_teacher_are_an_error():
    with pytest.raises(ValueError, match=r"Rows.teacher is None.*\(math, code\)"):
        evaluate(TWO, tables_of(1, 4), ROWS)


def test_teachers_with_other_numbers_of_columns_are_an_error():
    narrow = {"logits": TEACHER["logits"][..., :VOCAB]}
    with pytest.raises(ValueError, match=rf"\[{COLUMNS}, {VOCAB}\] columns"):
        evaluate(TWO, (TEACHER, narrow), routed(ROWS))


def on_mesh(mesh, rows, parts):
    return tuple(
        sharding.put_batch(mesh, jax.tree.map(np.asarray, take(rows, part)))
        for part in np.split(np.arange(len(rows.lengths)), parts)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("objective", [MGSR, PARTS["drifting"]], ids=["mgsr", "drift"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_a_mesh_does_not_change_the_gradient(pair, sizes, objective):
    """Two micro-batches: one of the first teacher only, the other of both."""
    student, params, teacher, inits = pair
    tensor = sizes[2]
    student = dataclasses.replace(student, tensor=tensor)
    parts = tuple(dataclasses.replace(m, tensor=tensor) for m in teacher.models)
    teacher = dataclasses.replace(teacher, models=parts)
    if not objective.needs_clip_network:
        params = {"student": params["student"]}
    rows = routed(tiny.complete([*LENGTHS, *LENGTHS]), np.sort([*ROUTE, *[0] * 8]))
    one = step_of(student, teacher, params, inits, (rows,), objective)

    mesh = sharding.make_mesh(*sizes)
    rules = student.partition_rules
    places = sharding.shardings(mesh, rules, params["student"])
    placed = dict(params, student=jax.device_put(params["student"], places))
    if "clip_network" in params:
        replicated = sharding.replicated(mesh)
        placed["clip_network"] = jax.device_put(params["clip_network"], replicated)
    inits = tuple(
        jax.device_put(own, sharding.shardings(mesh, model.partition_rules, own))
        for own, model in zip(inits, parts, strict=True)
    )
    with jax.set_mesh(mesh):
        split = on_mesh(mesh, rows, 2)
        loss, grads, metrics = step_of(
            student, teacher, placed, inits, split, objective
        )
    np.testing.assert_allclose(loss, one[0], rtol=1e-6)
    assert_close(grads, one[1], rtol=16 * np.finfo(np.float32).eps)
    for name in (f"{objective.divergence}/{teacher}" for teacher in NAMES):
        assert metrics[name].count == one[2][name].count > 0
        np.testing.assert_allclose(metrics[name].total, one[2][name].total, rtol=1e-6)


def test_a_biased_head_is_not_projected_for_other_teachers_tokens():
    """The logits of a chunk without a teacher's tokens stay those of the others."""
    logits = jnp.arange(6.0).reshape(2, 3)

    @dataclasses.dataclass(frozen=True)
    class Headed(Table):
        def unembed(self, head, hidden):
            return losses.project(hidden, jnp.eye(3)) + 100.0

    teachers = RoutedTeachers(NAMES, (Table(), Headed()), (0, 1))
    params = ({"logits": logits[:, None]}, {"logits": -logits[:, None]})
    rows = jnp.arange(2)[:, None]
    for route in ([0, 0], [0, 1], [1, 1]):
        hidden = teachers.forward(params, rows, jnp.asarray(route))
        got = teachers.unembed(({}, {}), hidden)[:, 0]
        want = [logits[i] if r == 0 else 100 - logits[i] for i, r in enumerate(route)]
        np.testing.assert_allclose(got, np.stack(want))
