"""The layout of Qwen4-Exp's memory, the n-gram part of its per-layer embeddings (PLE), as Transformers has it.

Promises: its weights and ours are the same bytes in another order, both ways; its hash constants, which its files hold,
are those that the configuration gives. Never makes one tensor of the table's shards.
Source: `Qwen4ExpTextPLELayer` and `Qwen4ExpTextNGramEmbedding` of Transformers, and its conversion mapping
(`ngram_embedding.shard_*.weight`).
"""

import re

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..configuration import EngramConfig, EngramFormatError
from .foreign_layouts import Constant, ForeignMemory, Layout, Part, Rows, WeightMap, needed, table_dtype


_SHARD = re.compile(r"ple_embedding\.ngram_embedding\.shard_(\d+)\.weight")


def weight_map(config: EngramConfig, number: int, numbers: dict) -> WeightMap:
    """Returns where each tensor of a `ple` module lies; D, M, E, H, W, w as in docs/design.md."""
    D, M, E = config.text_config.hidden_size, config.engram_hc_mult, config.engram_memory_dim
    heads, N, w = E // config.engram_head_dim, config.engram_max_ngram_size, config.engram_kernel_size
    return {
        **_table_map(numbers["rows"][number], config.engram_head_dim, **numbers["table"]),
        "ple_embedding.layer_multipliers": Constant((N,), "multipliers"),
        "ple_embedding.ngram_heads_vocab_sizes": Constant((heads,), "primes"),
        "ple_embedding.ngram_heads_offsets": Constant((heads,), "offsets"),
        "key_proj.weight": Part((M * D, E), "key_value.weight"),
        "value_proj.weight": Part((D, E), "key_value.weight", M * D),
        "norm_key.weight": Part((M * D,), "key_norm"),  # ours are (M, D)
        "norm_query.weight": Part((M * D,), "query_norm"),
        "norm_conv.weight": Part((M * D,), "conv_norm"),
        "conv1d.weight": Part((M * D, 1, w), "conv", turned=True),  # ours is (w, M * D)
    }


def _table_map(rows: int, width: int, shards: int, multiple: int) -> WeightMap:
    """Returns the shards of a table, one below another; its height is rounded up, so rows that no head reads follow."""
    height = -(-rows // multiple) * multiple
    most = -(-height // shards)
    return {
        f"ple_embedding.ngram_embedding.shard_{shard}.weight": Rows((min(most, height - first), width), first)
        for shard, first in enumerate(range(0, height, most))
    }


def _read(told: dict, tensors: dict) -> ForeignMemory:
    """Reads the configuration of the model, or of its text model, by Transformers' own class."""
    try:
        config = AutoConfig.for_model(**told).get_text_config(decoder=True)
    except (TypeError, KeyError, StrictDataclassError) as error:
        raise EngramFormatError(f"config.json is not that of a model that Transformers knows: {error}.") from error
    names = ("ple_layer_ids", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "eos_token_id", "hc_count")
    own = {name: getattr(config, name, None) for name in names}
    layers, longest, heads, base, end, streams = needed(own, names, LAYOUT.name)
    end = end[0] if isinstance(end, list) else end
    shards = [name for layer in tensors.values() for name in layer if _SHARD.fullmatch(name)]
    return ForeignMemory(
        layer_ids=[layer - 1 for layer in layers],  # Qwen4-Exp counts from 1
        fields={
            "engram_vocab_size": base,
            "engram_max_ngram_size": longest,
            "engram_n_heads": heads,
            "engram_head_dim": config.ple_embed_dim // (heads * (longest - 1)),
            "engram_seed": config.seed,
            "engram_pad_token_id": end,
            "engram_reset_token_ids": [end],
            "engram_kernel_size": config.ple_conv_kernel_size,
            "engram_norm_eps": config.rms_norm_eps,
            "engram_conv_norm_eps": config.rms_norm_eps,
            "engram_hc_mult": streams,
            "engram_table_dtype": table_dtype(tensors, "ple_embedding.ngram_embedding.shard_0.weight"),
        },
        backbone={"hidden_size": config.hidden_size, "vocab_size": config.vocab_size},
        numbers={
            "table": {
                "shards": max(1, len(shards) // max(1, len(tensors))),
                "multiple": config.make_ngram_vocab_size_divisible_by,
            }
        },
    )


def _write(config: EngramConfig, numbers: dict) -> dict:
    """Returns the fields of `Qwen4ExpTextConfig` that describe the memory."""
    return {
        "model_type": "qwen4_exp_text",
        "hidden_size": config.text_config.hidden_size,
        "vocab_size": config.engram_compressed_vocab_size,
        "num_hidden_layers": config.text_config.num_hidden_layers,
        "hc_count": config.engram_hc_mult,
        "rms_norm_eps": config.engram_norm_eps,
        "eos_token_id": config.engram_pad_token_id,
        "ple_layer_ids": [layer + 1 for layer in config.engram_layer_ids],
        "ple_embed_dim": config.engram_memory_dim,
        "ple_conv_kernel_size": config.engram_kernel_size,
        "ngram_size": config.engram_max_ngram_size,
        "heads_per_ngram": config.engram_n_heads,
        "ngram_vocab_size_base": config.engram_vocab_size,
        "make_ngram_vocab_size_divisible_by": numbers["table"]["multiple"],
        "split_ngram_parts": numbers["table"]["shards"],
        "seed": config.engram_seed,
    }


LAYOUT = Layout(
    name="qwen-ple",
    inside="ple",
    fixed={
        "engram_hash_scheme": "qwen",
        "engram_gate": "signed_sqrt_or_zero",
        "engram_projection_bias": False,
        "engram_zero_centred_norms": True,
        "engram_conv_across_documents": True,
    },
    read=_read,
    weight_map=weight_map,
    write=_write,
    numbers={"table": {"shards": 1, "multiple": 1}},
)
