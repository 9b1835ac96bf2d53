"""MGSR's losses inside google-tunix's own trainers: `make test-tunix`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tunix", reason="google-tunix is not installed: make test-tunix")

import qwix
from flax import nnx
from mgsr_reference import mgsr_means
from tunix.distillation import TrainingConfig
from tunix.distillation.strategies import BaseStrategy
from tunix.models.llama3 import model as llama3

from mgsr_jax.integrations import Objective
from mgsr_jax.integrations import tunix as adapter
from mgsr_jax.integrations._clip_network import clip_network_params
from mgsr_jax.losses import init_clip_network

# What Tunix and qwix call that these versions of jax, optax and flax deprecate.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in (
        "jax.interpreters.pxla.thread_resources is deprecated",
        "optax.global_norm is deprecated",
        r"The 'm.iter_modules\(\)' method is deprecated",
        "'.value' access is now deprecated",
        "'VariableState' was removed",
        "'sharding' is deprecated",
        "`with mesh.` context manager has been deprecated",
    )
]

V, K, WIDTH, S = 11, 5, 6, 8
OBJECTIVE = Objective(num_candidates=K)
TRAINED = ("dac_kl", "sft", "span")
# (prompt, response) lengths. The last row has nothing to learn.
LENGTHS = ((2, 5), (1, 2), (3, 4), (4, 0))


class Tiny(nnx.Module):
    """A causal model: logits at t are a function of the mean of the tokens up to t."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(V, WIDTH, rngs=rngs)
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, V, rngs=rngs)

    def __call__(self, tokens):
        x = jnp.cumsum(self.embed(tokens), axis=1)
        x /= jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        return 3 * self.head(jnp.tanh(self.layer(x)))


def forward(model, input_tokens, **_):
    return model(input_tokens)


def full(seed=0):
    return Tiny(seed)


def lora(seed=0):
    provider = qwix.LoraProvider(module_path="layer", rank=2, alpha=2.0)
    tokens = jnp.zeros((1, S), jnp.int32)
    return qwix.apply_lora_to_model(Tiny(seed), provider, tokens, rngs=nnx.Rngs(seed))


def batch_of(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(S)
    prompt, response = np.array(lengths).T[:, :, None]
    mask = (t >= prompt) & (t < prompt + response)
    return adapter.TrainingInput(
        input_tokens=rng.integers(0, V, mask.shape, np.int32),
        input_mask=mask,
        span_ids=np.where(t % 4 == 3, -1, t // 4 + 0 * prompt).astype(np.int32),
    )


def rows(batch, chosen):
    return dataclasses.replace(
        batch,
        **{
            name: getattr(batch, name)[chosen]
            for name in ("input_tokens", "input_mask", "span_ids")
        },
    )


def strategy(objective=OBJECTIVE, **settings):
    settings = dict(student_forward_fn=forward, teacher_forward_fn=forward) | settings
    return adapter.MgsrStrategy(key=jax.random.key(3), objective=objective, **settings)


def trainer_of(
    student, *, objective=OBJECTIVE, optimizer=None, accumulate=None, **config
):
    return adapter.MgsrDistillationTrainer(
        student,
        Tiny(1),
        strategy(objective),
        optimizer or optax.sgd(0.1),
        TrainingConfig(
            eval_every_n_steps=1, gradient_accumulation_steps=accumulate, **config
        ),
    )


def peft_trainer_of(student, *, optimizer=None, accumulate=None):
    adapter.attach_clip_network(student, jax.random.key(3), num_candidates=K)
    config = TrainingConfig(
        eval_every_n_steps=1, gradient_accumulation_steps=accumulate
    )
    trainer = adapter.MgsrPeftTrainer(student, optimizer or optax.sgd(0.1), config)
    return trainer.with_gen_model_input_fn(
        lambda x: {
            "inputs": adapter.model_inputs(x),
            "teacher_output": x.teacher_output,
        }
    ).with_loss_fn(adapter.peft_loss(forward, objective=OBJECTIVE), has_aux=True)


def log(trainer, name, mode="train"):
    return trainer.metrics_logger.get_metric_history("", name, mode)


def snapshot(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


def moved(before, after):
    """Names of the first level below which something changed."""
    return {
        name
        for name, old in before.items()
        if any(
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(old), jax.tree.leaves(after[name]), strict=True
            )
        )
    }


def expected(batch, student_logits, teacher_logits):
    """By hand: the label of logits at t is the token at t + 1."""
    tokens = batch.input_tokens
    cut = [np.asarray(logits)[:, :-1] for logits in (student_logits, teacher_logits)]
    shifted = (x[:, 1:] for x in (tokens, batch.input_mask, batch.span_ids))
    clip_params = init_clip_network(jax.random.key(3), num_candidates=K)
    return mgsr_means(clip_params, *cut, *shifted)


@pytest.mark.parametrize("make", [full, lora])
def test_the_logged_loss_and_metrics_are_the_references(make):
    student, batch = make(), batch_of()
    want = expected(batch, student(batch.input_tokens), Tiny(1)(batch.input_tokens))
    trainer = trainer_of(student)
    trainer.train([batch])
    for name, value in want.items():
        np.testing.assert_allclose(log(trainer, name), [value], rtol=2e-5, err_msg=name)
    total = sum(want[name] for name in TRAINED)
    np.testing.assert_allclose(log(trainer, "loss"), [total], rtol=2e-5)


@pytest.fixture
def ranks_promoted():
    """As Tunix's models do it and the rig forbids."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("ranks_promoted")
def test_a_model_of_tunixs_own_learns_with_lora():
    def llama(seed):
        config = llama3.ModelConfig(
            num_layers=1,
            vocab_size=V,
            embed_dim=8,
            hidden_dim=16,
            num_heads=2,
            head_dim=4,
            num_kv_heads=1,
            rope_theta=10_000,
            norm_eps=1e-5,
        )
        return llama3.Llama3(config, rngs=nnx.Rngs(seed))

    def inputs(batch):
        # Rows are left-aligned: no token sees the padding that stands behind it.
        causal = jnp.ones((S, S), bool)[None].repeat(len(batch.input_tokens), axis=0)
        return adapter.model_inputs(batch) | {
            "positions": jnp.arange(S)[None] + 0 * batch.input_tokens,
            "attention_mask": jnp.tril(causal),
        }

    def forward(model, input_tokens, positions, attention_mask, **_):
        return model(input_tokens, positions, None, attention_mask)[0]

    provider = qwix.LoraProvider(module_path=".*q_proj", rank=2, alpha=2.0)
    teacher, student = llama(1), llama(0)
    student = qwix.apply_lora_to_model(
        student, provider, **student.get_model_input(), rngs=nnx.Rngs(2)
    )
    before, batch = snapshot(student)["layers"][0]["attn"], batch_of()
    logits = [forward(model, **inputs(batch)) for model in (student, teacher)]
    of = strategy(student_forward_fn=forward, teacher_forward_fn=forward)
    trainer = adapter.MgsrDistillationTrainer(
        student, teacher, of, optax.adam(0.1), TrainingConfig(eval_every_n_steps=1)
    ).with_gen_model_input_fn(inputs)
    trainer.train([batch] * 3)
    for name, value in expected(batch, *logits).items():
        np.testing.assert_allclose(log(trainer, name)[0], value, rtol=2e-5)
    assert log(trainer, "loss")[-1] < log(trainer, "loss")[0]
    assert moved(before, snapshot(student)["layers"][0]["attn"]) == {"q_proj"}
    start = init_clip_network(jax.random.key(3), num_candidates=K)
    assert moved(start, of.clip_params) == {"hidden", "output"}


def test_what_is_not_scored_changes_nothing():
    batch = batch_of()
    end = np.array(LENGTHS).sum(axis=1)[:, None]
    tokens, spans = (
        np.where(np.arange(S) < end, x, (x + 5) % V)
        for x in (batch.input_tokens, batch.span_ids)
    )
    garbage = dataclasses.replace(batch, input_tokens=tokens, span_ids=spans)
    assert np.any(tokens != batch.input_tokens)
    students = [full(), full()]
    trainers = [trainer_of(student) for student in students]
    for trainer, data in zip(trainers, (batch, garbage), strict=True):
        trainer.train([data])
    assert log(trainers[0], "loss") == log(trainers[1], "loss")
    jax.tree.map(np.testing.assert_array_equal, *map(snapshot, students))


@pytest.mark.parametrize("of", [trainer_of, peft_trainer_of])
@pytest.mark.parametrize("make", [full, lora])
def test_student_and_clip_network_train_and_the_teacher_does_not(make, of):
    student, teacher = make(), Tiny(1)
    trainer = of(student)
    batch = batch_of()
    if of is trainer_of:
        trainer.teacher_model = teacher
    else:
        output = teacher(batch.input_tokens)
        batch = dataclasses.replace(batch, teacher_output=output)
    before, teachers = snapshot(student), snapshot(teacher)
    trainer.is_managed_externally = True  # or the end takes the network out
    trainer.train([batch] * 2)
    after = snapshot(student)
    clip = {"mgsr_clip_network"}
    if make is full:
        assert moved(before, after) == {"embed", "layer", "head"} | clip
        assert moved(*(x["mgsr_clip_network"] for x in (before, after))) == {
            "hidden",
            "output",
        }
    else:
        assert moved(before, after) == {"layer"} | clip
        lora_parts = {"kernel_lora_a", "kernel_lora_b"}
        assert moved(before["layer"], after["layer"]) == lora_parts
    assert moved(teachers, snapshot(teacher)) == set()


def test_the_strategy_is_tunixs_and_leaves_the_student_as_it_was():
    student = full()
    parts = set(snapshot(student))
    trainer = trainer_of(student)
    assert isinstance(trainer.strategy, BaseStrategy)
    assert set(snapshot(student)) == parts | {"mgsr_clip_network"}
    trainer.train([batch_of()])
    assert set(snapshot(student)) == parts
    start = init_clip_network(jax.random.key(3), num_candidates=K)
    assert moved(start, trainer.strategy.clip_params) == {"output"}
    with pytest.raises(ValueError, match="before the trainer is made"):
        adapter.detach_clip_network(student)


def test_a_peft_step_is_the_distillation_step():
    students = full(), full()
    batch = batch_of()
    distillation, peft = trainer_of(students[0]), peft_trainer_of(students[1])
    distillation.train([batch])
    output = Tiny(1)(batch.input_tokens)
    peft.train([dataclasses.replace(batch, teacher_output=output)])
    adapter.detach_clip_network(students[1])
    for name in ("loss", *TRAINED, "lower", "upper", "kept_mass"):
        np.testing.assert_allclose(log(peft, name), log(distillation, name), rtol=1e-6)
    close = dict(rtol=1e-5, atol=1e-7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), *map(snapshot, students)
    )


@pytest.mark.parametrize("of", [trainer_of, peft_trainer_of])
def test_ragged_micro_batches_accumulate_exactly(of):
    batch = batch_of()
    batch = dataclasses.replace(batch, teacher_output=Tiny(1)(batch.input_tokens))
    parts = [
        dataclasses.replace(rows(batch, r), teacher_output=batch.teacher_output[r])
        for r in (slice(0, 1), slice(1, 4))
    ]

    def train(batches, accumulate=None):
        student = full()
        trainer = of(student, accumulate=accumulate)
        trainer.is_managed_externally = True
        trainer.train(batches)
        trainer.close()
        return trainer, snapshot(student)

    whole, want = train([batch])
    exact, got = train(adapter.count_accumulated([*parts, parts[0]], 2), 2)
    close = dict(rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), got, want)
    for name in ("loss", *TRAINED, "lower", "kept_mass"):
        np.testing.assert_allclose(log(exact, name), log(whole, name), rtol=1e-5)
    # Without it Tunix takes the mean of the means, which is another step.
    _, biased = train(parts, 2)
    assert not np.allclose(biased["head"]["kernel"], want["head"]["kernel"], **close)


def test_evaluation_is_the_cross_entropy_on_the_labels():
    student, batch = full(), batch_of()
    logits = student(batch.input_tokens)
    want = expected(batch, logits, logits)["sft"]
    trainer = trainer_of(student, optimizer=optax.sgd(0.0))
    trainer.train([batch], [rows(batch, slice(0, 2)), rows(batch, slice(2, 4))])
    # Over tokens, not over batches: once before and once after the step.
    np.testing.assert_allclose(log(trainer, "sft", "eval"), [want, want], rtol=2e-5)


def test_the_clip_network_has_its_own_learning_rate():
    student = full()
    optimizer = adapter.clip_network_optimizer(optax.sgd(0.0), learning_rate=1e-2)
    trainer = trainer_of(student, optimizer=optimizer)
    trainer.is_managed_externally = True
    before = snapshot(student)
    trainer.train([batch_of()])
    after = snapshot(student)
    assert moved(before, after) == {"mgsr_clip_network"}
    step = [x["mgsr_clip_network"]["output"]["bias"] for x in (before, after)]
    # Adam's first step is its learning rate, where there is a gradient.
    np.testing.assert_allclose(np.max(np.abs(step[1] - step[0])), 1e-2, rtol=1e-3)


def test_on_a_mesh_as_on_one_device():
    batch = rows(batch_of(LENGTHS * 2), slice(None))
    one, many = full(), full()
    trainers = trainer_of(one), trainer_of(many)
    trainers[0].train([batch])
    with jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)):
        trainers[1].train([batch])
    for name in ("loss", *TRAINED):
        np.testing.assert_allclose(*(log(t, name) for t in trainers), rtol=1e-5)


@pytest.mark.parametrize("make", [full, lora])
def test_a_checkpoint_brings_the_clip_network_back(make, tmp_path):
    config = dict(checkpoint_root_directory=str(tmp_path))
    student = make()
    trainer = trainer_of(student, **config)
    trainer.train([batch_of()])
    resumed = trainer_of(make(), **config)
    assert resumed.train_steps == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        clip_network_params(resumed.model),
        trainer.strategy.clip_params,
    )


def test_a_span_weight_without_span_ids_is_an_error():
    batch = dataclasses.replace(batch_of(), span_ids=None)
    with pytest.raises(ValueError, match="have no span_ids"):
        trainer_of(full()).train([batch])
