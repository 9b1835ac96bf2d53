"""MGSR's strategy driven as MaxText 0.2.5's trainer calls it.

MaxText wants Python 3.12 and a long list of packages, so a module of this file's own
stands in its place; where MaxText is installed, the two are compared.
"""

import abc
import dataclasses
import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from mgsr_reference import mgsr_means

from mgsr_jax.integrations import Objective
from mgsr_jax.losses import init_clip_network

PATH = "maxtext.trainers.post_train.distillation.distillation_utils"
try:
    real = importlib.import_module(PATH)
except ImportError:
    real = None

# The models' heads have two columns more than the tokenizer has tokens.
B, T, V, TOKENS, WIDTH, K = 3, 6, 11, 9, 5, 4
END = PADDING = 0


class DistillationStrategy(abc.ABC):
    """What MaxText's trainer asks of a strategy."""

    def __init__(
        self, student_forward_fn, teacher_forward_fn, vocab_size, pad_id=0, **kwargs
    ):
        self.student_forward_fn = student_forward_fn
        self.teacher_forward_fn = teacher_forward_fn
        self.vocab_size = vocab_size
        self.pad_id = pad_id

    @abc.abstractmethod
    def compute_loss(self, student_output, teacher_output, labels, step=None): ...

    @abc.abstractmethod
    def compute_eval_loss(self, student_output, labels): ...

    @abc.abstractmethod
    def create_labels(self, targets, targets_segmentation=None, **kwargs): ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillationForwardOutput:
    """What its forward functions return, and what it makes of saved top-k logits."""

    logits: jax.Array
    out_projection_activations: jax.Array | None = None
    moe_lb_loss: jax.Array | None = None
    top_k_indices: jax.Array | None = None


@pytest.fixture(scope="module")
def adapter():
    """The adapter on the stand-in, which leaves no trace behind."""
    module = types.ModuleType(PATH)
    module.DistillationStrategy = DistillationStrategy
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, PATH, module)
        patch.delitem(sys.modules, "mgsr_jax.integrations.maxtext", raising=False)
        yield importlib.import_module("mgsr_jax.integrations.maxtext")
    sys.modules.pop("mgsr_jax.integrations.maxtext", None)


class Tiny(nnx.Module):
    def __init__(self, seed, rank=None):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, V, rngs=rngs)
        self.lora = nnx.LoRA(WIDTH, rank, V, rngs=rngs) if rank else None

    def __call__(self, tokens):
        x = self.embed(tokens)
        logits = self.head(x)
        if self.lora is not None:
            logits += self.lora(x)
        return 4 * logits


def forward(
    model,
    input_tokens,
    positions,
    attention_mask,
    decoder_segment_ids=None,
    cache=None,
    **kwargs,
):
    """The signature of what MaxText's create_forward_fn returns."""
    return DistillationForwardOutput(logits=model(input_tokens))


def batch_of():
    """Targets are shifted already; segmentation 0 is a prompt or padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, TOKENS, (B, T + 1), np.int32)
    segmentation = np.array(
        [[0, 0, 1, 1, 1, 0], [0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0]], np.int32
    )
    tokens[0, 5] = END  # the last target of row 0 that is scored
    tokens[0, 6] = PADDING
    return jax.tree.map(
        jnp.asarray,
        dict(
            input_tokens=tokens[:, :-1],
            positions=np.tile(np.arange(T), (B, 1)),
            targets=tokens[:, 1:],
            targets_segmentation=segmentation,
        ),
    )


def call(forward_fn, model, batch):
    return forward_fn(
        model=model,
        input_tokens=batch["input_tokens"],
        positions=batch["positions"],
        attention_mask=None,
        decoder_segment_ids=None,
        decoder_target_tokens=batch["targets"],
        decoder_target_mask=batch["targets_segmentation"],
        cache=None,
    )


def labels_of(strategy, batch):
    return strategy.create_labels(
        batch["targets"], targets_segmentation=batch["targets_segmentation"]
    )


def value_and_gradient(strategy, student, teacher_output, batch, wrt, step):
    """A training step up to the optimizer: the student is split, copied and merged."""
    graph, trained, rest = nnx.split(student, wrt, ...)

    def loss_fn(trained):
        model = nnx.merge(graph, trained, rest, copy=True)
        output = call(strategy.student_forward_fn, model, batch)
        labels = labels_of(strategy, batch)
        return strategy.compute_loss(output, teacher_output, labels, step=step)

    return jax.value_and_grad(loss_fn, has_aux=True)(trained)


def student_of(adapter, rank=None):
    student = Tiny(0, rank)
    adapter.attach_clip_network(student, jax.random.key(3), num_candidates=K)
    return student


def strategy_of(adapter, student_forward=forward, **settings):
    return adapter.MgsrStrategy(student_forward, forward, TOKENS, PADDING, **settings)


def run(adapter, teacher_output=None, step=None, student_forward=forward, **settings):
    """(loss, metrics) of one batch."""
    batch, student = batch_of(), student_of(adapter)
    strategy = strategy_of(adapter, student_forward, **settings)
    if teacher_output is None:
        teacher_output = call(strategy.teacher_forward_fn, Tiny(1), batch)
    output = call(strategy.student_forward_fn, student, batch)
    labels = labels_of(strategy, batch)
    return strategy.compute_loss(output, teacher_output, labels, step=step)


def expected(teacher_logits=None):
    batch = batch_of()
    if teacher_logits is None:
        teacher_logits = Tiny(1)(batch["input_tokens"])
    return mgsr_means(
        init_clip_network(jax.random.key(3), num_candidates=K),
        Tiny(0)(batch["input_tokens"]),
        teacher_logits,
        batch["targets"],
        batch["targets_segmentation"] != 0,
        vocab_size=TOKENS,
    )


def check(got, want):
    """`got` is what compute_loss returns, `want` the reference's means."""
    loss, metrics = got
    total = want["dac_kl"] + want["sft"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["distill/total_loss"], (total, 1), rtol=1e-5)
    names = {"sft": "hard_loss"}
    for name, mean in want.items():
        total, count = metrics[f"distill/{names.get(name, name)}"]
        assert count == 8
        np.testing.assert_allclose(total / count, mean, rtol=1e-5, err_msg=name)


def test_labels_are_integers_and_a_mask_from_the_segmentation_alone(adapter):
    batch = batch_of()
    labels = labels_of(strategy_of(adapter), batch)
    np.testing.assert_array_equal(labels.tokens, batch["targets"])
    assert labels.tokens.dtype == jnp.int32
    # The end of sequence has the id of padding and is scored all the same.
    assert labels.tokens[0, 4] == PADDING and labels.where[0, 4]
    np.testing.assert_array_equal(labels.where, batch["targets_segmentation"] != 0)


def test_targets_without_a_segmentation_are_an_error(adapter):
    with pytest.raises(ValueError, match="targets_segmentation is None; expected"):
        strategy_of(adapter).create_labels(batch_of()["targets"])


def test_the_loss_and_the_metrics_are_the_references(adapter):
    check(run(adapter), expected())


def test_saved_top_k_logits_are_a_teacher_of_those_classes_alone(adapter):
    logits = Tiny(1)(batch_of()["input_tokens"])[..., :TOKENS]
    top, indices = jax.lax.top_k(logits, K + 1)
    saved = DistillationForwardOutput(top, top_k_indices=indices)
    others = np.full((B, T, V), -np.inf)
    np.put_along_axis(others, np.asarray(indices), np.asarray(top), axis=-1)
    check(run(adapter, saved), expected(others))


def test_the_loss_of_a_mixture_of_experts_is_added(adapter):
    def with_experts(*args, **kwargs):
        return dataclasses.replace(forward(*args, **kwargs), moe_lb_loss=jnp.ones(()))

    plain, _ = run(adapter)
    loss, metrics = run(adapter, student_forward=with_experts)
    np.testing.assert_allclose(loss, plain + 1, rtol=1e-6)
    assert metrics["distill/moe_lb_loss"] == (1, 1)
    assert metrics["distill/total_loss"][0] == loss


def test_a_schedule_reads_the_traced_step(adapter):
    def schedule(step):
        return {"token": step / 10, "sft": 1 - step / 10}

    @jax.jit
    def loss(step):
        return run(adapter, step=step, schedule=schedule)[0]

    want = expected()
    for step in (0, 3):
        mixed = step / 10 * want["dac_kl"] + (1 - step / 10) * want["sft"]
        np.testing.assert_allclose(loss(jnp.int32(step)), mixed, rtol=1e-5)
    with pytest.raises(ValueError, match="a schedule needs the step, got None"):
        run(adapter, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_trains_the_student_and_the_clip_network(adapter, rank):
    student, batch = student_of(adapter, rank), batch_of()
    wrt = nnx.LoRAParam if rank else nnx.Param
    optimizer = nnx.Optimizer(
        student, adapter.clip_network_optimizer(optax.sgd(0.1)), wrt=wrt
    )
    strategy = strategy_of(adapter)
    teacher_output = call(strategy.teacher_forward_fn, Tiny(1), batch)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(student)))

    @nnx.jit
    def step(student, optimizer):
        (loss, metrics), gradients = value_and_gradient(
            strategy, student, teacher_output, batch, wrt, jnp.int32(0)
        )
        optimizer.update(student, gradients)
        return loss, metrics

    first, metrics = step(student, optimizer)
    second, _ = step(student, optimizer)
    assert second < first and metrics["distill/total_loss"] == (first, 1)
    after = nnx.to_pure_dict(nnx.state(student))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert changed["mgsr_clip_network"] == {
        "hidden": {"kernel": True, "bias": True},
        "output": {"kernel": True, "bias": True},
    }
    own = not rank  # with LoRA, the student's own weights are frozen
    assert changed["embed"] == {"embedding": own}
    assert changed["head"] == {"kernel": own, "bias": own}
    if rank:
        assert changed["lora"] == {"lora_a": True, "lora_b": True}


def test_the_clip_network_has_its_own_learning_rate(adapter):
    student = student_of(adapter)
    params = nnx.state(student, nnx.Param)
    optimizer = adapter.clip_network_optimizer(optax.sgd(0.5), learning_rate=1e-2)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    updates = nnx.to_pure_dict(updates)
    # Adam's first step is its learning rate, sgd's is rate times gradient.
    for name, part in updates.items():
        size = 1e-2 if name == "mgsr_clip_network" else 0.5
        for update in jax.tree.leaves(part):
            np.testing.assert_allclose(update, -size, rtol=1e-5)


def test_evaluation_is_the_cross_entropy_on_the_labels(adapter):
    batch, student = batch_of(), student_of(adapter)
    strategy = strategy_of(adapter)
    output = call(strategy.student_forward_fn, student, batch)
    labels = labels_of(strategy, batch)
    loss, metrics = strategy.compute_eval_loss(output, labels)
    want = expected()["sft"]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["eval/hard_loss"], (8 * want, 8), rtol=1e-5)


def test_the_clip_network_goes_in_and_out_once(adapter):
    student = Tiny(0)
    before = nnx.to_pure_dict(nnx.state(student))
    batch, strategy = batch_of(), strategy_of(adapter)
    with pytest.raises(ValueError, match="the student has no clip network; call"):
        call(strategy.student_forward_fn, student, batch)
    adapter.attach_clip_network(student, jax.random.key(3), num_candidates=K)
    with pytest.raises(ValueError, match="has a clip network already"):
        adapter.attach_clip_network(student, jax.random.key(3))
    start = init_clip_network(jax.random.key(3), num_candidates=K)
    got = adapter.detach_clip_network(student)
    jax.tree.map(np.testing.assert_array_equal, got, start)
    after = nnx.to_pure_dict(nnx.state(student))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_span_ids_are_not_handed_over(adapter):
    with pytest.raises(ValueError, match="the labels have no span_ids"):
        run(adapter, objective=Objective(span=1.0))


needs_maxtext = pytest.mark.skipif(
    real is None, reason="maxtext is not installed (it wants Python 3.12)"
)


@pytest.fixture
def real_adapter(monkeypatch):
    monkeypatch.setitem(sys.modules, PATH, real)
    monkeypatch.delitem(sys.modules, "mgsr_jax.integrations.maxtext", raising=False)
    adapter = importlib.import_module("mgsr_jax.integrations.maxtext")
    assert issubclass(adapter.MgsrStrategy, real.DistillationStrategy)
    yield adapter
    sys.modules.pop("mgsr_jax.integrations.maxtext")


def real_forward(model, input_tokens, **kwargs):
    return real.DistillationForwardOutput(logits=model(input_tokens))


@needs_maxtext
def test_the_stand_in_is_as_maxtext_is():
    def arguments(function):
        return [
            (x.name, x.kind) for x in inspect.signature(function).parameters.values()
        ]

    for name in ("__init__", "create_labels", "compute_loss", "compute_eval_loss"):
        ours, theirs = (
            arguments(getattr(strategy, name))
            for strategy in (DistillationStrategy, real.DistillationStrategy)
        )
        assert ours == theirs, name
    ours, theirs = (
        [field.name for field in dataclasses.fields(record)]
        for record in (DistillationForwardOutput, real.DistillationForwardOutput)
    )
    assert ours == theirs


def real_batches(offline):
    """Two equal batches as MaxText's input pipeline and its iterator make them."""
    batch = batch_of()
    inputs, positions = batch.pop("input_tokens"), batch.pop("positions")
    batch |= dict(inputs=inputs, inputs_position=positions)
    if offline:
        top = jax.lax.top_k(Tiny(1)(inputs)[..., :TOKENS], TOKENS)
        batch |= zip(("top_k_logits", "top_k_indices"), top, strict=True)
    return real.MaxTextToTunixIterator(iter([batch, batch]))


def real_inputs(batch):
    """What MaxText's train_distill hands to its trainer."""
    names = ("input_tokens", "positions", "targets", "targets_segmentation")
    inputs = {name: getattr(batch, name) for name in names}
    if batch.top_k_logits is not None:
        inputs["teacher_output"] = real.DistillationForwardOutput(
            logits=batch.top_k_logits, top_k_indices=batch.top_k_indices
        )
    return inputs


@needs_maxtext
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MaxText's and Tunix's own
@pytest.mark.parametrize("offline", [False, True])
def test_maxtexts_own_trainer_trains_and_logs(real_adapter, monkeypatch, offline):
    train_distill = importlib.import_module(f"{PATH.rpartition('.')[0]}.train_distill")
    # Counted from a configuration of MaxText's models, which Tiny has none of.
    tflops = "calculate_distillation_tflops_per_device"
    monkeypatch.setattr(real, tflops, lambda *_, **__: (1, 1, 1))
    student = student_of(real_adapter)
    trainer = train_distill.MaxTextDistillationTrainer(
        model=train_distill.ModelBundle(None if offline else Tiny(1), student),
        strategy=real_adapter.MgsrStrategy(real_forward, real_forward, TOKENS),
        optimizer=real_adapter.clip_network_optimizer(optax.sgd(0.1)),
        training_config=train_distill.peft_trainer.TrainingConfig(eval_every_n_steps=9),
        student_config=None,
        teacher_config=None,
        is_offline=offline,
    )
    trainer._has_aux = trainer.is_managed_externally = True
    trainer.checkpoint_manager = real.tunix_checkpoint_manager.CheckpointManager(None)
    trainer.with_gen_model_input_fn(real_inputs)
    trainer.train(real_batches(offline))
    trainer._write_train_metrics()

    def log(name):
        return trainer.metrics_logger.get_metric_history("", name, "train")

    want = expected()
    for name, logged in (("dac_kl", "dac_kl"), ("sft", "hard_loss")):
        np.testing.assert_allclose(log(f"distill/{logged}")[0], want[name], rtol=1e-5)
    first, second = log("loss")
    assert second < first
    start = init_clip_network(jax.random.key(3), num_candidates=K)
    clip_params = real_adapter.detach_clip_network(student)
    for before, after in zip(*map(jax.tree.leaves, (start, clip_params)), strict=True):
        assert np.any(before != after)
