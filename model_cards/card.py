"""Writes a checkpoint's model card from its configuration and from measured results.

Promises: sizes come from the checkpoint's own files; results that were not measured are marked so.
"""

from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from ..configuration import EngramConfig
from ..files_checkpoint_engram import expected_shards
from ..rows_quantised_engram import row_bytes


TEMPLATE = Path(__file__).parent / "template.md"
NOT_MEASURED = "not measured"


def write_model_card(
    checkpoint: str | Path,
    base_model: str,
    results: str | None = None,
    text: str = "",
    name: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes `README.md` into a checkpoint's folder.

    Args:
        checkpoint (`str` or `Path`): the checkpoint.
        base_model (`str`): name or Hub id of the backbone.
        results (`str`, *optional*): a Markdown table of measurements.
        text (`str`, *optional*): how the memory was made.
        name (`str`, *optional*): name of the model; the folder's if None.
        license (`str`, *optional*): licence of the weights, as the Hub names it.

    Returns:
        `Path` of the card.
    """
    checkpoint = Path(checkpoint)
    config = EngramConfig.from_pretrained(checkpoint)
    on_hub = base_model.count("/") == 1 and " " not in base_model
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["engram"],
        license=license,
        base_model=base_model if on_hub else None,
    )
    values = {
        "name": name or checkpoint.name,
        "base_model": base_model,
        "base_link": f"https://huggingface.co/{base_model}" if on_hub else "#memory",
        "memory": _memory_table(config),
        "results": results or NOT_MEASURED,
        "text": text,
    }
    body = TEMPLATE.read_text(encoding="utf-8")
    for key, value in values.items():
        body = body.replace("{{ " + key + " }}", value)
    path = checkpoint / "README.md"
    path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return path


def _memory_table(config: EngramConfig) -> str:
    """Returns the memory's sizes as a Markdown table."""
    tables = {name: shape for name, (shape, _) in expected_shards(config).items() if name.startswith("memory.tables.")}
    rows = sum(shape[0] for shape in tables.values())
    size = rows * row_bytes(getattr(torch, config.engram_table_dtype), config.engram_head_dim)
    values = {
        "layers (from 0)": ", ".join(map(str, config.engram_layer_ids)),
        "orders x heads": f"2..{config.engram_max_ngram_size} x {config.engram_n_heads}",
        "rows": f"{rows:,} of {config.engram_head_dim} values ({config.engram_table_dtype}), {size:,} bytes",
        "classes of token ids": f"{config.engram_compressed_vocab_size:,}",
        "convolution": f"kernel size {config.engram_kernel_size}" if config.engram_kernel_size else "none",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())])
