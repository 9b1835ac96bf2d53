"""End ids and chat template that training adds to an exported folder."""

import json

import pytest

from mgsr_jax.checkpoint.response_format import (
    ResponseFormat,
    load_format,
    save_format,
)


@pytest.mark.parametrize("known", [2, (2,), (3, 2)])
def test_end_ids_that_the_folder_names_are_not_written_again(tmp_path, known):
    ids = known if isinstance(known, tuple) else (known,)
    ResponseFormat(tuple(sorted(ids))).write(tmp_path, known)
    assert not list(tmp_path.iterdir())


def test_further_end_ids_are_added_to_the_settings_of_generation(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"_from_model_config": true, "eos_token_id": 2, "top_k": 5}')
    ResponseFormat((2, 7), "{{ messages }}").write(tmp_path, 2)
    assert json.loads(file.read_text()) == {"eos_token_id": [2, 7], "top_k": 5}
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_saved_format_is_read_back(tmp_path):
    file = tmp_path / "response_format.json"
    assert load_format(file) is None
    save_format(file, ResponseFormat((2, 7), "é"))
    assert load_format(file) == ResponseFormat((2, 7), "é")
    file.write_text(file.read_text()[:-4])
    with pytest.raises(ValueError, match="response_format.json is damaged"):
        load_format(file)
