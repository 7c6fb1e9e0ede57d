"""EngramConfig: defaults, refusals, round trips through config.json, and what is not an Engram checkpoint.

Run with `pytest tests/unit/test_configuration.py`.
"""

import ast
import json
import re
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    BltConfig,
    DeepseekV4Config,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    ProphetNetConfig,
    Qwen3Config,
)

from engram_transformers import EngramConfig, EngramFormatError
from engram_transformers.hash_constants_engram import derive_constants


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": 100, "num_hidden_layers": 4, "pad_token_id": 2, **changes})


def tiny(**changes) -> EngramConfig:
    return EngramConfig(**{"text_config": llama(), "engram_layer_ids": [1], "engram_vocab_size": 50, **changes})


BACKBONES = {
    "llama": llama,
    "qwen3": lambda: Qwen3Config(vocab_size=100, num_hidden_layers=4, pad_token_id=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=100, n_layer=4, n_embd=32, n_head=4, bos_token_id=1, eos_token_id=1),
}

# What is wrong -> parts of the message: the value, what is needed, what to do.
REFUSALS = {
    "no layer": ({"engram_layer_ids": []}, ["engram_layer_ids", "empty", "at least one decoder layer", "from 0"]),
    "layer twice": ({"engram_layer_ids": [1, 1]}, ["[1, 1]", "twice", "name each layer once"]),
    "layer too deep": ({"engram_layer_ids": [1, 4]}, ["[1, 4]", "[4]", "llama", "0..3", "choose from those"]),
    "layer negative": ({"engram_layer_ids": [-1]}, ["[-1]", "0..3", "choose from those"]),
    "no order": ({"engram_max_ngram_size": 1}, ["engram_max_ngram_size=1", "at least 2"]),
    "no head": ({"engram_n_heads": 0}, ["engram_n_heads=0", "at least 1"]),
    "no width": ({"engram_head_dim": 0}, ["engram_head_dim=0", "at least 1"]),
    "negative taps": ({"engram_kernel_size": -1}, ["engram_kernel_size=-1", "at least 0"]),
    "no stream": ({"engram_hc_mult": 0}, ["engram_hc_mult=0", "at least 1"]),
    "no part": ({"engram_table_parts": 0}, ["engram_table_parts=0", "at least 1"]),
    "negative seed": ({"engram_seed": -1}, ["engram_seed=-1", "at least 0"]),
    "no class": ({"engram_compressed_vocab_size": 0}, ["engram_compressed_vocab_size=0", "at least 1"]),
    "too few sizes": ({"engram_vocab_size": [50]}, ["[50]", "1 entries", "2 orders", "[2, 3]", "one for each order"]),
    "too many sizes": ({"engram_vocab_size": [50] * 3}, ["[50, 50, 50]", "3 entries", "2 orders", "give one number"]),
    "no row": ({"engram_vocab_size": 0}, ["engram_vocab_size=0", "at least 1 row"]),
    "no row in one order": ({"engram_vocab_size": [50, 0]}, ["[50, 0]", "at least 1 row"]),
    "pad outside": ({"engram_pad_token_id": 100}, ["engram_pad_token_id=100", "100 ids", "tokenizer's pad or end"]),
    "pad negative": ({"engram_pad_token_id": -1}, ["engram_pad_token_id=-1", "100 ids", "tokenizer's pad or end"]),
    "a token map for raw ids": (
        {"engram_hash_scheme": "qwen", "engram_token_map_sha256": "ab"},
        ["'qwen'", "engram_token_map_sha256 names one", "'deepseek'"],
    ),
    "more classes than ids": ({"engram_compressed_vocab_size": 101}, ["=101", "100 ids", "can only merge"]),
    "no norm epsilon": ({"engram_norm_eps": 0.0}, ["engram_norm_eps=0.0", "larger than 0"]),
    "negative conv epsilon": ({"engram_conv_norm_eps": -1e-5}, ["engram_conv_norm_eps=-1e-05", "larger than 0"]),
    "zero keys": ({"engram_initializer_range": 0.0}, ["engram_initializer_range=0.0", "larger than 0"]),
    "zero values": ({"engram_value_initializer_range": 0.0}, ["=0.0", "larger than 0", "no gradient"]),
    "later format": ({"engram_format_version": 2}, ["engram_format_version=2", "version 1", "install the"]),
    "streams that are not there": ({"engram_hc_mult": 4}, ["engram_hc_mult=4", "llama", "1 residual", "leave"]),
    "two pads": ({"engram_pad_id": 3, "engram_pad_token_id": 2}, ["engram_pad_id=3", "=2", "give one of them"]),
    "typing error": ({"engram_vocab_sise": 7}, ["`engram_vocab_sise`", "7", "did you mean `engram_vocab_size`?"]),
    "unknown name": ({"engram_zzzzzzzz": 7}, ["`engram_zzzzzzzz`", "7", "known names", "engram_layer_ids"]),
}

WRONG_TYPES = {
    "engram_gate": "relu",
    "engram_table_dtype": "int4",
    "engram_hash_scheme": "md5",
    "engram_n_heads": "8",
    "engram_head_dim": 8.0,
    "engram_layer_ids": [True],
    "engram_vocab_size": [1.5, 2],
    "engram_projection_bias": 1,
}


@pytest.mark.parametrize(("wrong", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_impossible_values_are_refused_with_value_need_and_advice(wrong, said):
    with pytest.raises(ValueError) as refusal:
        tiny(**wrong)
    assert [part for part in said if part not in str(refusal.value)] == []
    assert tiny().engram_n_heads == 8  # the control: without the change the same configuration is accepted


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES.items())
def test_values_of_a_wrong_type_or_name_are_refused(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        tiny(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["engram_norm_eps", "engram_conv_norm_eps", "engram_initializer_range", "engram_value_initializer_range"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: value})


def test_least_values_are_accepted():
    config = tiny(
        engram_max_ngram_size=2,
        engram_n_heads=1,
        engram_head_dim=1,
        engram_kernel_size=0,
        engram_vocab_size=1,
        engram_compressed_vocab_size=1,
        engram_pad_token_id=0,
        engram_layer_ids=[0, 3],
    )
    assert config.engram_memory_dim == 1
    assert config.engram_orders == [2]


@pytest.mark.parametrize(("name", "value"), [("engram_n_heads", 0), ("engram_vocab_sise", 3), ("engram_seed", -1)])
def test_a_wrong_value_that_is_set_later_is_refused_before_it_is_saved(name, value, tmp_path):
    config = tiny()
    config.save_pretrained(tmp_path / "control")
    setattr(config, name, value)
    with pytest.raises(StrictDataclassError, match=name):
        config.save_pretrained(tmp_path / "wrong")
    assert (tmp_path / "control" / "config.json").exists()
    assert not (tmp_path / "wrong" / "config.json").exists()


def test_defaults_are_the_papers():
    config = EngramConfig()
    assert config.text_config.model_type == "llama"
    assert config.engram_layer_ids == [1, 14]  # layers 2 and 15, counted from 1
    assert config.engram_orders == [2, 3]
    assert config.engram_vocab_sizes == [2_262_400, 2_262_400]
    assert (config.engram_n_heads, config.engram_head_dim, config.engram_memory_dim) == (8, 80, 1280)
    assert (config.engram_kernel_size, config.engram_hc_mult, config.engram_seed) == (4, 1, 0)
    assert (config.engram_gate, config.engram_hash_scheme) == ("signed_sqrt", "deepseek")
    assert not config.engram_projection_bias
    assert config.engram_compressed_vocab_size == config.text_config.vocab_size


def test_every_field_is_documented_with_its_default():
    documented = re.findall(
        r"^ {8}(engram_\w+) \(.*optional\*(?:, defaults to `?(.+?)`?)?\):$", EngramConfig.__doc__, re.M
    )
    told = {name: ast.literal_eval(default or "None") for name, default in documented}
    told["engram_layer_ids"] = tuple(told["engram_layer_ids"])
    assert told == {field.name: field.default for field in fields(EngramConfig) if field.name.startswith("engram_")}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_configuration_survives_saving_and_loading(backbone, tmp_path):
    config = EngramConfig(
        text_config=BACKBONES[backbone](),
        engram_layer_ids=[2, 0],
        engram_vocab_size=[50, 70],
        engram_n_heads=3,
        engram_norm_eps=1e-20,
        engram_table_dtype="bfloat16",
        engram_gate="sigmoid",
        engram_token_map_sha256="0" * 64,
    )
    config.save_pretrained(tmp_path)
    for loaded in (EngramConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EngramConfig
        assert type(loaded.text_config) is type(config.text_config)
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.text_config.to_dict() == config.text_config.to_dict()
    # The control: another value does not come out equal.
    assert EngramConfig.from_pretrained(tmp_path, engram_n_heads=2).to_diff_dict() != config.to_diff_dict()


@given(ids=st.permutations(range(4)), count=st.integers(1, 4), as_tuple=st.booleans())
def test_the_order_of_layers_is_kept(ids, count, as_tuple):
    given_ids = tuple(ids[:count]) if as_tuple else list(ids[:count])
    config = tiny(engram_layer_ids=given_ids)
    assert config.engram_layer_ids == list(given_ids)
    assert EngramConfig.from_dict(json.loads(config.to_json_string())).engram_layer_ids == list(given_ids)


@given(sizes=st.lists(st.integers(1, 10**7), min_size=2, max_size=2), as_tuple=st.booleans())
def test_one_size_for_each_order_is_kept(sizes, as_tuple):
    config = tiny(engram_vocab_size=tuple(sizes) if as_tuple else sizes)
    assert config.engram_vocab_sizes == sizes
    assert tiny(engram_vocab_size=sizes[0]).engram_vocab_sizes == [sizes[0]] * 2


def test_a_backbone_given_as_a_dict_becomes_its_configuration():
    config = tiny(text_config=llama().to_dict())
    assert isinstance(config.text_config, LlamaConfig)
    assert config.to_dict() == tiny().to_dict()


def test_pad_has_two_names():
    assert tiny(engram_pad_id=7).engram_pad_token_id == 7
    assert tiny(engram_pad_id=7, engram_pad_token_id=7).engram_pad_token_id == 7
    assert tiny(engram_pad_id=0).engram_pad_token_id == 0
    assert "engram_pad_id" not in tiny(engram_pad_id=7).to_dict()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_token_id": 5, "eos_token_id": 6, "bos_token_id": 7}, 5),
        ({"pad_token_id": None, "eos_token_id": 6, "bos_token_id": 7}, 6),
        ({"pad_token_id": None, "eos_token_id": [8, 9], "bos_token_id": 7}, 8),
        ({"pad_token_id": None, "eos_token_id": None, "bos_token_id": 7}, 7),
        ({"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}, 0),
        ({"pad_token_id": -1, "eos_token_id": 6, "bos_token_id": 7}, 6),
    ],
)
def test_pad_defaults_to_the_backbones_pad_end_begin_or_zero(ids, expected):
    assert tiny(text_config=llama(**ids)).engram_pad_token_id == expected


def test_tied_embeddings_follow_the_backbone():
    assert tiny(text_config=llama(tie_word_embeddings=True)).tie_word_embeddings
    assert not tiny(text_config=llama(tie_word_embeddings=False)).tie_word_embeddings


def test_streams_follow_the_backbone():
    text_config = DeepseekV4Config()
    assert EngramConfig(text_config=text_config).engram_hc_mult == text_config.hc_mult == 4
    with pytest.raises(ValueError, match=r"engram_hc_mult=1, but .* carries 4 residual stream.*set it to 4"):
        EngramConfig(text_config=text_config, engram_hc_mult=1)


def test_streams_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="gemma3n_text has altup_num_inputs=4.*Engram needs streams of batch"):
        EngramConfig(text_config=Gemma3nTextConfig())
    with pytest.raises(ValueError, match="prophetnet has ngram=2: streams that predict"):
        EngramConfig(text_config=ProphetNetConfig(is_encoder_decoder=False), engram_layer_ids=[1])


def test_streams_are_counted_under_both_names():
    for name in ("hc_mult", "hc_count"):
        text_config = llama()
        setattr(text_config, name, 2)
        assert tiny(text_config=text_config).engram_hc_mult == 2
    assert tiny().engram_hc_mult == 1


def test_a_backbone_without_one_stack_of_layers_is_refused():
    with pytest.raises(ValueError, match="the backbone blt has no hidden_size and no num_hidden_layers"):
        EngramConfig(text_config=BltConfig())


def test_one_row_gives_every_head_a_single_row():
    constants = derive_constants(tiny(engram_hash_scheme="one_row"), token_map=None)
    assert constants.primes.flatten().tolist() == [1] * 16
    assert constants.order_rows() == [[8, 8]]
    assert derive_constants(tiny(), token_map=None).primes.min() >= 50


@pytest.mark.parametrize("from_file", [True, False])
def test_a_donors_config_is_refused_with_the_command_that_grafts(from_file, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refusal:
        EngramConfig.from_pretrained(tmp_path) if from_file else EngramConfig.from_dict(llama().to_dict())
    assert [p for p in ("'llama'", "`engram graft DONOR OUT", "from_backbone") if p not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "engram", "engram_version": "1.2.7"}, ["engram-peft", "engram_lm", "`engram graft DONOR OUT`"]),
        ({"model_type": "engram", "target_layers": [2]}, ["engram-peft", "cannot be copied"]),
        ({"model_type": "engram", "engine": "x"}, ["engram-peft", "train the memory again"]),
        ({"model_type": "engram"}, ["another package", "engram_lm"]),
        ({"engram_layer_ids": [1]}, ["no model_type", "engram_lm"]),
    ],
)
def test_configs_of_other_packages_are_refused(content, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as refusal:
        EngramConfig.from_pretrained(tmp_path)
    assert [part for part in said if part not in str(refusal.value)] == []


def test_an_unknown_name_in_a_config_file_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "engram_head_dims": 4}))
    with pytest.raises(ValueError, match=r"`engram_head_dims`.*did you mean `engram_head_dim`"):
        EngramConfig.from_pretrained(tmp_path)


def test_format_errors_are_value_errors():
    assert issubclass(EngramFormatError, ValueError)
