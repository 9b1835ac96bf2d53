"""A step of every recipe: its rows and its loss against a few lines of numpy.

The expected method of each recipe is written down here a second time, without its file.
"""

import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from rich.console import Console

from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    row_keys,
    sample,
)
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.initial_state import load_state, load_teacher
from mgsr_jax.training.inputs import prepare
from mgsr_jax.training.programs import make_programs
from mgsr_jax.training.recipes import recipe_names
from mgsr_jax.training.run_rows import make_row_source
from mgsr_jax.typing import CLIP_NETWORK, STUDENT

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]

WIDTH, STEPS, EOS = 56, 6, 0


class Method(NamedTuple):
    """A method: weights, name and equation of its token loss, rows.

    `samples` is the probability that a step generates; "replay": the adaptive schedule.
    """

    weights: tuple[float, float, float]  # cross-entropy, token, span
    name: str = ""
    equation: object = None  # of (log p, log q) at a position
    samples: float | str = 0.0
    intervention: str = "none"
    sample_name: str = ""  # token loss of the student's rows, if it has its own
    sample_equation: object = None
    sampling: Sampling = ANCESTRAL


def forward_kl(p, q):
    return np.sum(np.exp(p) * (p - q))


def reverse_kl(p, q):
    return np.sum(np.exp(q) * (q - p))


def jensen_shannon(p, q):
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    return (forward_kl(p, m) + forward_kl(q, m)) / 2


def skewed_forward_kl(p, q):
    return forward_kl(p, np.log(0.1 * np.exp(p) + 0.9 * np.exp(q)))


def skewed_reverse_kl(p, q):
    return forward_kl(q, np.log(0.9 * np.exp(p) + 0.1 * np.exp(q)))


def alpha_beta(p, q):
    own = (0.2 * np.exp(0.9 * p) + 0.7 * np.exp(0.9 * q)) / 0.9
    return -np.sum(np.exp(0.2 * p + 0.7 * q) - own) / 0.14


OF_THE_TEACHER = ("seqkd", "distillm2")
ONLY_TOKEN = (0.0, 1.0, 0.0)
METHODS = {
    "sft": Method((1.0, 0.0, 0.0)),
    "seqkd": Method((1.0, 0.0, 0.0)),
    "kd": Method(ONLY_TOKEN, "forward_kl", forward_kl),
    "abkd": Method(ONLY_TOKEN, "alpha_beta_divergence", alpha_beta),
    "imitkd": Method(ONLY_TOKEN, "forward_kl", forward_kl, 0.5),
    "gkd": Method(ONLY_TOKEN, "jensen_shannon", jensen_shannon, 0.5),
    "minillm": Method((1.0, 1.0, 0.0), "reverse_kl", reverse_kl, 1.0),
    "opd": Method(ONLY_TOKEN, "reverse_kl", reverse_kl, 1.0),
    "distillm": Method(ONLY_TOKEN, "skewed_forward_kl", skewed_forward_kl, "replay"),
    "opsd": Method(
        ONLY_TOKEN,
        "jensen_shannon",
        jensen_shannon,
        1.0,
        sampling=Sampling(1.1, 20, 0.95),
    ),
    "distillm2": Method(
        ONLY_TOKEN,
        "skewed_forward_kl",
        skewed_forward_kl,
        1.0,
        sample_name="skewed_reverse_kl",
        sample_equation=skewed_reverse_kl,
    ),
    "skd": Method(ONLY_TOKEN, "forward_kl", forward_kl, 1.0, "skd"),
    "adaswitch": Method(ONLY_TOKEN, "forward_kl", forward_kl, 1.0, "adaswitch"),
    "mgsr": Method((1.0, 1.0, 1.0), "dac_kl", None, 0.5, "scrg"),
    "mgsr_no_scrg": Method((1.0, 1.0, 1.0), "dac_kl", None, 0.5),
    "mgsr_no_dac_kl": Method((1.0, 1.0, 1.0), "forward_kl", forward_kl, 0.5, "scrg"),
    "mgsr_no_span": Method((1.0, 1.0, 0.0), "dac_kl", None, 0.5, "scrg"),
    "mgsr_no_rollouts": Method((1.0, 1.0, 1.0), "dac_kl"),
}


def test_every_recipe_is_here():
    assert sorted(METHODS) == recipe_names()


class Run:
    """A run of a recipe on the tiny pair, before its first step."""

    def __init__(self, config):
        self.inputs = inputs = prepare(config, console=Console(file=io.StringIO()))
        self.programs = make_programs(
            config,
            inputs.student,
            inputs.teacher,
            mesh=inputs.mesh,
            vocab_size=inputs.vocab_size,
            eos_ids=inputs.eos_ids,
            steps=inputs.steps,
        )
        self.key = jax.random.key(config.seed)
        self.state = load_state(
            config.student,
            inputs.student,
            self.programs,
            mesh=inputs.mesh,
            dtype=jnp.float32,
            seed=config.seed,
        )
        self.params = jax.device_get(self.state.all_params)
        self.teacher_params = None
        if config.teacher is not None:
            self.teacher_params = load_teacher(
                config.teacher, inputs.teacher, mesh=inputs.mesh, dtype="float32"
            )
        self.source = make_row_source(inputs, self.programs.rollout)

    def keys(self, step):
        """Keys of a step: which source it has, rollout, replay."""
        return jax.random.split(jax.random.fold_in(self.key, step), 3)

    def rows(self, step):
        """The step's rows, on the device."""
        key = jax.random.fold_in(self.key, step)
        return self.source.next(
            step, key, self.state.all_params[STUDENT], self.teacher_params
        )

    def logits(self, role, tokens):
        """float64 logits at every position of some rows, over the real vocabulary."""
        model = getattr(self.inputs, role)
        params = self.params[STUDENT] if role == "student" else self.teacher_params
        hidden, _ = jax.jit(model.forward)(params, jnp.asarray(tokens))
        values = jax.jit(model.unembed)(model.head_params(params), hidden)
        return np.asarray(values, np.float64)[..., : self.inputs.vocab_size]

    def log_probs(self, role, tokens):
        values = self.logits(role, tokens)
        return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


@pytest.fixture
def prepare_run(project, tmp_path, monkeypatch, two_devices):
    """Returns `Run` of a recipe's name, made by the command line."""
    configs = []

    def train(config: TrainConfig) -> int:
        """Keep the settings."""
        configs.append(config)
        return 0

    monkeypatch.setitem(COMMANDS, "train", train)

    def make(name, *options):
        command = ["train", "--recipe", name, "--student", str(project / "student")]
        command += ["--output", str(tmp_path / "run"), "--steps", str(STEPS)]
        command += ["--data.train", str(data_of(name, project, tmp_path))]
        command += ["--data.valid", str(data_of(name, project, tmp_path, "valid"))]
        command += ["--data.max_prompt_length", "40", "--data.max_length", str(WIDTH)]
        command += ["--data.cache_dir", str(project / "cache"), "--batch_size", "8"]
        if METHODS[name].weights[1:] != (0.0, 0.0):
            command += ["--teacher", str(project / "teacher")]
        if METHODS[name].name == "dac_kl":
            command += ["--objective.num_candidates", "16"]
        assert main([*command, *options]) == 0
        return Run(configs.pop())

    return make


def data_of(name, project, folder, split="train"):
    """A file of data; for two recipes that of `mgsr generate`, the teacher's text."""
    file = project / f"{split}.jsonl"
    if name not in OF_THE_TEACHER:
        return file
    written = folder / f"{split}.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        command = ["generate", "--model", str(project / "teacher"), "--file", str(file)]
        assert main([*command, "--max_length", "50"]) == 0
    written.write_text(out.getvalue())
    return written


def data_row(tokenizer, record):
    """Prompt and response of a record, as tokens."""
    if "instruction" in record:
        texts = alpaca_prompt(record["instruction"]), record["output"]
    else:  # a line of `mgsr generate`
        texts = record["prompt"], record["response"]
    prompt, response = tokenizer(list(texts)).input_ids
    return prompt, [*response, EOS]


def sampled(run, method, prompt, key, example):
    """A response as tokens: no cache, one row, one token after the other.

    Returns also the positions that the teacher writes.
    """
    width = WIDTH

    def draw(role, tokens, position, stream, round_):
        logits = jnp.asarray(padded_logits(role, tokens)[position - 1], jnp.float32)
        keys = row_keys(key, jnp.asarray([example]), stream, round_)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, position))(keys)
        return int(sample(logits[None], keys, method.sampling)[0])

    def padded_logits(role, tokens):
        row = np.zeros((1, width), np.int32)
        row[0, : len(tokens)] = tokens
        values = run.logits(role, row)[0]
        rows = run.inputs.student.vocab_rows  # noise is drawn for the padding too
        full = np.full((width, rows), -np.inf)
        full[:, : values.shape[1]] = values
        return full

    def unfinished(tokens):
        is_prompt = len(tokens) == len(prompt)
        return len(tokens) < width and (is_prompt or tokens[-1] != EOS)

    def extend(tokens, round_, role="student", stream=STUDENT_STREAM):
        while unfinished(tokens):
            tokens = [*tokens, draw(role, tokens, len(tokens), stream, round_)]
        return tokens

    if method.intervention == "skd":
        tokens, wrote = prompt, []
        while unfinished(tokens):
            i = len(tokens)
            token = draw("student", tokens, i, STUDENT_STREAM, 0)
            if token not in np.argsort(-padded_logits("teacher", tokens)[i - 1])[:25]:
                token = draw("teacher", tokens, i, TEACHER_STREAM, 0)
                wrote.append(i)
            tokens = [*tokens, token]
        return tokens, wrote
    tokens = extend(prompt, 0)
    if method.intervention == "none":
        return tokens, []
    row = np.zeros((1, width), np.int32)
    row[0, : len(tokens)] = tokens
    p, q = (run.log_probs(role, row)[0] for role in ("teacher", "student"))
    d = [forward_kl(p[t - 1], q[t - 1]) for t in range(len(tokens))]
    if method.intervention == "adaswitch":
        ready = range(len(prompt) + 10, len(tokens))
        switches = [t for t in ready if d[t] > 3 * np.mean(d[t - 10 : t])]
        if not switches:
            return tokens, []
        at = switches[0]
        first = draw("teacher", tokens[:at], at, TEACHER_STREAM, 0)
        tokens = extend([*tokens[:at], first], 0, "teacher", TEACHER_STREAM)
        return tokens, list(range(at, len(tokens)))
    best = {}
    for t in range(len(prompt), len(tokens)):
        token = draw("teacher", tokens, t, TEACHER_STREAM, 1)
        if token != tokens[t]:
            best[t] = d[t], token
    if not best:
        return tokens, []
    worst = max(best, key=best.get)
    tokens = [*tokens[:worst], best[worst][1]]
    return (tokens if tokens[-1] == EOS else extend(tokens, 1)), [worst]


def assert_rows(run, method, rows, rollout_key, records):
    """Data rows are the tokenised records, generated rows the student's samples."""
    texts = (data_row(run.inputs.tokenizer, record) for record in records)
    texts = [(x, y) for x, y in texts if len(x) + len(y) <= WIDTH]  # others are dropped
    checked = 0
    for batch in jax.device_get(rows.micro_batches):
        for b, example in enumerate(batch.example.tolist()):
            prompt, response = texts[example]
            row = batch.tokens[b, : batch.lengths[b]].tolist()
            assert batch.prompt_lengths[b] == len(prompt)
            if batch.ground_truth[b]:
                assert row == prompt + response
            elif rows.source == "generate" and checked < 3:  # the loop is slow
                want, want_wrote = sampled(run, method, prompt, rollout_key, example)
                assert row == want
                checked += 1
                wrote = np.asarray(rows.interventions[0].teacher_wrote)[b]
                assert np.flatnonzero(wrote).tolist() == want_wrote
    assert checked or rows.source != "generate"


def behind_own_prompt(run, record, response):
    """float64 logits of the teacher at a response, behind the prompt of OPSD."""
    text = OWN_PROMPT.format(prompt=record["instruction"], reference=record["output"])
    prompt = run.inputs.tokenizer(alpaca_prompt(text)).input_ids
    row = np.array([[*prompt, *response]])
    return run.logits("teacher", row)[0, len(prompt) - 1 : -1]


def expected_metrics(run, method, micro_batches, records):
    """The loss of a step and its parts, in float64, position by position."""
    parts, by_name = {"sft": [], "token": [], "span": []}, {}
    for rows in jax.device_get(micro_batches):
        logits = [run.logits("student", rows.tokens)]
        if run.teacher_params is not None:
            logits.append(run.logits("teacher", rows.tokens))
        for b in range(len(rows.lengths)):
            at = np.arange(rows.prompt_lengths[b] - 1, rows.lengths[b] - 1)
            labels = rows.tokens[b, at + 1]
            student, *teacher = (x[b, at] for x in logits)
            q = student - np.logaddexp.reduce(student, axis=-1, keepdims=True)
            if rows.ground_truth[b]:
                parts["sft"] += list(-q[np.arange(len(at)), labels])
            if not teacher:
                continue
            (teacher,) = teacher
            if method is METHODS["opsd"]:
                teacher = behind_own_prompt(run, records[rows.example[b]], labels)
            p = teacher - np.logaddexp.reduce(teacher, axis=-1, keepdims=True)
            name, equation = method.name, method.equation
            if method.sample_name and not rows.ground_truth[b]:
                name, equation = method.sample_name, method.sample_equation
            if name == "dac_kl":
                clip = run.params[CLIP_NETWORK]
                values = list(reference.dac_kl(clip, student, teacher)[0])
            else:
                values = list(map(equation, p, q))
            parts["token"] += values
            by_name.setdefault(name, []).extend(values)
            ids = rows.span_ids[b, at + 1]
            values = reference.span_correlation(student, teacher, ids)
            pairs = [i for i in range(len(ids) - 1) if ids[i] == ids[i + 1] != -1]
            parts["span"] += list(values[pairs])
    means = {part: np.mean(values) for part, values in parts.items() if values}
    weights = dict(zip(parts, method.weights, strict=True))
    loss = sum(weights[part] * means.get(part, 0.0) for part in parts)
    reported = {
        part: means[part] for part in means if weights[part] and part != "token"
    }
    return reported | {k: np.mean(v) for k, v in by_name.items()} | {"loss": loss}


def expected_source(method, run, step, generated):
    """The source of a step's rows, from its random number only."""
    r = float(jax.random.uniform(run.keys(step)[0]))
    if method.samples == "replay":  # the ratio is 0.8, the buffer holds one batch
        if r < 0.8 * (1 - step / STEPS) or (r < 0.8 and not generated):
            return "generate"
        return "replay" if r < 0.8 else "data"
    return "generate" if r < method.samples else "data"


OWN_PROMPT = "{prompt} {reference}"
OPTIONS = {
    # Short, because words that the tokenizer has not seen are many tokens.
    "opsd": ["--data.teacher_prompt", OWN_PROMPT],
    # Its ratio starts at 0, and only validations raise it.
    "distillm": ["--rollout.initial_ratio", "0.8", "--rollout.capacity", "8"],
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_rows_and_loss_of_a_recipe_equal_an_independent_version(
    name, prepare_run, tmp_path
):
    method = METHODS[name]
    run = prepare_run(name, *OPTIONS.get(name, []))
    records = tiny.records(48, 0)
    if name in OF_THE_TEACHER:
        lines = (tmp_path / "train.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    seen, first, generated = {}, {}, set()
    with jax.set_mesh(run.inputs.mesh):
        for step in range(STEPS):
            rows = run.rows(step)
            assert rows.source == expected_source(method, run, step, "generate" in seen)
            if rows.source == "generate":
                generated |= contents(rows)
            if rows.source not in seen:
                seen[rows.source], first[rows.source] = rows, step
    for source, rows in seen.items():
        assert_rows(run, method, rows, run.keys(first[source])[1], records)
    assert "replay" not in seen or contents(seen["replay"]) <= generated
    for rows in seen.values():
        want = expected_metrics(run, method, rows.micro_batches, records)
        state = jax.tree.map(jnp.copy, run.state)  # a step donates it
        with jax.set_mesh(run.inputs.mesh):
            _, metrics = run.programs.train_step(
                state, run.teacher_params, rows.micro_batches, rows.teacher_outputs
            )
        for part, value in want.items():
            total, count = jax.device_get(metrics[part])
            got = total / max(count, 1)
            assert got == pytest.approx(value, rel=2e-5, abs=1e-7), part


def contents(rows):
    """Example and tokens of every row."""
    return {
        (int(example), tuple(tokens.tolist()))
        for batch in jax.device_get(rows.micro_batches)
        for example, tokens in zip(batch.example, batch.tokens, strict=True)
    }
