"""The model card of a checkpoint: what it is, how it was made, what was measured, what it needs.

Promises: every figure is evidence that lies in the folder or is given, and a blank says that it was not measured; the
metadata are made by huggingface_hub's own class. Never reads a weight, never asks the Hub.
Source: docs/publishing.md; the Hub's page on model cards.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from ..configuration import EngramConfig
from ..knowledge_pack_engram import SUFFIX
from .evidence import (
    NOT_MEASURED,
    NOT_SAID,
    checks,
    how_grafted,
    memory_sizes,
    needs,
    packs,
    plain,
    read_json,
    training_log,
)


TEMPLATE = Path(__file__).parent / "template.md"


def write_model_card(checkpoint: str | Path, base_model: str | None = None, results: str | None = None, **told) -> Path:
    """Writes [`model_card`] as `README.md` into a checkpoint's folder; the arguments are the same.

    Returns:
        `Path` of the card.

    Example:

    ```python
    >>> write_model_card("my-graft", "HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
    ```"""
    path = Path(checkpoint) / "README.md"
    path.write_text(model_card(checkpoint, base_model, results, **told), encoding="utf-8")
    return path


def model_card(
    checkpoint: str | Path,
    base_model: str | None = None,
    results: str | None = None,
    *,
    text: str = "",
    name: str | None = None,
    license: str | None = None,
    base_license: str | None = None,
    data: str | None = None,
    findings: Iterable = (),
    trainer_state: str | Path | None = None,
    receipt_file: str | Path | None = None,
    pack_files: Iterable[str | Path] | None = None,
) -> str:
    """Returns the card of a checkpoint as Markdown.

    Args:
        checkpoint (`str` or `Path`): the checkpoint's folder; weights may be elsewhere.
        base_model (`str`, *optional*): name or Hub id of the backbone; that of the receipt if None.
        results (`str`, *optional*): measurements as Markdown.
        text (`str`, *optional*): Markdown on how the memory was made.
        name (`str`, *optional*): the model's name or Hub id; the folder's if None.
        license (`str`, *optional*): licence of the weights, as the Hub names it.
        base_license (`str`, *optional*): licence of the backbone.
        data (`str`, *optional*): what the memory was trained on, and its licence.
        findings (iterable of [`Finding`], *optional*): what `verify_checkpoint` found.
        trainer_state (`str` or `Path`, *optional*): log of the training; `trainer_state.json` of the folder if None.
        receipt_file (`str` or `Path`, *optional*): receipt of the graft; `engram_graft.json` of the folder if None.
        pack_files (iterable of `str` or `Path`, *optional*): knowledge packs; those in the folder if None.

    Raises:
        `FileNotFoundError`: if the folder has no configuration or index.
        `ValueError`: if a file is not what its name says.
    """
    checkpoint = Path(checkpoint)
    config = EngramConfig.from_pretrained(checkpoint)
    graft = read_json(Path(receipt_file or checkpoint / "engram_graft.json"))
    base_model = base_model or graft.get("donor")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model or "")
    reads_images = config.composite_config is not None
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if reads_images else "text-generation",
        tags=["engram", config.whole_config.model_type],
        license=license,
        base_model=base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
    )
    found = sorted(checkpoint.glob(f"*{SUFFIX}")) if pack_files is None else map(Path, pack_files)
    values = {
        "name": name or checkpoint.resolve().name,
        "auto_class": "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM",
        "base_model": base_model or NOT_SAID,
        "base": f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else plain(base_model or "A model"),
        "memory": memory_sizes(config),
        "needs": needs(checkpoint, config),
        "graft": how_grafted(graft),
        "text": text,
        "training": training_log(read_json(Path(trainer_state or checkpoint / "trainer_state.json"))),
        "results": results or NOT_MEASURED,
        "checks": checks(findings),
        "packs": packs(found),
        "license": license or NOT_SAID,
        "base_license": base_license or NOT_SAID,
        "data": data or NOT_SAID,
    }
    return fill(TEMPLATE, metadata, values)


def fill(template: Path, metadata: ModelCardData, values: Mapping[str, str]) -> str:
    """Returns a template with its blanks filled in, below the metadata; a value is never filled in itself."""
    body = re.sub(r"\{\{ (\w+) \}\}", lambda blank: values[blank[1]], template.read_text(encoding="utf-8"))
    body = re.sub(r"\n{3,}", "\n\n", body)  # a blank that is filled with nothing
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"
