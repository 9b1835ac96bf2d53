"""Settings that cannot work together are named before anything is read."""

import dataclasses

import pytest
from rich.console import Console

from mgsr_jax.data.spans import resolve_chunker
from mgsr_jax.divergences import DIVERGENCES
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.inputs import prepare

SAMPLED = dict(
    objective__divergence="sampled_reverse_kl",
    rollout__policy="on",
    rollout__rounds=0,
)


def make(**changes):
    """The defaults; `section__field` changes one field of a section.

    Types are checked under pytest and nowhere else, so a wrong one is put there late.
    """
    config = TrainConfig(
        student="student",
        teacher="teacher",
        output="run",
        steps=10,
        data=DataConfig(train="train.jsonl"),
    )
    for path, value in changes.items():
        *section, field = path.split("__")
        holder = getattr(config, section[0]) if section else config
        object.__setattr__(holder, field, value)
    return config


def test_the_defaults_are_valid():
    make().check()


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=None, epochs=0.5),
        dict(rollout__policy="on", rollout__probability=0.0),
        dict(rollout__policy="replay", rollout__initial_ratio=1.0),
        dict(rollout__rounds=0, rollout__temperature=0.0),
        dict(rollout__max_new_tokens=64),
        dict(rollout__max_new_tokens=((0.0, 64), (0.3, 256), (0.9, 128))),
        dict(objective__sft=0.0),
        dict(objective__token=0.0),
        dict(objective__divergence="dac_kl_fixed", objective__lower=0.0),
        dict(teacher=None, objective__token=0.0, objective__span=0.0),
        dict(batch_size=12, micro_batches=3),
        dict(save_every=0, validate_every=0, optimizer__weight_decay=0.0),
        dict(lora__rank=16, lora__alpha=0.5, lora__dropout=0.99, lora__targets=""),
        dict(data__buckets=(64, 128)),
        dict(teacher_cache="cache", objective__span=0.0),
        SAMPLED | dict(objective__baseline=0.0),
        dict(
            rollout__policy="replay",
            rollout__initial_ratio=0.5,
            objective__divergence="skewed_forward_kl",
            objective__sample_divergence="skewed_reverse_kl",
            objective__alpha=0.2,
        ),
        dict(data__teacher_prompt="{prompt} {reference}"),
        SAMPLED | dict(data__teacher_prompt="{prompt} {reference}"),
        SAMPLED
        | dict(
            objective__divergence="forward_kl",
            objective__sample_divergence="sampled_reverse_kl",
        ),
        dict(objective__token_weights="discrepancy", objective__weight_gain=2.0),
        dict(
            teacher_cache="cache",
            objective__span=0.0,
            objective__divergence="forward_kl",
            rollout__policy="on",
        ),
    ],
    ids=str,
)
def test_what_works_is_let_through(changes):
    make(**changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(steps=None),
            "one of steps and epochs, got steps=None, epochs=N",
        ),
        (
            dict(epochs=1.0),
            "one of steps and epochs, got steps=10, epochs=1.0",
        ),
        (
            dict(output="gs://bucket/run"),
            r"output='gs://bucket/run' .*; mount the buck",
        ),
        (
            dict(teacher="gs://bucket/teacher"),
            "teacher='gs://bucket/teacher' is an add",
        ),
        (dict(data__buckets=(512,)), r"buckets=\[512\]; .* data.max_length=512"),
        (dict(data__buckets=(128, 64)), r"buckets=\[128, 64\]; .* ascend"),
        (dict(data__buckets=(0, 64)), r"buckets=\[0, 64\]; .* from 2"),
        (
            dict(batch_size=10, micro_batches=4),
            "batch_size=10 does not divide into .*4",
        ),
        (
            dict(rollout__probability=1.1),
            r"rollout.probability must be in \[0, 1\], .*1.1",
        ),
        (dict(rollout__probability=-0.1), "rollout.probability must be in"),
        (dict(rollout__probability=float("nan")), "rollout.probability must be in"),
        (dict(rollout__initial_ratio=2.0), r"rollout.initial_ratio must be in .*2.0"),
        (dict(rollout__max_new_tokens=0), "max_new_tokens=0; expected a number above"),
        (dict(rollout__max_new_tokens=()), r"max_new_tokens=\(\); expected"),
        (dict(rollout__max_new_tokens=((0.1, 8),)), "shares rise from 0 to below 1"),
        (dict(rollout__max_new_tokens=((0.0, 8), (0.0, 9))), "shares rise from 0"),
        (dict(rollout__max_new_tokens=((0.0, 8), (1.0, 9))), "to below 1"),
        (dict(rollout__max_new_tokens=((0.0, 8), (0.5, 0))), "a number above 0"),
        (dict(rollout__rounds=-1), "rollout needs rounds >= 0.*rounds=-1"),
        (dict(rollout__temperature=-1.0), "temperature >= 0.*temperature=-1.0"),
        (dict(rollout__top_p=0.0), "0 < top_p <= 1.*top_p=0.0"),
        (dict(rollout__top_p=1.5), "0 < top_p <= 1.*top_p=1.5"),
        (
            dict(objective__sft=-1.0),
            r"objective.sft, .token and .span .*\(-1.0, 1.0, 1",
        ),
        (
            dict(objective__sft=0.0, objective__token=0.0, objective__span=0.0),
            r"one of them above, got \(0.0, 0.0, 0.0\)",
        ),
        (dict(objective__lower=0.9, objective__upper=0.2), "lower < upper.*lower=0.9"),
        (dict(objective__upper=1.2), "upper <= 1, got .*upper=1.2"),
        (dict(teacher=None), "compare with a teacher, and none is set; set teacher"),
        (
            dict(
                teacher=None,
                objective__token=0.0,
                objective__span=0.0,
                rollout__policy="on",
            ),
            "rollout.policy='on' needs a teacher",
        ),
        (
            dict(objective__token=0.0, objective__span=0.0),
            "teacher is set, but .* never use it; leave teacher out",
        ),
        (dict(lora__rank=-1), "lora.rank must be at least 0, got -1"),
        (dict(lora__rank=2, lora__alpha=0.0), "lora.alpha must be above 0, got 0.0"),
        (dict(lora__dropout=1.0), r"lora.dropout must be in \[0, 1\), got 1.0"),
        (dict(lora__dropout=-0.1), r"lora.dropout must be in \[0, 1\), got -0.1"),
        (
            dict(lora__rank=2, lora__targets="(query"),
            r"lora.targets='\(query' is not a regular expression \(missing",
        ),
        (dict(lora__alpha=32.0), "lora.rank=0 trains all .*alpha=32.0.*set lora.rank"),
        (
            dict(data__max_prompt_length=512),
            "max_prompt_length is 512; .* max_length=512",
        ),
        (dict(data__template="vicuna"), "template is 'vicuna'; expected .*'alpaca'"),
        (dict(data__train_on="both"), "data.train_on='both'; expected .*'all'"),
        (
            dict(data__template="none", data__system="Be brief."),
            "system is set, but template 'none' has no place for it; set template to",
        ),
        (
            dict(data__template="none", data__template_args={"enable_thinking": False}),
            "template_args is set, but template 'none' has no place",
        ),
        (dict(data__chunker="nltk"), "data.chunker='nltk'; expected textblob, spacy"),
        (dict(dtype="float16"), "dtype='float16'; expected one of .*'bfloat16'"),
        (dict(rollout__policy="onn"), "rollout.policy='onn'; expected .*'replay'"),
        (dict(rollout__teacher_token="max"), "rollout.teacher_token='max'; .*'argmax'"),
        (dict(objective__divergence="jsd"), "objective.divergence='jsd'; .*'dac_kl'"),
        (dict(objective__normalization="all"), "objective.normalization='all'"),
        (
            dict(
                teacher=None,
                teacher_cache="cache",
                objective__token=0.0,
                objective__span=0.0,
            ),
            "teacher_cache='cache', but no teacher is set; set teacher to the folder",
        ),
        (
            dict(teacher_cache="cache"),
            "objective.span=1.0 compares whole distributions.*leave teacher_cache out",
        ),
        (
            dict(
                teacher_cache="cache",
                objective__span=0.0,
                objective__divergence="forward_kl",
                objective__temperature=2.0,
            ),
            "objective.temperature=2.0, but a cached teacher holds .* temperature 1",
        ),
        (
            dict(
                teacher_cache="cache",
                objective__span=0.0,
                objective__divergence="reverse_kl",
            ),
            "divergence='reverse_kl' needs the teacher's whole distribution",
        ),
        (
            dict(objective__divergence="reverse_kl", objective__head_mass=0.5),
            "objective.head_mass=0.5 is not read by .*'reverse_kl'.*'adaptive_kl'",
        ),
        (
            dict(objective__divergence="jensen_shannon", objective__beta=1.5),
            "objective.beta=1.5; expected 0 to 1",
        ),
        (
            dict(objective__divergence="alpha_beta_divergence", objective__alpha=0.0),
            "objective.alpha=0.0; expected another number",
        ),
        (dict(objective__divergence="taid"), "'taid' needs objective.mix"),
        (dict(mesh__fsdp=0), "mesh.fsdp=0; expected at least 1, or -1"),
        (dict(distributed__timeout=0), "distributed.timeout must be above 0"),
        (dict(distributed__num_processes=0), "num_processes must be above 0, got 0"),
        (
            dict(distributed__process_id=-1),
            "process_id=-1, num_processes=None; processes are numbered from 0",
        ),
        (dict(evaluate_every=-1), "evaluate_every must be at least 0, got -1"),
        (dict(evaluate__limit=0), "evaluate.limit must be above 0, got 0"),
        (dict(best_metric="loss"), "'loss' is not measured; .*valid/loss, .*rouge_l"),
        (dict(best_metric="valid/los"), "one of valid/loss, valid/sft, valid/dac_kl"),
        (dict(best_metric="eval/math"), "one of .*eval/rouge_l, .*eval/loss"),
        (dict(best_metric="valid/loss"), "while the run trains; set validate_every"),
        (dict(best_metric="eval/rouge_l"), "while the run trains; set evaluate_every"),
        (
            dict(objective__divergence="reverse_kl_top_k", objective__top_k=0),
            "objective.top_k=0; expected at least 1",
        ),
        (
            dict(objective__divergence="reverse_kl_top_k", objective__support="both"),
            "objective.support='both'; expected 'student' or 'union'",
        ),
        (
            dict(objective__divergence="entropy_gated_kl", objective__threshold=-1.0),
            "objective.threshold=-1.0; expected at least 0",
        ),
        (
            dict(objective__token_weights="entropy"),
            "objective.token_weights='entropy'; expected .*'acceptance'",
        ),
        (
            dict(objective__token_weights="acceptance", objective__weight_gain=0.5),
            "objective.weight_gain=0.5 is not read by .*'acceptance'.*'discrepancy'",
        ),
        (
            dict(objective__token_weights="acceptance", objective__weight_floor=2.0),
            "objective.weight_floor=2.0; expected 0 to 1",
        ),
        (
            dict(
                teacher_cache="cache",
                objective__span=0.0,
                objective__token_weights="acceptance",
            ),
            "token_weights='acceptance' needs the teacher's whole distribution",
        ),
        (SAMPLED | dict(rollout__policy="off"), "rollout.policy='off', .* set it to"),
        (
            dict(data__teacher_prompt="{prompt}!", rollout__policy="on"),
            "rollout.rounds=1, but SCRG's teacher reads the student's",
        ),
        (
            dict(
                data__teacher_prompt="{prompt}!",
                teacher_cache="cache",
                objective__span=0.0,
            ),
            "teacher_prompt is set, but teacher_cache holds",
        ),
        (
            dict(
                data__teacher_prompt="{prompt}!",
                teacher=None,
                objective__token=0.0,
                objective__span=0.0,
            ),
            "teacher_prompt='{prompt}!', but no teacher is set",
        ),
        (dict(data__teacher_prompt="{reference}"), "expected a text with {prompt}"),
        (
            dict(objective__sample_divergence="reverse_kl"),
            "sample_divergence='reverse_kl' is read only .* rollout.policy is off",
        ),
        (
            SAMPLED | dict(objective__sample_divergence="reverse_kl"),
            "'sampled_reverse_kl' scores only rows that the student wrote",
        ),
        (
            dict(
                rollout__policy="on",
                objective__divergence="forward_kl",
                objective__sample_divergence="reverse_kl",
                objective__alpha=0.2,
            ),
            "alpha=0.2 is not read by .*'forward_kl' or 'reverse_kl'",
        ),
        (SAMPLED | dict(rollout__rounds=1), "rollout.rounds=1, .* set it to 0"),
        (SAMPLED | dict(rollout__top_p=0.9), "rollout.top_p=0.9, .* set it to 1.0"),
        (
            SAMPLED | dict(objective__temperature=2.0),
            "rollout.temperature=1.0, .* set it to 2.0, or use reverse_kl",
        ),
        (dict(chunk_size=1), "chunk_size=1 leaves no neighbouring token"),
        (
            dict(objective__temperature=2.0),
            "objective.temperature=2.0 is not read by DAC-KL",
        ),
        (
            dict(objective__divergence="taid", objective__mix=0.5, objective__beta=0.1),
            "objective.beta=0.1 is not read by objective.divergence='taid'.*"
            "'jensen_shannon', 'alpha_beta_divergence'",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**changes).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        "steps",
        "batch_size",
        "micro_batches",
        "chunk_size",
        "log_every",
        "keep_checkpoints",
        "rollout.capacity",
        "rollout.samples",
        "objective.num_candidates",
        "objective.width",
        "objective.temperature",
        "optimizer.learning_rate",
        "optimizer.clip_norm",
    ],
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_sizes_and_rates_are_positive(field, value):
    with pytest.raises(ValueError, match=f"{field} must be above 0, got {value}"):
        make(**{field.replace(".", "__"): value}).check()


def test_epochs_are_positive():
    with pytest.raises(ValueError, match="epochs must be above 0, got -1.0"):
        make(steps=None, epochs=-1.0).check()


@pytest.mark.parametrize(
    "field",
    [
        "validate_every",
        "save_every",
        "rollout.top_k",
        "objective.prior_weight",
        "optimizer.final_learning_rate",
        "optimizer.warmup_steps",
        "optimizer.weight_decay",
        "optimizer.clip_network_learning_rate",
    ],
)
def test_counts_and_weights_are_not_negative(field):
    path = field.replace(".", "__")
    make(**{path: 0}).check()
    with pytest.raises(ValueError, match=f"{field} must be at least 0, got -1"):
        make(**{path: -1}).check()


def test_the_encoding_is_the_data_section():
    data = DataConfig(
        "x",
        template="chat",
        template_args={"enable_thinking": False},
        system="Be brief.",
        train_on="all",
        add_special_tokens=False,
        max_prompt_length=7,
        max_length=9,
    )
    encoding = dataclasses.asdict(data.encoding)
    assert encoding.pop("template_text") is None  # the tokenizer is not known yet
    assert encoding.pop("teachers") is None  # nor are the teachers' names
    assert encoding == {name: getattr(data, name) for name in encoding}
    assert DataConfig("x", max_length=90).encoding.prompt_limit == 45


def test_two_configurations_share_no_section():
    assert make().objective == make().objective
    assert make().objective is not make().objective


@pytest.mark.parametrize(
    ("make_output", "message"),
    [
        (lambda path: path.write_text("mine"), "is a file; give a folder's name"),
        (lambda path: folder_with(path, "thesis.txt"), "not a run folder"),
        (lambda path: folder_with(path, "config.yaml"), "is truncated"),
    ],
)
def test_an_output_that_is_no_run_is_refused_before_anything_is_read(
    tmp_path, make_output, message
):
    path = tmp_path / "output"
    make_output(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OSError, ValueError), match=message):
        prepare(make(output=str(path), resume=True), console=Console())
    assert sorted(tmp_path.rglob("*")) == before


def folder_with(path, name):
    path.mkdir()
    (path / name).touch()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(validate_every=5), "there is no validation data"),
        (dict(rollout=RolloutConfig("replay")), "never generates"),
    ],
)
def test_settings_that_would_do_nothing_are_named(changes, message):
    settings = TrainConfig(
        student="s",
        teacher="t",
        output="o",
        steps=1,
        data=DataConfig(train="train.jsonl"),
        **changes,
    )
    with pytest.raises(ValueError, match=message):
        settings.check()


def test_training_data_is_not_validated_on():
    settings = TrainConfig(
        student="s",
        teacher="t",
        output="o",
        steps=1,
        data=DataConfig(train="hub/set", valid="hub/set"),
    )
    settings.check()
    for same in (
        DataConfig(train="hub/set", valid="hub/set", valid_split="train"),
        DataConfig(train="one.jsonl", valid="one.jsonl"),
    ):
        with pytest.raises(ValueError, match="not trained on"):
            dataclasses.replace(settings, data=same).check()


def test_a_chunker_of_ones_own_is_imported():
    assert resolve_chunker("textblob") == "textblob"
    assert resolve_chunker("builtins:len") is len
    for name in ("nowhere:phrases", "builtins:phrases"):
        with pytest.raises(ValueError, match="cannot be imported"):
            resolve_chunker(name)


def test_a_cache_is_enough_for_the_divergences_that_read_its_classes_alone():
    """One that is added needs the whole distribution until somebody shows otherwise."""
    settings = dict(teacher_cache="cache", objective__span=0.0)
    for divergence in DIVERGENCES:
        mix = 0.5 if divergence == "taid" else None
        config = make(**settings, objective__divergence=divergence, objective__mix=mix)
        if divergence in ("dac_kl", "dac_kl_fixed", "forward_kl"):
            config.check()
            continue
        with pytest.raises(ValueError, match="needs the teacher's whole distribution"):
            config.check()
