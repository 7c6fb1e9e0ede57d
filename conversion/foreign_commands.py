"""The verbs `engram import` and `engram export`: memories of other projects become grafts, and grafts their files.

Promises: everything is checked before anything is written; progress on stderr, the new folder on stdout. Contains no
logic of a layout.
Source: docs/foreign.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from .terminal import progress, user_errors, visible


_Layout = Annotated[str, typer.Argument(help="january-demo, qwen-ple or deepseek-v4.1.")]
_Out = Annotated[Path, typer.Argument(help="New folder.")]


@user_errors
def import_foreign(
    layout: _Layout,
    source: Annotated[Path, typer.Argument(help="Folder with the memory's safetensors files and config.json.")],
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of the model that the memory was trained with.")],
    out: _Out,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id, if the backbone has no tokenizer.")] = None,
    max_memory_shard_size: Annotated[str | None, typer.Option(help="Largest memory file; 8GB if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the Hub.")] = None,
    token: Annotated[str | None, typer.Option(help="For a private backbone, if you are not logged in.")] = None,
) -> None:
    """Write a graft of a backbone with the memory of another project, whose bytes stay as they are.

    For example: engram import january-demo demo-weights backbone my-graft
    """
    from .foreign_import import import_memory

    options = {"tokenizer": tokenizer, "max_memory_shard_size": max_memory_shard_size}
    options |= {"revision": revision, "token": token}
    given = {name: value for name, value in options.items() if value is not None}
    with progress.status(f"importing {visible(str(source))}") as status:
        folder = import_memory(layout, source, backbone, out, on_bytes=_counting(status.update), **given)
    print(visible(str(folder)))


@user_errors
def export_foreign(
    layout: _Layout,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a graft.")],
    out: _Out,
) -> None:
    """Write the memory of a graft in the layout of another project.

    For example: engram export january-demo my-graft demo-weights
    """
    from .foreign_import import export_memory

    with progress.status(f"exporting {visible(str(checkpoint))}") as status:
        folder = export_memory(layout, checkpoint, out, on_bytes=_counting(status.update))
    print(visible(str(folder)))


def _counting(show: Callable[[str], None]) -> Callable[[int], None]:
    """Returns what shows how many bytes were written."""
    total = 0

    def count(written: int) -> None:
        nonlocal total
        total += written
        show(f"{decimal(total)} written")

    return count
