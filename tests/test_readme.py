"""The Python of the README and the pages runs as it stands; links lead somewhere."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    )
]


def test_there_is_python_in_both():
    assert {block.id.rpartition("-")[0] for block in BLOCKS} == {"README", "losses"}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_runs(block):
    with jax.numpy_rank_promotion("allow"):  # a reader's own jax has not our rig
        exec(compile(block, "page", "exec"), {})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
