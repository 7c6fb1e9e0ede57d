"""What the verbs of the `engram` command share: consoles, errors, texts of others on a screen, tokenizers, new files.

Promises: a user's mistake is one message on stderr and exit code 2; a text from a file cannot control the terminal; a
place for a new file is checked before the work that fills it. Never overwrites what the user did not name.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError


progress = Console(stderr=True)
result = Console()

# SafetensorError: a full disk. RecursionError: JSON that is nested as deeply as Python reads it. NotImplementedError: a
# backbone or a setting that is not supported.
_USERS_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    NotImplementedError,
    StrictDataclassError,
    SafetensorError,
    RecursionError,
)


def user_errors(verb: Callable) -> Callable:
    """Prints errors that a user can cause as one message and exits with 2."""

    @functools.wraps(verb)
    def run(*args, **kwargs):
        try:
            return verb(*args, **kwargs)
        except _USERS_ERRORS as error:
            said = visible(f"{type(error).__name__}: {error}", keep="\n")
            progress.print(Text.assemble(("error:", "red"), " ", said), soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def visible(text: str, keep: str = "") -> str:
    """Returns a text in which characters that control a terminal are written as their escapes."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def load_tokenizer(name: str):
    """Loads a tokenizer from a folder or the Hub.

    Raises:
        `ValueError`: if there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise ValueError(f"'{name}' holds no tokenizer that can be read: {error}") from error


def check_new_file(path: Path, overwrite: bool) -> None:
    """Checks that a file can be written, without writing anything.

    Raises:
        `FileExistsError`: if it is there and must not be overwritten.
        `NotADirectoryError` or `PermissionError`: if its folder cannot hold it.
    """
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise FileExistsError(
            f"'{path}' is there already: {'it is a folder, ' if path.is_dir() else '--overwrite replaces it, or '}"
            "give another name."
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is a file, so '{path}' cannot be written below it: give another path.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"'{folder}' cannot be written to: give another path.")
