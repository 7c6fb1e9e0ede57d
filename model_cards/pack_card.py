"""Publishes a knowledge pack on the Hub: its file, and a card from what the pack itself says.

Promises: the file and every name are checked before anything is sent; file and card arrive in one commit, or nothing
does; figures come from the pack's own report, and what it does not hold is marked as not measured.
Source: docs/packs.md, "On the Hub".
"""

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..knowledge_pack_engram import SUFFIX, KnowledgePack
from .card import fill
from .evidence import NOT_SAID, pack_report, plain


TEMPLATE = Path(__file__).parent / "pack_template.md"


def publish_pack(
    file: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Uploads a pack and its card to a repository of its own, which is made if it is missing.

    Args:
        file (`str` or `os.PathLike`): the pack, `<name>.engram-pack.safetensors`.
        repo_id (`str`): such as "me/people". Its README.md is replaced.
        base_model (`str`): Hub id of the graft that reads the pack; another graft of the same backbone cannot.
        license (`str`, *optional*): as the Hub names it, such as "cc0-1.0".
        private (`bool`, *optional*): of a new repository; your default if None.
        token (`str` or `bool`, *optional*): that of your login if None.

    Returns:
        `str`: address of the commit.

    Raises:
        `FileNotFoundError` or [`EngramFormatError`]: if there is no such pack.
        `ValueError`: for a name of a file or repository that a model could not load it by.

    Example:

    ```python
    >>> publish_pack("people.engram-pack.safetensors", "me/people", base_model="me/my-graft", license="cc0-1.0")
    ```"""
    file = Path(file)
    if not file.name.endswith(SUFFIX):
        raise ValueError(f"'{file}' must be named <name>{SUFFIX}, or load_memory would not find it on the Hub.")
    for name, value in {"repo_id": repo_id, "base_model": base_model}.items():
        validate_repo_id(value)
        if value.count("/") != 1:
            raise ValueError(f"{name} {value!r} must be owner/name, such as me/people.")
    card = pack_card(KnowledgePack.load(file), file.name, repo_id, base_model, license)
    hub = HfApi(token=token)
    hub.create_repo(repo_id, private=private, exist_ok=True)
    sent = [CommitOperationAdd(file.name, file), CommitOperationAdd("README.md", card.encode())]
    return hub.create_commit(repo_id, sent, commit_message=f"Knowledge pack {file.name}").commit_url


def pack_card(pack: KnowledgePack, file_name: str, repo_id: str, base_model: str, license: str | None = None) -> str:
    """Returns the card of a pack as Markdown; arguments as for [`publish_pack`]."""
    metadata = ModelCardData(
        library_name="engram-transformers",
        tags=["engram", "engram-pack"],
        license=license,
        base_model=base_model,
        base_model_relation="adapter",
    )
    provenance = {name: value for name, value in pack.provenance.items() if name != "report"}
    values = {
        "repo_id": repo_id,
        "name": file_name.removesuffix(SUFFIX),
        "file": file_name,
        "base_model": base_model,
        "records": f"{len(pack):,}",
        "bytes": f"{pack.nbytes:,}",
        "mode": pack.mode,
        "layers": ", ".join(map(str, pack.fits["layers"])),
        "report": pack_report(pack),
        "provenance": "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in provenance.items()) or NOT_SAID,
    }
    return fill(TEMPLATE, metadata, values)
