"""Verbs that make new checkpoints from old ones: `engram resize`, `prune`, `merge`, `extract` and `strip`.

Every verb calls the library and contains no logic. Promises: those of `engram` (see `cli.py`). Never changes a
checkpoint that it reads.
Source: docs/surgery.md.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..knowledge_pack_engram import SUFFIX, KnowledgePack
from .extract import extract_memory, extract_pack
from .merge import HOW, merge_memories
from .prune import prune_memory
from .readdress import text_blocks
from .resize import resize_memory
from .strip import strip_memory
from .terminal import progress, user_errors, visible


_Checkpoint = Annotated[Path, typer.Argument(metavar="IN", help="Folder of an Engram checkpoint.")]
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")]
_ShardSize = Annotated[str, typer.Option(help="Largest memory file.")]


@user_errors
def resize(
    folder: _Checkpoint,
    out: _Out,
    vocab_size: Annotated[
        str | None, typer.Option(help="New least rows of a head, or one number for each order, such as 1000,5000.")
    ] = None,
    n_heads: Annotated[int | None, typer.Option(help="New number of heads for each order.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text in UTF-8 whose n-grams keep their rows.")] = None,
    pack: Annotated[Path | None, typer.Option(help="Knowledge pack whose n-grams keep their rows.")] = None,
    max_memory_shard_size: _ShardSize = "8GB",
) -> None:
    """Give a memory another number of rows or heads; rows follow the n-grams of a text.

    Example: engram resize my-graft larger --vocab-size 50000 --text corpus.txt
    """
    sizes = _numbers(vocab_size, "--vocab-size", int)
    with progress.status(f"resizing {visible(str(folder))}"):
        report = resize_memory(
            folder,
            out,
            vocab_size=sizes[0] if sizes is not None and len(sizes) == 1 else sizes,
            n_heads=n_heads,
            texts=None if text is None else text_blocks(text),
            pack=None if pack is None else KnowledgePack.load(pack),
            max_memory_shard_size=max_memory_shard_size,
        )
    _say(str(report))
    print(visible(str(out)))


@user_errors
def prune(
    folder: _Checkpoint,
    out: _Out,
    min_norm: Annotated[float | None, typer.Option(help="Rows with a smaller norm become zero; inf for all.")] = None,
    untouched: Annotated[
        bool, typer.Option("--untouched", help="Change no row: those that are zero take no disk.")
    ] = False,
    max_memory_shard_size: _ShardSize = "8GB",
) -> None:
    """Make small rows zero; blocks of zeros take no disk.

    Example: engram prune my-graft smaller --min-norm 0.05
    """
    with progress.status(f"pruning {visible(str(folder))}"):
        report = prune_memory(
            folder, out, min_norm=min_norm, untouched=untouched, max_memory_shard_size=max_memory_shard_size
        )
    _say(str(report))
    print(visible(str(out)))


@user_errors
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="IN IN... OUT", help="Checkpoints, and a new folder.")],
    how: Annotated[str, typer.Option(help=f"{', '.join(HOW[:-1])} or {HOW[-1]} (task arithmetic; needs --base).")],
    weights: Annotated[str | None, typer.Option(help="A weight for each memory, such as 0.5,1.")] = None,
    base: Annotated[Path | None, typer.Option(help="Checkpoint that all memories were trained from.")] = None,
    merge_readers: Annotated[
        bool, typer.Option("--merge-readers", help="Merge projections that differ too; measure the loss.")
    ] = False,
    max_memory_shard_size: _ShardSize = "8GB",
) -> None:
    """Make one memory of several with the same layout; backbone and other files are the first one's.

    Example: engram merge law medicine both --how sum
    """
    *sources, out = folders
    with progress.status(f"merging {len(sources)} memories"):
        report = merge_memories(
            sources,
            out,
            how=how,
            weights=_numbers(weights, "--weights", float),
            base=base,
            merge_readers=merge_readers,
            max_memory_shard_size=max_memory_shard_size,
        )
    for line in report.lines():
        _say(line)
    print(visible(str(out)))


@user_errors
def extract(
    folder: _Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help=f"New folder, or with --text a file NAME{SUFFIX}.")],
    text: Annotated[Path | None, typer.Option(help="Text in UTF-8 whose n-grams become a knowledge pack.")] = None,
) -> None:
    """Write the memory without its backbone, or with --text what it gives for a text as a knowledge pack.

    Example: engram extract my-graft law.engram-pack.safetensors --text law.txt
    """
    with progress.status(f"extracting from {visible(str(folder))}"):
        if text is None:
            if out.name.endswith(SUFFIX):
                raise ValueError(f"'{out}' is a pack's name: --text says of which n-grams, or name a folder.")
            extract_memory(folder, out)
        else:
            pack = extract_pack(folder, out, text_blocks(text))
            _say(f"{len(pack):,} records, {pack.nbytes:,} bytes")
    print(visible(str(out)))


@user_errors
def strip(folder: _Checkpoint, out: _Out) -> None:
    """Write the backbone without its memory; it loads with Transformers alone.

    Example: engram strip my-graft backbone
    """
    with progress.status(f"stripping {visible(str(folder))}"):
        strip_memory(folder, out)
    print(visible(str(out)))


VERBS = (resize, prune, merge, extract, strip)


def _say(text: str) -> None:
    """Prints what was done, on stderr."""
    progress.print(visible(text), highlight=False, soft_wrap=True, markup=False)


def _numbers(text: str | None, option: str, kind: type) -> list | None:
    """Parses a list such as "1,10"."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be numbers separated by commas, such as 1,10.") from error
