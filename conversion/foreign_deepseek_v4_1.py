"""The layout of DeepSeek-V4.1's memory: six tensors for each layer, in files of their own (shards 47 and 48 of 48).

A row is W values in float8_e4m3fn and one power of two (float8_e8m0) for each 32 of them, in two tensors there and in
one record here.
Promises: rows, norms and wkv's values are the same bytes, both ways. wkv is bfloat16 here, which holds its values
exactly; its scales are kept beside the memory for an export. Never rounds without saying so.
Source: the names, types and shapes of the released shards and the `engram_*` fields of their `config.json`.
"""

from ..configuration import EngramConfig
from .foreign_layouts import Float8Blocks, ForeignMemory, Kept, Layout, Part, Rows, WeightMap, needed


GROUP = 32  # values that share a scale: of a row, and 32 x 32 of wkv

_SAME = {
    "engram_vocab_size": "engram_vocab_size",
    "engram_max_ngram_size": "engram_max_ngram_size",
    "engram_n_heads": "engram_n_heads",
    "engram_head_dim": "engram_head_dim",
    "hc_mult": "engram_hc_mult",
    "rms_norm_eps": "engram_norm_eps",
}
_PAD_NAMES = ("engram_pad_token_id", "engram_pad_id")


def weight_map(config: EngramConfig, number: int, numbers: dict) -> WeightMap:
    """Returns where each of the six tensors lies; D, M, E, W as in docs/design.md."""
    D, M, E = config.text_config.hidden_size, config.engram_hc_mult, config.engram_memory_dim
    rows, W, outputs = numbers["rows"][number], config.engram_head_dim, (M + 1) * D
    return {
        "embed.weight": Rows((rows, W), dtype="F8_E4M3"),
        "embed.scale": Rows((rows, W // GROUP), column=W, dtype="F8_E8M0"),
        "wkv.weight": Float8Blocks((outputs, E), "key_value.weight", scale="wkv.scale"),  # M keys, then the value
        "wkv.scale": Kept((-(-outputs // GROUP), -(-E // GROUP)), "F8_E8M0"),
        "q_weight": Part((M, D), "query_norm", dtype="BF16"),
        "k_weight": Part((M, D), "key_norm", dtype="BF16"),
    }


def _read(told: dict, tensors: dict) -> ForeignMemory:
    """Reads the fields of `text_config`."""
    told = told.get("text_config", told)
    fields = dict(zip(_SAME.values(), needed(told, _SAME, LAYOUT.name), strict=True))
    names = ("engram_layer_ids", "engram_num_embeddings", "engram_compressed_vocab_size", "hidden_size")
    layers, rows, classes, hidden = needed(told, names, LAYOUT.name)
    pad_name = next((name for name in _PAD_NAMES if name in told), _PAD_NAMES[0])
    (fields["engram_pad_token_id"],) = needed(told, [pad_name], LAYOUT.name)
    return ForeignMemory(
        layer_ids=layers,
        fields=fields,
        backbone={"hidden_size": hidden, "engram_compressed_vocab_size": classes},
        numbers={"pad_name": pad_name},
        rows=rows,
    )


def _write(config: EngramConfig, numbers: dict) -> dict:
    """Returns the fields of `text_config` that describe the memory."""
    told = {name: getattr(config, own) for name, own in _SAME.items()}
    told |= {
        "engram_layer_ids": config.engram_layer_ids,
        "engram_num_embeddings": numbers["rows"],
        "engram_compressed_vocab_size": config.engram_compressed_vocab_size,
        numbers["pad_name"]: config.engram_pad_token_id,
        "hidden_size": config.text_config.hidden_size,
    }
    return {"text_config": told}


LAYOUT = Layout(
    name="deepseek-v4.1",
    inside="engram",
    fixed={
        "engram_hash_scheme": "deepseek",
        "engram_seed": 0,
        "engram_gate": "signed_sqrt",
        "engram_projection_bias": False,
        "engram_zero_centred_norms": False,
        "engram_reset_token_ids": None,
        "engram_kernel_size": 0,
        "engram_table_dtype": "float8_e4m3fn",
    },
    read=_read,
    weight_map=weight_map,
    write=_write,
    numbers={"pad_name": _PAD_NAMES[0]},
)
