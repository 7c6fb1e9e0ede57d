"""How large a memory is if nobody says so, and the paper's sizes.

Run: pytest tests/unit/test_sizes.py
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from engram_transformers import EngramConfig
from engram_transformers.configuration import PRESETS
from engram_transformers.conversion.sizes import count_parameters, default_rows, log_size, table_bytes, table_rows


@pytest.mark.parametrize(
    "fields", [{}, {"engram_head_dim": 48, "engram_n_heads": 4}, {"engram_table_dtype": "bfloat16"}]
)
@pytest.mark.parametrize("parameters", [6 * 10**6, 134_515_008, 36 * 10**7, 7 * 10**9])
def test_default_tables_take_at_most_two_bytes_for_a_parameter(parameters, fields):
    config = EngramConfig(**fields)
    rows = default_rows(config, parameters)
    assert config.engram_vocab_size == 2_262_400, "the question changed the configuration"
    assert rows % 1000 == 0 and 1000 <= rows <= 200_000
    assert table_bytes(EngramConfig(**fields, engram_vocab_size=rows)) <= 2 * parameters
    more = table_bytes(EngramConfig(**fields, engram_vocab_size=rows + 1000))
    assert rows == 200_000 or more > 2 * parameters, "a larger memory would do"


def test_the_default_of_small_donors_is_known():
    assert default_rows(EngramConfig(), 134_515_008) == 26_000  # SmolLM2-135M
    assert default_rows(EngramConfig(), 1) == 1000
    assert default_rows(EngramConfig(), 10**12) == 200_000


def test_parameters_are_counted_without_making_them_and_whatever_their_type(tiny_donor, tiny_llama_config):
    expected = sum(parameter.numel() for parameter in tiny_donor().parameters())
    huge = LlamaConfig(hidden_size=16384, intermediate_size=65536, num_hidden_layers=100)
    for make in (AutoModelForCausalLM.from_config, type(tiny_donor())):
        assert count_parameters(tiny_llama_config, make) == expected
        assert count_parameters(huge, make) > 4e11
    tiny_llama_config.dtype = torch.float16
    assert count_parameters(tiny_llama_config, AutoModelForCausalLM.from_config) == expected
    tiny_llama_config.tie_word_embeddings = True
    embedding = tiny_llama_config.vocab_size * tiny_llama_config.hidden_size
    assert count_parameters(tiny_llama_config, AutoModelForCausalLM.from_config) == expected - embedding


def test_a_default_of_more_than_half_of_what_is_free_is_refused_and_one_that_was_asked_for_is_not(caplog):
    config = EngramConfig(engram_vocab_size=26_000)
    needed = table_bytes(config)
    log_size(config, 2 * needed, "memory", 134_515_008)
    log_size(config, needed // 2, "memory", None)
    for line, whence in zip(caplog.messages, ("derived from the backbone's 134,515,008", "as given"), strict=True):
        assert f"{table_rows(config):,} rows, {needed:,} bytes" in line and "engram_vocab_size=26000" in line
        assert whence in line
    caplog.clear()
    with pytest.raises(ValueError, match=rf"take {needed:,} bytes.* {2 * needed - 1:,} bytes are free.*Give engram_"):
        log_size(config, 2 * needed - 1, "memory", 134_515_008)
    assert not caplog.messages


@pytest.mark.parametrize(("name", "values"), [("engram-27b", 5.792e9), ("engram-40b", 18.534e9)])
def test_presets_are_the_papers(name, values):
    config = EngramConfig(**PRESETS[name])
    assert table_bytes(config) / 4 == pytest.approx(values, rel=1e-4)
    assert config.engram_memory_dim == 1280 and config.engram_layer_ids == [1, 14]


def test_an_unknown_preset_is_refused_and_none_can_be_changed():
    with pytest.raises(ValueError, match=r"no preset 'engram-7b': choose from engram-27b, engram-40b"):
        PRESETS["engram-7b"]
    with pytest.raises(TypeError):
        PRESETS["engram-27b"]["engram_vocab_size"] = 1


@pytest.mark.parametrize("rows", [2_262_400, 26_000])
def test_a_saved_configuration_names_its_rows_also_where_they_are_the_default(rows):
    assert json.loads(EngramConfig(engram_vocab_size=rows).to_json_string())["engram_vocab_size"] == rows
