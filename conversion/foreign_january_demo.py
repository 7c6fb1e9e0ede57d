"""The layout of the demo that DeepSeek published with the paper in January 2026 (`engram_demo_v1.py`).

Promises: its weights and ours are the same bytes in another order, both ways. Never runs the demo's code.
Source: the demo's `Engram`, `ShortConv`, `MultiHeadEmbedding` and `EngramConfig`.
"""

from ..configuration import EngramConfig
from .foreign_layouts import Constant, ForeignMemory, Layout, Part, Rows, WeightMap, needed, table_dtype


_TABLE = "multi_head_embedding.embedding.weight"

# The demo's names of fields, and ours.
_SAME = {
    "engram_vocab_size": "engram_vocab_size",
    "max_ngram_size": "engram_max_ngram_size",
    "n_head_per_ngram": "engram_n_heads",
    "pad_id": "engram_pad_token_id",
    "seed": "engram_seed",
    "kernel_size": "engram_kernel_size",
    "hc_mult": "engram_hc_mult",
}


def weight_map(config: EngramConfig, number: int, numbers: dict) -> WeightMap:
    """Returns where each tensor of the demo's `Engram` lies; D, M, E, H, W, w as in docs/design.md."""
    D, M, E = config.text_config.hidden_size, config.engram_hc_mult, config.engram_memory_dim
    heads, W, w = E // config.engram_head_dim, config.engram_head_dim, config.engram_kernel_size
    return {
        _TABLE: Rows((numbers["rows"][number], W)),
        "multi_head_embedding.offsets": Constant((heads,), "offsets"),
        **{f"key_projs.{m}.weight": Part((D, E), "key_value.weight", m * D) for m in range(M)},
        **{f"key_projs.{m}.bias": Part((D,), "key_value.bias", m * D) for m in range(M)},
        "value_proj.weight": Part((D, E), "key_value.weight", M * D),
        "value_proj.bias": Part((D,), "key_value.bias", M * D),
        **{f"norm1.{m}.weight": Part((D,), "key_norm", m) for m in range(M)},
        **{f"norm2.{m}.weight": Part((D,), "query_norm", m) for m in range(M)},
        **{f"short_conv.norms.{m}.weight": Part((D,), "conv_norm", m) for m in range(M)},
        "short_conv.conv.weight": Part((M * D, 1, w), "conv", turned=True),  # ours is (w, M * D)
    }


def _read(told: dict, tensors: dict) -> ForeignMemory:
    """Reads the fields of the demo's two configurations, `EngramConfig` and `BackBoneConfig`, from one file."""
    values = needed(told, _SAME, LAYOUT.name)
    width, hidden, layers = needed(told, ("n_embed_per_ngram", "hidden_size", "layer_ids"), LAYOUT.name)
    fields = dict(zip(_SAME.values(), values, strict=True))
    return ForeignMemory(
        layer_ids=layers,
        fields=fields
        | {
            "engram_head_dim": width // max(1, fields["engram_n_heads"]),
            "engram_table_dtype": table_dtype(tensors, _TABLE),
        },
        backbone={"hidden_size": hidden},
    )


def _write(config: EngramConfig, numbers: dict) -> dict:
    """Returns the fields of the demo's two configurations."""
    told = {name: getattr(config, own) for name, own in _SAME.items()}
    return told | {
        "engram_vocab_size": config.engram_vocab_sizes,
        "n_embed_per_ngram": config.engram_n_heads * config.engram_head_dim,
        "layer_ids": config.engram_layer_ids,
        "hidden_size": config.text_config.hidden_size,
    }


LAYOUT = Layout(
    name="january-demo",
    inside="engram",
    fixed={
        "engram_hash_scheme": "deepseek",
        "engram_gate": "signed_sqrt_or_zero",
        "engram_projection_bias": True,
        "engram_zero_centred_norms": False,
        "engram_reset_token_ids": None,
        "engram_norm_eps": 1.1920928955078125e-07,
        "engram_conv_norm_eps": 1e-05,
    },
    read=_read,
    weight_map=weight_map,
    write=_write,
)
