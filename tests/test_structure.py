"""The architecture's import order and size limits, read from the source itself."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mgsr_jax"
# A file imports only what stands above it. "folder.*" is a folder whose files may
# import one another; its __init__ is the folder's own name.
ORDER = """
__init__ typing
losses._reduce losses._top_k losses._vocabulary losses._logits losses._teacher
losses._cross_entropy losses._divergences losses._mixtures losses._adaptive_kl
losses._alpha_beta losses._gelu losses._dac_kl losses._span losses._projection
losses._chunked losses
sharding training.optimizer training.distributed training.agreement models.* rows
checkpoint.*
decoding.continuous_batching decoding.decode scrg data.spans data.records data.encoding
data.dataset data.batches data.teacher_cache rollout training.replay training.row_source
objective train_step training.metrics training.run_folder evaluation.evaluate
evaluation.report training.config
training.programs training.inputs training.initial_state training.trainer
planning.machines planning.compiled planning.plan commands.exit_status commands.loaded
commands.train commands.plan commands.generate commands.evaluate commands.cache_teacher
commands.export commands.convert commands.report commands.parser integrations.* __main__
data evaluation decoding planning training commands
""".split()
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    folder_init = len(parts) > 1 and parts[-1] == "__init__"
    return ".".join(parts[:-1] if folder_init else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


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


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.fixture(params=FILES)
def source(request):
    text = FILES[request.param].read_text(encoding="utf-8")
    return request.param, text, ast.parse(text)


def test_a_file_imports_only_what_stands_above_it(source):
    module, _, tree = source
    for name in imports(tree):
        if name.split(".")[0] != "mgsr_jax" or name == "mgsr_jax":
            continue
        target = name.removeprefix("mgsr_jax.")
        same_group = ORDER[rank(module)].endswith("*") and rank(target) == rank(module)
        assert rank(target) < rank(module) or same_group, (
            f"mgsr_jax.{module} imports {name}, which stands below it"
        )


def test_flax_is_known_to_models_and_adapters_alone(source):
    # Other trainers' models are nnx modules: that is what an adapter adapts to.
    module, _, tree = source
    roots = {name.split(".")[0] for name in imports(tree)}
    may = module.startswith("models") or module == "integrations._clip_network"
    assert may or "flax" not in roots


def test_losses_need_nothing_but_jax(source):
    module, _, tree = source
    if module.split(".")[0] != "losses":
        return
    for name in imports(tree):
        root = name.split(".")[0]
        own = name == "mgsr_jax.typing" or name.startswith("mgsr_jax.losses")
        assert own or root in {"jax", "jaxtyping"} | sys.stdlib_module_names, name


def test_a_file_is_one_named_idea_of_readable_size(source):
    module, text, tree = source
    assert not FORBIDDEN_NAMES & {part.strip("_") for part in module.split(".")}
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= MAX_FUNCTION_LINES, node.name


def test_the_walk_sees_the_package():
    # Guards the tests above against an empty or misnamed walk.
    assert {"losses", "losses._dac_kl", "typing", "rows"} <= FILES.keys()
    dac_kl = ast.parse(FILES["losses._dac_kl"].read_text(encoding="utf-8"))
    assert {"jax", "mgsr_jax.losses._logits", "mgsr_jax.typing"} <= imports(dac_kl)
    assert (
        rank("losses._dac_kl")
        < rank("losses")
        < rank("models.llama")
        < rank("commands.parser")
    )
    with pytest.raises(pytest.fail.Exception, match="add it to ORDER"):
        rank("nowhere")
