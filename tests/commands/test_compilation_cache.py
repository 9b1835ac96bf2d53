"""The folder of compiled programs: its default, and the settings that move it."""

import jax
import pytest

from mgsr_jax.commands.compilation_cache import use_compilation_cache


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_the_user_s_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-a-test")
    use_compilation_cache()
    expected = "/home/of-a-test/.cache/mgsr_jax/xla"
    assert jax.config.jax_compilation_cache_dir == expected


def test_the_desktop_s_variable_moves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    expected = str(tmp_path / "mgsr_jax" / "xla")
    assert jax.config.jax_compilation_cache_dir == expected


def test_jax_s_own_variable_is_left_to_jax(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
