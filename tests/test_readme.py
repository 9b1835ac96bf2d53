"""README, pages and configs: Python runs, commands parse, links and names exist."""

import functools
import importlib.util
import pathlib
import re
import shlex

import jax
import pytest

from mgsr_jax.commands import parser

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md")
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def python_blocks():
    return [
        pytest.param(
            block,
            id=f"{page.stem}-{number}",
            marks=() if page == README else pytest.mark.exhaustive,
        )
        for page in PAGES
        for number, block in enumerate(PYTHON.findall(page.read_text()))
    ]


def test_readme_and_pages_about_losses_contain_python():
    names = {block.id.rpartition("-")[0] for block in python_blocks()}
    assert names == {"README", "losses", "own_trainer"}


def test_readme_has_at_most_200_lines_and_opens_with_ten_lines_of_a_loss():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    first = PYTHON.search(text)
    assert first is not None and "## " not in text[: first.start()]
    lines = [line for line in first[1].splitlines() if line]
    assert len(lines) <= 10 and any("import dac_kl" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("block", python_blocks())
def test_the_python_runs(block):
    with jax.numpy_rank_promotion("allow"):  # a reader's jax has the default
        exec(compile(block, "page", "exec"), {})


def anchors(page):
    """Headings as GitHub turns them into anchors."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


def test_links_and_anchors_exist():
    for page in PAGES:
        for target, anchor in LINK.findall(page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: #{anchor}"


def test_readme_names_every_page():
    text = README.read_text()
    assert all(f"docs/{page.name}" in text for page in (ROOT / "docs").glob("*.md"))


def test_the_settings_page_is_what_the_docstrings_say():
    """`python docs/make_settings.py` writes it."""
    path = ROOT / "docs" / "make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text()
    assert text == module.page()
    for name in map("`{}`".format, ("steps", "rollout.policy", "exposure_bias", "run")):
        assert f"| {name} |" in text


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = re.sub(r"\s+", " ", page.read_text())
        for name in re.findall(r"(?:`|  |\$ )make ([a-z][a-z-]*)", text):
            assert name in targets, f"{page.name}: make {name}"


def commands():
    """Arguments of every complete `mgsr` command in the pages and the configs."""
    for page in (*PAGES, *sorted((ROOT / "configs").glob("*/*.yaml"))):
        text = page.read_text().replace("\\\n#", "").replace("\\\n", "")
        for line in re.findall(r"^(?:    |#   )mgsr (.*)$", text, re.M):
            if "..." not in line:
                words = shlex.split(line.partition(" | ")[0], comments=True)
                yield pytest.param(words, id=f"{page.stem}: {line[:40]}")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", list(commands()))
def test_every_command_parses(arguments, monkeypatch):
    name, ran = arguments[0], []

    @functools.wraps(parser.COMMANDS[name])
    def command(*args, **settings):
        ran.append(name)
        return 0

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(parser.COMMANDS, name, command)
    assert parser.main(arguments) == 0 and ran == [name]


def test_the_tree_in_the_readme_is_the_package():
    package = ROOT / "mgsr_jax"
    _, _, tree = README.read_text().partition("    mgsr_jax/\n")
    tree = tree.partition("\n\n")[0]
    named = {line.split()[0] for line in tree.splitlines()}
    files = {path.name for path in package.glob("[a-z]*.py")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == files | folders


def test_pages_name_only_paths_that_exist():
    """Paths of this repository in backticks."""
    folders = "benchmarks|configs|examples|launch|mgsr_jax|tests|docs"
    for page in PAGES:
        for path in re.findall(
            rf"`(?:python )?((?:{folders})/[\w./-]*)", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
