"""Publishes a knowledge pack on the Hub: its file, and a card from what the pack itself says.

Promises: the file and every name are checked before anything is sent; file and card arrive in one commit, or nothing
does; figures come from the pack's own report, and what it does not hold is marked as not measured.
Source: docs/packs.md, "On the Hub".
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..knowledge_pack_engram import SUFFIX, KnowledgePack
from .card import NOT_MEASURED


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
    provenance = dict(pack.provenance)
    report = provenance.pop("report", None)
    values = {
        "repo_id": repo_id,
        "name": file_name.removesuffix(SUFFIX),
        "file": file_name,
        "base_model": base_model,
        "records": f"{len(pack):,}",
        "bytes": f"{pack.nbytes:,}",
        "mode": pack.mode,
        "layers": ", ".join(map(str, pack.fits["layers"])),
        "report": "\n".join(_report_table(report)) if isinstance(report, Mapping) else NOT_MEASURED,
        "provenance": "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in provenance.items())
        or "not said",
    }
    body = TEMPLATE.read_text(encoding="utf-8")
    for key, value in values.items():
        body = body.replace("{{ " + key + " }}", value)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _report_table(report: Mapping) -> Iterator[str]:
    """Yields the rows of a report from [`report_pack`]."""
    yield from ("| texts | number | with the pack | without |", "| --- | ---: | ---: | ---: |")
    for kind in ("taught", "unseen"):
        if kind in report:
            now = report[kind]
            right, before = f"{now['right']:.1%} right", f"{now['before']['right']:.1%} right"
            yield f"| {kind} phrasings | {now['texts']} | {right} | {before} |"
    for kind, found in report["other_texts"].items():
        same = f"loss {found['loss']:.4f}, {found['texts_identical']:.1%} identical bit for bit"
        yield f"| {_plain(kind)} | {found['texts']} | {same} | loss {found['loss_before']:.4f} |"


def _plain(value: object) -> str:
    """Returns a value as text in which Markdown finds no marks, tables or lines."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in " ".join(str(value).split()))
