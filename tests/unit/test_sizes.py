"""How large a memory is if nobody says so, and the paper's sizes.

Run: pytest tests/unit/test_sizes.py
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from engram_transformers import EngramConfig
from engram_transformers.configuration import PRESETS
from engram_transformers.conversion.sizes import count_parameters, default_rows, log_size, table_bytes, table_rows
from engram_transformers.memory_engram import EngramMemory


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


# Rows of each layer: of "deepseek-v4.1" those of the released tables, of "demo" what the demo computes.
@pytest.mark.parametrize(
    ("name", "rows", "values"),
    [
        ("engram-27b", [36_199_972, 36_204_260], "5.79"),
        ("engram-40b", None, "18.53"),
        ("demo", [10_344_164, 10_348_242], "1.32"),
        ("deepseek-v4.1", [384_006_168, 384_016_682], "196.61"),
        ("tiny", None, "0.00"),
    ],
)
def test_presets_have_the_parameters_that_were_published(name, rows, values):
    config = EngramConfig.preset(name, engram_layer_ids=[1, 14])
    with torch.device("meta"):
        tables = EngramMemory(config).tables
    found = {layer: sum(part.numel() for part in table.parameters()) for layer, table in tables.items()}
    assert f"{sum(found.values()) / 1e9:.2f}" == values
    assert rows is None or [found[layer] // config.engram_head_dim for layer in ("1", "14")] == rows
    assert sum(found.values()) == table_rows(config) * config.engram_head_dim


def papers_backbone(experts: int) -> int:
    """Parameters of the paper's MoE, but for its token embedding; see docs/grafting.md for what it leaves open."""
    config = DeepseekV3Config(
        vocab_size=129_280,
        hidden_size=2560,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=32,
        num_key_value_heads=32,
        n_routed_experts=experts,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
    )
    return count_parameters(config, AutoModelForCausalLM.from_config) - 129_280 * 2560


def test_the_memory_takes_the_place_of_the_papers_17_experts():
    mixture, fewer = papers_backbone(72), papers_backbone(55)
    sizes = {name: table_rows(EngramConfig.preset(name)) * 80 for name in ("engram-27b", "engram-40b")}
    assert mixture - fewer == pytest.approx(sizes["engram-27b"], rel=0.01)
    totals = [mixture, *(fewer + values for values in sizes.values())]
    assert [f"{total / 1e9:.1f}" for total in totals] == ["26.7", "26.7", "39.4"]


def test_a_preset_gives_way_and_an_unknown_one_is_refused():
    backbone = LlamaConfig(num_hidden_layers=2, vocab_size=500)
    config = EngramConfig.preset("tiny", text_config=backbone, engram_layer_ids=[1], engram_n_heads=4)
    assert (config.engram_vocab_size, config.engram_n_heads, config.text_config.vocab_size) == (1000, 4, 500)
    for asked in (EngramConfig.preset, PRESETS.__getitem__):
        with pytest.raises(ValueError, match=r"no preset 'engram-7b': choose from engram-27b, engram-40b, demo"):
            asked("engram-7b")
    with pytest.raises(TypeError):
        PRESETS["engram-27b"]["engram_vocab_size"] = 1
    bare = EngramConfig()
    assert all(getattr(bare, name) == value for name, value in PRESETS["engram-27b"].items()), "the defaults"


@pytest.mark.parametrize("rows", [2_262_400, 26_000])
def test_a_saved_configuration_names_its_rows_also_where_they_are_the_default(rows):
    assert json.loads(EngramConfig(engram_vocab_size=rows).to_json_string())["engram_vocab_size"] == rows
