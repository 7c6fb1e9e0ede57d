"""Drafts: the folder beside its place in which a graft is made, and found again after a kill.

Promises: a draft's name is a digest of all that the graft is made of, so a run continues only a draft of the same
arguments, donor and versions; a draft of a dead run with others is removed; a run that is alive is left alone. A graft
that fails leaves nothing. Never writes into the final folder, which the whole draft replaces.
Source: docs/grafting.md.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..files_atomic_engram import locked


@contextmanager
def draft_for(out: Path, made_of: str) -> Iterator[Path]:
    """Yields the draft of a graft; if the block succeeds, the draft becomes `out`.

    Args:
        out (`Path`): the final folder, missing or empty.
        made_of (`str`): says all that decides about the graft's bytes.

    Raises:
        `BlockingIOError`: if another process makes the same graft.
    """
    prefix, digest = f".{out.name}.grafting-", hashlib.sha256(made_of.encode()).hexdigest()[:16]
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.iterdir():
        if re.fullmatch(rf"{re.escape(prefix)}\w+", left.name) and not left.name.endswith(digest):
            with suppress(OSError), locked(left, wait=False):  # locked: it belongs to a run that is alive
                shutil.rmtree(left, ignore_errors=True)
    draft = out.with_name(prefix + digest)
    draft.mkdir(exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(draft, wait=False))
        except BlockingIOError as error:
            raise BlockingIOError(
                errno.EAGAIN, "another process makes the same graft: wait until it is done, or end it", str(out)
            ) from error
        try:
            yield draft
            if out.exists():
                out.rmdir()
            os.replace(draft, out)
        except Exception:  # a kill, and Ctrl-C, leave the draft for the next run
            shutil.rmtree(draft, ignore_errors=True)
            raise
