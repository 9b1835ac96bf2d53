"""The folder of compiled programs: its default, and the settings that move it."""

import jax
import pytest

from mgsr_jax.commands.compilation_cache import use_compilation_cache


@pytest.fixture
def no_folder():
    before = jax.config.read("jax_compilation_cache_dir")
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_the_user_s_cache(no_folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/of-a-test")
    use_compilation_cache()
    expected = "/home/of-a-test/.cache/mgsr_jax/xla"
    assert jax.config.read("jax_compilation_cache_dir") == expected


def test_the_desktop_s_variable_moves_it(no_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert jax.config.read("jax_compilation_cache_dir") == str(
        tmp_path / "mgsr_jax" / "xla"
    )


def test_a_folder_of_jax_s_own_settings_stays(no_folder):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    use_compilation_cache()
    assert jax.config.read("jax_compilation_cache_dir") == "/elsewhere"
