"""The verbs `engram card` and `engram publish`: a checkpoint's model card, and its way to the Hub.

Promises: what is wrong with a checkpoint is said before anything is written or sent; progress on stderr, the result on
stdout.
Source: docs/publishing.md.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..inspection import verify_checkpoint
from ..model_cards import write_model_card
from .publish import publish_checkpoint
from .terminal import check_new_file, progress, user_errors, visible


_Folder = Annotated[Path, typer.Argument(help="Folder of an Engram checkpoint.")]
_License = Annotated[str | None, typer.Option(help="Of the weights, as the Hub names it, such as apache-2.0.")]
_BaseModel = Annotated[str | None, typer.Option(help="Hub id of the backbone; that of the receipt if left out.")]


@user_errors
def card(
    checkpoint: _Folder,
    base_model: _BaseModel = None,
    name: Annotated[str | None, typer.Option(help="Hub id of the checkpoint; the folder's name if left out.")] = None,
    license: _License = None,
    base_license: Annotated[str | None, typer.Option(help="Of the backbone.")] = None,
    data: Annotated[str | None, typer.Option(help="What the memory was trained on, and its licence.")] = None,
    results: Annotated[Path | None, typer.Option(help="Measurements, a file of Markdown.")] = None,
    trainer_state: Annotated[Path | None, typer.Option(help="trainer_state.json, if it is elsewhere.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="engram_graft.json, if it is elsewhere.")] = None,
    pack: Annotated[list[Path] | None, typer.Option(help="A knowledge pack; those in the folder if left out.")] = None,
    generation: Annotated[bool, typer.Option(help="Also check every way of generating: minutes.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a card that is there.")] = False,
) -> None:
    """Write a checkpoint's model card from what was measured; the rest says "not measured".

    Example: engram card my-graft --base-model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0
    """
    check_new_file(checkpoint / "README.md", overwrite)
    for file in (results, trainer_state, receipt):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"'{file}' is not a file: name one that is there, or leave the option out.")
    with progress.status(f"verifying {visible(str(checkpoint))}"):
        findings = verify_checkpoint(checkpoint, generation=generation)
    written = write_model_card(
        checkpoint,
        base_model,
        None if results is None else results.read_text(encoding="utf-8"),
        name=name,
        license=license,
        base_license=base_license,
        data=data,
        findings=findings,
        trainer_state=trainer_state,
        receipt_file=receipt,
        pack_files=pack,
    )
    print(visible(str(written)))


@user_errors
def publish(
    checkpoint: _Folder,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/my-graft; made if it is missing.")],
    base_model: _BaseModel = None,
    license: _License = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; made if it is missing.")] = None,
    token: Annotated[str | None, typer.Option(help="If you are not logged in.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload tables of zeros too.")] = False,
) -> None:
    """Verify a checkpoint and upload it with its card; from_pretrained("me/my-graft") loads it then.

    Example: engram publish my-graft me/my-graft --license apache-2.0
    """
    told = {"base_model": base_model, "license": license, "private": private, "revision": revision, "token": token}
    print(publish_checkpoint(checkpoint, repo, zeros=yes, **told))  # the Hub's own bars show progress
