"""Tiny random configurations of the backbones that integration tests run on, for the golden tokenizer's 4104 ids."""

from transformers import (
    DeepseekV4Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)


SHARED = {
    "vocab_size": 4104,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def deepseek_v4() -> PreTrainedConfig:
    """Hyper-connections: four residual streams."""
    return DeepseekV4Config(
        **{**SHARED, "num_key_value_heads": 1, "head_dim": 16},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        qk_rope_head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        sliding_window=8,
        num_hash_layers=0,
    )


BACKBONES = {
    "llama": lambda: LlamaConfig(**SHARED),
    "qwen3": lambda: Qwen3Config(**SHARED),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=4104,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
    "mixtral": lambda: MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v4": deepseek_v4,
}
