"""A tiny random configuration of every causal type of Transformers, for the golden tokenizer's 4104 ids.

A type of tests/integration gets the configuration that it has there. Any other gets its own defaults, with the sizes of
`SIZES` under the names that its class has; `OVERRIDES` says what else a type needs.
"""

from dataclasses import fields

from transformers import CONFIG_MAPPING, PreTrainedConfig

from engram_transformers.configuration.configuration_engram import PLACEHOLDER_FIELD
from tests.integration import backbones, composites


WIDTH, DEPTH, HEADS, VOCABULARY, LENGTH = 32, 4, 4, 4104, 128

SIZES = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), DEPTH),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "num_encoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 2 * WIDTH),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp"), 2 * WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LENGTH),
    **dict.fromkeys(("max_target_positions", "original_max_position_embeddings"), LENGTH),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "head_dim": 8,
    # Latent attention and indexers
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 8,
    "index_head_dim": 8,
    "index_topk": 4,
    # Experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "dense_intermediate_size"), 16),
    "n_group": 2,
    "topk_group": 1,
    # States
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    "mamba_n_groups": 2,
    # Tokens
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
}

LATENT = {"num_key_value_heads": HEADS}  # as many keys as queries
SHARED_BLOCKS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
OVERRIDES = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE}},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "blt_local_encoder": {"hidden_size_global": WIDTH},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_window_layers": 2},
    "dots3_note_text": LATENT,
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * DEPTH,
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "gemma4_assistant": {
        "text_config": {**backbones.HEADS, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "git_vision_model": {"num_hidden_layers": DEPTH - 1},  # layers are found by their number
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 4},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phi4_multimodal_vision": {"num_hidden_layers": DEPTH - 1},
    "reformer": {"attention_head_size": 8, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {"layers_block_type": SHARED_BLOCKS},
    "zamba2": {"layers_block_type": SHARED_BLOCKS},
    "zaya": {"num_experts_per_tok": 1},
}


def _known() -> dict:
    """Returns makers of configurations that other tests have, by type."""
    texts = [*(backbones.BACKBONES | backbones.FURTHER).values(), *(make for make, _ in backbones.REFUSED.values())]
    wholes = (composites.COMPOSITES | composites.FURTHER).values()
    return {make().model_type: make for make in reversed([*texts, *wholes])}  # the first of a type


KNOWN = _known()


def tiny_configuration(model_type: str) -> PreTrainedConfig:
    """Returns a new tiny configuration of a type."""
    return _made(model_type, CONFIG_MAPPING[model_type])


def _made(model_type: str, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    return KNOWN[model_type]() if model_type in KNOWN else _tiny(kind)


def _tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Returns a configuration of a class, with the configurations that it holds."""
    declared = {field.name: field.default for field in fields(kind)}
    # What is None by default is derived from other sizes, or means that the type does without.
    sizes = {name: SIZES[name] for name, default in declared.items() if name in SIZES and default is not None}
    sizes |= {name: SIZES[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in declared}
    placeholders = [name for name, default in declared.items() if PLACEHOLDER_FIELD.search(name) and default]
    sizes |= {name: VOCABULARY - 1 - number for number, name in enumerate(placeholders)}
    overrides = OVERRIDES.get(kind.model_type, {})
    if kind.sub_configs:
        held = {name: getattr(kind(**overrides), name) for name in kind.sub_configs}
        sizes |= {name: _made(config.model_type, type(config)) for name, config in held.items() if config is not None}
    return kind(**sizes | overrides)
