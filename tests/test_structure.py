"""The architecture's import order and size limits, read from the source itself."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mgsr_jax"
# A file imports only names above its own line. "folder.*" is a folder, whose files may
# import one another as long as no circle closes.
ORDER = """
__init__
typing
settings
divergences
losses.*
sharding
rows
routed_teachers
models.*
checkpoint.*
decoding.*
interventions.*
scrg
objective
loss_targets
token_loss
weighted_sum
step_loss
train_step
rollout_config
rollout
data.*
evaluation.*
training.*
planning.*
commands.*
integrations.*
__main__
""".split()
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 40, 9
MAX_OTHER_FILE_LINES = 500  # tests, examples, benchmarks
# "file" or "file:function" -> why it is larger than the limits.
EXCEPTIONS: dict[str, str] = {}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    folder_init = len(parts) > 1 and parts[-1] == "__init__"
    return ".".join(parts[:-1] if folder_init else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OTHER_FILES = [
    path
    for folder in ("tests", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def rank(module: str) -> int:
    for name in (module, module.split(".")[0] + ".*"):
        if name in ORDER:
            return ORDER.index(name)
    pytest.fail(
        f"mgsr_jax.{module} has no place in the import order: add it to ORDER in "
        "tests/test_structure.py"
    )


def imports(tree: ast.Module) -> set[str]:
    """Full names of the imported modules; lazy imports within functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("mgsr_jax.") in FILES
                found.add(full if is_module else node.module)
    return found


def own_imports(tree: ast.Module) -> set[str]:
    """The package's own modules among them, without the package's name."""
    names = {name for name in imports(tree) if name.startswith("mgsr_jax.")}
    return {name.removeprefix("mgsr_jax.") for name in names}


def private_imports(module: str, tree: ast.Module) -> set[str]:
    """Names with an underscore that are imported from another folder."""
    folder = module.split(".")[0]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        _, *parts = node.module.split(".")
        if not node.module.startswith("mgsr_jax") or parts[:1] == [folder]:
            continue
        names = (*parts, *(alias.name for alias in node.names))
        private = [n for n in names if n.startswith("_") and not n.endswith("__")]
        found |= {f"{node.module}: {name}" for name in private}
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without `self` and `cls`; *args and **kwargs count as one each."""
    spec = function.args
    named = [arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    named = [name for name in named if name not in ("self", "cls")]
    return len(named) + (spec.vararg is not None) + (spec.kwarg is not None)


def too_large(module: str, text: str, tree: ast.Module) -> set[str]:
    """Names of the file and its functions that are over a limit."""
    found = set()
    if len(text.splitlines()) > MAX_FILE_LINES:
        found.add(module)
    for function in functions(tree):
        over = code_lines(function) > MAX_FUNCTION_LINES
        if over or parameters(function) > MAX_PARAMETERS:
            found.add(f"{module}:{function.name}")
    return found


@pytest.fixture(scope="module")
def sources():
    """(module, text, syntax tree) of every file of the package."""
    found = []
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        found.append((module, text, ast.parse(text)))
    return found


def test_a_file_imports_only_what_is_above_it(sources):
    for module, _, tree in sources:
        for target in own_imports(tree):
            in_folder = ORDER[rank(module)].endswith("*") and rank(target) == rank(
                module
            )
            assert rank(target) < rank(module) or in_folder, (
                f"mgsr_jax.{module} imports {target}, which is below it"
            )


def test_no_files_import_each_other_in_a_circle(sources):
    graph = {module: own_imports(tree) for module, _, tree in sources}
    graphlib.TopologicalSorter(graph).prepare()


def test_only_models_and_adapters_import_flax(sources):
    # Other trainers' models are nnx modules: an adapter has to handle them.
    for module, _, tree in sources:
        roots = {name.split(".")[0] for name in imports(tree)}
        may = module.startswith("models") or module == "integrations._clip_network"
        assert may or "flax" not in roots, module


def test_losses_import_only_jax(sources):
    for module, _, tree in sources:
        if module.split(".")[0] != "losses":
            continue
        for name in imports(tree):
            root = name.split(".")[0]
            own = name == "mgsr_jax.typing" or name.startswith("mgsr_jax.losses")
            allowed = {"jax", "jaxtyping"} | sys.stdlib_module_names
            assert own or root in allowed, f"{module} imports {name}"


def test_no_private_name_is_imported_from_another_folder(sources):
    found = {m: private_imports(m, tree) for m, _, tree in sources}
    assert not {module: names for module, names in found.items() if names}


def test_files_and_functions_are_within_the_limits(sources):
    found = set()
    for module, text, tree in sources:
        assert not FORBIDDEN_NAMES & {part.strip("_") for part in module.split(".")}
        found |= too_large(module, text, tree)
    assert found == EXCEPTIONS.keys()
    assert len(EXCEPTIONS) <= 6 and all(EXCEPTIONS.values())


def test_tests_examples_and_benchmarks_are_of_readable_size():
    for path in OTHER_FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_OTHER_FILE_LINES, f"{path} has {lines} lines"


def test_the_walk_sees_the_package():
    """Guards the tests above against an empty or misnamed walk."""
    assert {"losses", "losses._dac_kl", "typing", "rows"} <= FILES.keys()
    assert {path.name for path in OTHER_FILES} >= {"conftest.py", "quickstart.py"}
    dac_kl = ast.parse(FILES["losses._dac_kl"].read_text(encoding="utf-8"))
    assert {"jax", "mgsr_jax.typing"} <= imports(dac_kl)
    in_order = "losses._dac_kl", "models.llama", "scrg", "commands.parser"
    assert sorted(in_order, key=rank) == list(in_order)
    with pytest.raises(pytest.fail.Exception, match="add it to ORDER"):
        rank("nowhere")


def test_the_limits_are_measured():
    """Guards the limits: a file and functions that break each of them are found."""
    long = "def f():\n" + "    x = 1\n" * 40
    wide = f"def g({', '.join(f'x{i}' for i in range(10))}):\n    pass\n"
    docstring = '    """' + "Doc.\n" * 50 + '"""\n'
    inside = "def h(self, *args):\n" + docstring + "    pass\n"
    text = long + wide + inside + "# \n" * 350
    tree = ast.parse(text)
    assert too_large("m", text, tree) == {"m", "m:f", "m:g"}
    private = ast.parse("from mgsr_jax.losses._top_k import top_k")
    assert private_imports("scrg", private) == {"mgsr_jax.losses._top_k: _top_k"}
    assert not private_imports("losses._dac_kl", private)
