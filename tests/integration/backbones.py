"""Tiny random configurations of the backbones that integration tests run on, for the golden tokenizer's 4104 ids.

`BACKBONES` are those that a memory works in, `FURTHER` more of them, for fewer tests, `REFUSED` those that it must
refuse, with what the error says; `BACKBONES[name]()` makes a new configuration. Weights are large
(`initializer_range`), so that logits depend on every token. Windows hold 8 tokens, so that a test's 15 leave them.
"""

from itertools import chain

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    Exaone4Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HunYuanDenseV1Config,
    KimiLinearConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MiniMaxConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen4ExpTextConfig,
    SmolLM3Config,
)


TOKENS = {"vocab_size": 4104, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}  # types that take a head's width, which others compute
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def gpt2() -> PreTrainedConfig:
    """Learned positions, tied head, and names of its own for every size."""
    return GPT2Config(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=128)


def gpt_oss() -> PreTrainedConfig:
    """Sinks beside keys, windows, experts; YaRN as released, with lengths that its factor fits."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return GptOssConfig(**HEADS, **MIXED, num_local_experts=4, num_experts_per_tok=2, rope_parameters=yarn)


def deepseek_v3() -> PreTrainedConfig:
    """Latent attention (keys and values from 8 values a token), a dense layer, then routed and shared experts."""
    return DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    )


def deepseek_v4(**fields) -> PreTrainedConfig:
    """Hyper-connections: four residual streams. No text of a test is as long as the 128 tokens that it compresses."""
    return DeepseekV4Config(
        **SIZES,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        qk_rope_head_dim=8,
        index_n_heads=8,
        index_head_dim=8,
        index_topk=2,
        num_hash_layers=0,
        **fields,
    )


def deepseek_v4_compressed() -> PreTrainedConfig:
    """One layer of each kind of its attention, which compresses 4 and 8 tokens: left pads too, so that they count.

    With fewer than 8 index heads the scores behind their ReLU are often all 0, and the best 2 entries a matter of luck.
    """
    return deepseek_v4(
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )


def falcon_h1() -> PreTrainedConfig:
    """Attention and a state space model side by side in every layer."""
    return FalconH1Config(
        **HEADS,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=4,
        ssm_multipliers=[0.5, 2.0, 0.5, 2.0, 1.5],  # a buffer that no file holds
    )


def gemma3n() -> PreTrainedConfig:
    """AltUp: four streams in front of the batch."""
    return Gemma3nTextConfig(
        **HEADS,
        **MIXED,
        altup_num_inputs=4,
        laurel_rank=4,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=4104,
        hidden_size_per_layer_input=8,
    )


def mamba2() -> PreTrainedConfig:
    """A state space model alone: its cache holds no attention layer."""
    return Mamba2Config(
        **TOKENS, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=4
    )


def minimax() -> PreTrainedConfig:
    """Lightning attention, whose state is in a kind of cache of its own."""
    return MiniMaxConfig(
        **HEADS,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        block_size=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def qwen4_exp() -> PreTrainedConfig:
    """Streams side by side in the hidden dimension; without a memory of its own."""
    sizes = {name: value for name, value in HEADS.items() if name != "intermediate_size"}
    return Qwen4ExpTextConfig(
        **sizes,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_count=4,
        hc_lowrank=8,
    )


BACKBONES = {
    "llama": lambda: LlamaConfig(**HEADS),
    "qwen3": lambda: Qwen3Config(**HEADS),
    "granite": lambda: GraniteConfig(
        **GROUPED, embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.5, attention_multiplier=0.25
    ),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "gpt2": gpt2,
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    # Windows, in all layers or mixed with full attention
    "mistral": lambda: MistralConfig(**HEADS, sliding_window=8),
    "phi3": lambda: Phi3Config(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED, **MIXED, use_sliding_window=True),
    "smollm3": lambda: SmolLM3Config(**GROUPED, **MIXED, use_sliding_window=True, no_rope_layers=[0, 1, 0]),
    "gemma2": lambda: Gemma2Config(**HEADS, **MIXED),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, **MIXED),
    # Experts: over 2400 tokens or more, the second and third best were never closer than 3e-5, so rounding swaps none
    "mixtral": lambda: MixtralConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **HEADS, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
    ),
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "deepseek_v4": deepseek_v4,
    # States of a convolution or a state space model beside attention
    "lfm2": lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
    "falcon_h1": falcon_h1,
}

# Gated delta nets beside attention
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}


def without(sizes: dict, name: str) -> dict:
    """The same sizes but one, which a type does not have."""
    return {key: value for key, value in sizes.items() if key != name}


def gemma4_text() -> PreTrainedConfig:
    """Embeddings of each layer; a memory of its own kind, without n-grams."""
    return Gemma4TextConfig(
        **HEADS,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=4104,
    )


def nemotron_h() -> PreTrainedConfig:
    """Every layer is one thing: a state space model, attention or a feed-forward net."""
    return NemotronHConfig(
        **without(HEADS, "num_hidden_layers"),
        layers_block_type=["mamba", "attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=4,
    )


def granitemoehybrid() -> PreTrainedConfig:
    """Mamba beside attention, experts."""
    return GraniteMoeHybridConfig(
        **GROUPED,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=4,
        mamba_n_groups=2,
    )


def kimi_linear() -> PreTrainedConfig:
    """Delta attention beside latent attention, experts."""
    return KimiLinearConfig(
        **SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_experts_per_tok=2,
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_head_dim=8,
        linear_num_heads=4,
    )


FURTHER = {
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**HEADS, **DELTA),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeTextConfig(**without(HEADS, "intermediate_size"), **DELTA, **SHARED),
    "qwen3_next": lambda: Qwen3NextConfig(**HEADS, **DELTA, **SHARED),
    "gemma4_text": gemma4_text,
    "ministral3": lambda: Ministral3Config(**HEADS),
    "olmo3": lambda: Olmo3Config(**GROUPED, **MIXED),
    "nemotron_h": nemotron_h,
    "glm4_moe": lambda: Glm4MoeConfig(
        **GROUPED, moe_intermediate_size=16, num_experts_per_tok=2, n_routed_experts=4, first_k_dense_replace=1
    ),
    "granitemoehybrid": granitemoehybrid,
    "hunyuan_v1_dense": lambda: HunYuanDenseV1Config(**HEADS),
    "exaone4": lambda: Exaone4Config(**GROUPED, **MIXED),
    "kimi_linear": kimi_linear,
    "qwen4_exp_text": qwen4_exp,
}

# Left pads change what these read, with a memory or without: not for tests that pad.
READS_PADS = {"deepseek_v4_compressed": deepseek_v4_compressed}

# Configuration, and what the error must say.
REFUSED = {
    "gemma3n": (gemma3n, "altup_num_inputs=4: AltUp keeps its streams in front of the batch"),
    "mamba2": (mamba2, "Mamba2ForCausalLM has no layer of attention"),
    "minimax": (minimax, "MiniMaxForCausalLM takes no cache"),
}


@torch.no_grad()
def unmapped(model: PreTrainedModel) -> PreTrainedModel:
    """Copies weights out of the mapped file, for comparisons bit for bit: kernels round by where a tensor begins."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model
