"""Publishes a whole checkpoint on the Hub: its files as they are, with a card.

Promises: the checkpoint is verified before anything is sent, all but its generation; tables of zeros are sent only if
that is asked for; all files appear in one commit or none does, and what an older checkpoint left there goes in the same
commit; afterwards the Hub's digests are compared with the files. Never changes a file of the folder, never sends what
training left there (optimizer states, arguments, which may hold a token).
Source: docs/publishing.md.
"""

import os
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..files_atomic_engram import WITHOUT_TABLES_NAME, checkpoint_in, is_own
from ..files_safetensors_engram import read_header, read_index, start_of_data
from ..inspection import verify_checkpoint
from ..model_cards import model_card
from ..rows_placement_engram import TABLES_PREFIX


logger = logging.get_logger(__name__)

CARD = "README.md"
# What describes a checkpoint, besides its weights and its code.
DESCRIPTION = ("*.json", "*_engram.py", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", CARD)
# Bytes of a table that are looked at at a time.
BLOCK = 1 << 26


def publish_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    zeros: bool = False,
) -> str:
    """Uploads a checkpoint to a repository, which is made if it is missing.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        repo_id (`str`): such as "me/my-graft". What it holds of an older checkpoint is replaced.
        base_model (`str`, *optional*): Hub id of the backbone, for the card; that of the receipt if None.
        license (`str`, *optional*): of the weights, as the Hub names it, for the card.
        private (`bool`, *optional*): of a new repository; your default if None.
        revision (`str`, *optional*): a branch, which is made if it is missing; the main one if None.
        token (`str` or `bool`, *optional*): that of your login if None.
        zeros (`bool`, *optional*, defaults to `False`): upload tables that hold nothing but zeros.

    Returns:
        `str`: address of the commit.

    Raises:
        `FileNotFoundError`: if there is no checkpoint.
        `ValueError`: if it is damaged, is a delta, has tables of zeros, or the names cannot be used.
        `OSError`: if it could not be sent, or the repository holds something else afterwards.

    Example:

    ```python
    >>> publish_checkpoint("my-graft", "me/my-graft", license="apache-2.0")
    ```"""
    folder = Path(folder)
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id {repo_id!r} must be owner/name, such as me/my-graft.")
    if (folder / CARD).is_file() and (base_model or license):
        raise ValueError(
            f"'{folder}' has a {CARD}, which is sent as it is, so base_model and license would not be read: leave them "
            f"out, or write the card again with `engram card {folder} --overwrite`."
        )
    findings = _verified(folder)
    files = checkpoint_files(folder)
    fresh = sum(zero_tables(folder).values())
    if fresh and not zeros:
        raise ValueError(
            f"{fresh:,} bytes of the memory in '{folder}' are tables of zeros, and would be uploaded byte for "
            "byte: train the memory first, or publish the recipe, from which the graft is made again in seconds. --yes "
            "(zeros=True) uploads them all the same."
        )
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    if CARD not in files:
        text = f"{fresh:,} bytes of the tables hold nothing but zeros: they were not trained." if fresh else ""
        card = model_card(folder, base_model, text=text, name=repo_id, license=license, findings=findings)
        additions.append(CommitOperationAdd(CARD, card.encode()))
    size = sum(addition.upload_info.size for addition in additions)
    left = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in files)
    # A warning, because the default verbosity hides the rest, and an upload may take hours.
    logger.warning(
        f"{len(additions)} files, {size:,} bytes, {fresh:,} of them zeros, go to '{repo_id}'. "
        f"Not sent: {', '.join(left) or 'nothing'}."
    )
    return _send(HfApi(token=token), repo_id, additions, private, revision)


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Returns the files that are published, by their names in the repository."""
    names = {path.name for pattern in DESCRIPTION for path in folder.glob(pattern)} | {WITHOUT_TABLES_NAME}
    indexed = set(read_index(folder).values())
    return {name: folder / name for name in sorted(names | indexed) if name in indexed or not is_own(name)}


def zero_tables(folder: Path) -> dict[str, int]:
    """Returns the bytes of tables that hold nothing but zeros, by name; others are read up to their first value."""
    weight_map, found = read_index(folder), {}
    for name in sorted(name for name in weight_map if name.startswith(TABLES_PREFIX)):
        path = folder / weight_map[name]
        entry = read_header(path)[name]
        first = start_of_data(path)
        data = np.memmap(path, np.uint8, mode="r")[first + entry.begin : first + entry.end]
        if not any(data[start : start + BLOCK].any() for start in range(0, len(data), BLOCK)):
            found[name] = len(data)
    return found


def _verified(folder: Path) -> list:
    """Returns what a check of the checkpoint found.

    Raises:
        `ValueError`: if anything is wrong.
    """
    if checkpoint_in(folder) == "delta":
        raise ValueError(
            f"'{folder}' holds what training changed of another checkpoint (a memory delta), and not its weights: load "
            "it with from_pretrained, save_pretrained it into a new folder, and publish that."
        )
    findings = verify_checkpoint(folder, generation=False)
    wrong = [f"{found.section}: {found.detail}" for found in findings if not found.ok]
    if wrong:
        raise ValueError(f"'{folder}' is not published, because it would not load: {'; '.join(wrong)}")
    return findings


def _send(
    hub: HfApi, repo_id: str, additions: list[CommitOperationAdd], private: bool | None, revision: str | None
) -> str:
    """Makes the repository, sends all files in one commit, and compares what is there then; returns its address."""
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        info = hub.model_info(repo_id, revision=revision)
        sent = {addition.path_in_repo for addition in additions}
        there = [file.rfilename for file in info.siblings or ()]
        # A single file or an adapter of an older checkpoint would be read with the new one.
        gone = [CommitOperationDelete(name) for name in there if is_own(name) and name not in sent]
        message = {"commit_message": "Engram checkpoint", "revision": revision, "parent_commit": info.sha}
        commit = hub.create_commit(repo_id, [*additions, *gone], **message)
    except (HTTPError, RuntimeError) as error:  # RuntimeError: huggingface_hub's own around the first file's error
        raise OSError(
            f"'{repo_id}' could not be published ({error.__cause__ or error}). The files appear in one commit or not "
            "at all, so what was there before is whole: publish again, and what arrived is not sent a second time."
        ) from error
    try:
        wrong = list(_differing(hub, repo_id, commit.oid, additions))
    except HTTPError as error:
        raise OSError(
            f"'{repo_id}' was published as {commit.oid}, but could not be compared with the files ({error}): publish "
            "again, which compares them and sends nothing that is there."
        ) from error
    if wrong:
        raise OSError(
            f"'{repo_id}' does not hold what was sent: {', '.join(wrong)} of commit {commit.oid} differ. Do not use "
            "that commit: publish again, and if it stays so, report it to the Hub."
        )
    return commit.commit_url


def _differing(hub: HfApi, repo_id: str, commit: str, additions: list[CommitOperationAdd]) -> Iterator[str]:
    """Yields the names of files whose size or digest at a commit is another one than here."""
    names = [addition.path_in_repo for addition in additions]
    there = {info.path: info for info in hub.get_paths_info(repo_id, names, revision=commit)}
    for addition in additions:
        info, here = there.get(addition.path_in_repo), addition.upload_info
        if info is None or info.size != here.size:
            yield addition.path_in_repo
        elif info.lfs is not None:
            if info.lfs.sha256 != here.sha256.hex():
                yield addition.path_in_repo
        else:  # a small file, of which the Hub tells git's own digest
            with addition.as_file() as file:
                blob = b"blob %d\0" % here.size + file.read()
            if info.blob_id != sha1(blob, usedforsecurity=False).hexdigest():
                yield addition.path_in_repo
