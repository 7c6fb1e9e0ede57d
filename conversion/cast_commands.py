"""The command `engram cast`: a checkpoint whose tables have another type.

Promises: progress and the report on stderr, the new folder on stdout; everything is checked before a file is written.
Never contains logic: `table_cast` does the work.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..files_safetensors_engram import MAX_MEMORY_SHARD_SIZE
from .terminal import progress, user_errors, visible


@user_errors
def cast(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an Engram checkpoint.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="int8, float8_e4m3fn, bfloat16, float16 or float32.")],
    text: Annotated[
        Path | None, typer.Option(help="A text in UTF-8; the loss on it is measured before and after.")
    ] = None,
    max_memory_shard_size: Annotated[str, typer.Option(help="Largest memory file.")] = MAX_MEMORY_SHARD_SIZE,
) -> None:
    """Write a copy of a checkpoint whose tables have another type, and say what that changes.

    Example: engram cast my-graft my-graft-int8 --dtype int8 --text sample.txt
    """
    from .table_cast import cast as cast_tables

    read = None if text is None else text.read_text(encoding="utf-8")
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task(f"casting {visible(str(checkpoint))}", total=None)
        report = cast_tables(
            checkpoint,
            out,
            dtype,
            text=read,
            max_memory_shard_size=max_memory_shard_size,
            advance=lambda total, done: bar.update(task, total=total, completed=done),
        )
    for line in report.lines():
        progress.print(line, highlight=False, soft_wrap=True)
    print(visible(str(report.folder)))
