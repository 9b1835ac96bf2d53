"""A project folder with tiny models and data, on two devices."""

import jax
import pytest
import tiny
import yaml

from mgsr_jax import sharding


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Programs for two devices compile in less time than for eight."""
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: two)
        yield two


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """Folder with student, teacher, train.jsonl and valid.jsonl."""
    return tiny.project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def recipe(project):
    """A YAML file of train, with a number in the notation that people use."""
    settings = dict(
        student=str(project / "student"),
        objective=dict(token=0.0, span=0.0),
        steps=2,
        batch_size=8,
        data=dict(
            train=str(project / "train.jsonl"),
            max_prompt_length=40,
            max_length=56,
            cache_dir=str(project / "cache"),
        ),
        tensorboard=False,
    )
    text = yaml.safe_dump(settings) + "optimizer: {learning_rate: 1e-3}\n"
    path = project / "recipe.yaml"
    path.write_text(text)
    return str(path)
