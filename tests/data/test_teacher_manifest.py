"""Recipes, manifests, and the errors that name a difference."""

import json

import pytest
import tiny
from cached_teacher import ORIGIN, cache, recipe, write

from mgsr_jax.data import teacher_cache
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.data.teacher_manifest import read_manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = cache(tmp_path, logits_dtype="float16").manifest
    assert manifest == read_manifest(tmp_path)
    assert manifest.recipe == recipe(logits_dtype="float16")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: json.dumps(json.loads(text) | {"format": 0}),
        lambda text: json.dumps(json.loads(text) | {"shard_digests": ["00"]}),
        lambda text: json.dumps({"format": 1}),
        lambda text: "[]",
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, change):
    cache(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        TeacherCache.open(tmp_path, ORIGIN)


@pytest.mark.parametrize("top_k", [0, tiny.VOCAB + 1])
def test_top_k_outside_the_vocabulary_raises(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}; expected 1 to 29"):
        recipe(top_k=top_k)


@pytest.mark.parametrize("change", [dict(top_k=5), dict(vocab_size=30)])
def test_files_of_another_recipe_are_not_continued(tmp_path, change):
    write(tmp_path, recipe(), numbers=[0])
    [name] = change
    with pytest.raises(ValueError, match=f"made from another {name} \\("):
        teacher_cache.begin(tmp_path, recipe(**change))
