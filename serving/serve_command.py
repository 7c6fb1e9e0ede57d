"""The verb `engram serve`: a graft and its packs behind Transformers' own server, which speaks OpenAI's protocol.

Promises: what is wrong with the model, a pack, a name or the port is said before anything is served; a file's mistakes
are found before the model is loaded. Never downloads or serves a model that was not named.
Source: docs/serving.md.
"""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..conversion.terminal import load_tokenizer, progress, user_errors, visible
from ..knowledge_pack_engram import SUFFIX, KnowledgePack


INSTALL = 'pip install "engram-transformers[serve]"'


@user_errors
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an Engram checkpoint.")],
    pack: Annotated[
        list[str] | None,
        typer.Option(help="A pack's file, or NAME=FILE; repeat it for more. A client reads it as MODEL+NAME."),
    ] = None,
    active: Annotated[
        list[str] | None,
        typer.Option(help="A pack that requests for the plain MODEL read, in this order; none if left out."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its last folder if left out.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is what the checkpoint has.")] = "auto",
    continuous_batching: Annotated[
        bool,
        typer.Option(
            "--continuous-batching",
            help="Answer many requests at once; all read the packs of --active and sample as the first request does.",
        ),
    ] = False,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --continuous-batching: blocks of 256 tokens for the texts being answered; as many bytes as the "
            "weights if left out.",
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(help="Of the server: info, warning or error.")] = "warning",
) -> None:
    """Serve a model with transformers' own server: OpenAI-compatible, streamed, with a pack for each request.

    A request's model="my-graft+law" reads the pack law, "my-graft+law+people" reads two, and "my-graft" reads those
    that --active names (none if it is left out).
    Requests are answered one after the other, unless --continuous-batching is given.
    """
    if num_blocks is not None and not continuous_batching:
        raise ValueError(f"--num-blocks {num_blocks} is for --continuous-batching: give both, or neither.")
    server = _server()
    listening = listen_at(host, port)
    packs = read_packs(pack or ())
    if unknown := [one for one in active or () if one not in packs]:
        raise ValueError(f"--active {unknown[0]!r} is not a pack that is loaded; loaded are {sorted(packs)}.")
    tokenizer = load_tokenizer(model)
    with progress.status(f"loading {escape(visible(model))}"):
        loaded = load_model(model, device, dtype)
    for own, records in packs.items():
        loaded.load_memory(records, name=own)
    loaded.set_memories(active or [])
    names = list(dict.fromkeys([name or Path(model).absolute().name, model]))
    batching = server.settings_of_pages(loaded, num_blocks) if continuous_batching else None
    app = server.make_app(loaded, tokenizer, names, batching)
    listening.listen()
    print(f"http://{host}:{listening.getsockname()[1]}/v1", flush=True)
    for served in [names[0], *(f"{names[0]}+{own}" for own in ([] if continuous_batching else packs))]:
        progress.print(f"model {visible(served)}", highlight=False, markup=False)
    server.run(app, listening, log_level)


def _server():
    """Returns the module of the server, whose packages are an extra."""
    from transformers.utils.import_utils import is_serve_available

    try:
        if not is_serve_available():
            raise ImportError("fastapi, uvicorn, openai or pydantic is missing")
        from . import openai_server
    except ImportError as error:
        raise ValueError(f"serving needs packages that are not installed ({error}): {INSTALL}") from error
    return openai_server


def listen_at(host: str, port: int) -> socket.socket:
    """Returns a socket that holds an address and a port.

    Raises:
        `OSError`: if there is not such an address here, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"--host {host!r} is not an address of this machine ({error}).") from error
    if os.name == "posix":  # a port of a server that has just ended; on Windows it would share a port in use
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise OSError(f"port {port} of {host!r} cannot be used ({error.strerror}): give another --port.") from error
    return taken


def read_packs(options) -> dict[str, KnowledgePack]:
    """Returns the packs of `--pack FILE` and `--pack NAME=FILE` by name.

    Raises:
        `FileNotFoundError`: if a file is missing.
        `ValueError`: for a name that a client could not ask for, or that two packs have.
    """
    packs = {}
    for option in options:
        name, equals, file = option.partition("=")
        if not equals or Path(option).exists():  # a file's name may hold "="
            name, file = Path(option).name.removesuffix(SUFFIX), option
        if not name or "+" in name:
            raise ValueError(f"--pack {option!r}: a pack's name must not be empty or hold '+'; give --pack NAME=FILE.")
        if name in packs:
            raise ValueError(f"--pack {option!r}: a pack named {name!r} is given already; give --pack NAME=FILE.")
        packs[name] = KnowledgePack.load(file)
    return packs


def load_model(name: str, device: str, dtype: str):
    """Loads a causal language model with a memory.

    Raises:
        `ValueError`: for a whole composite model, whose images the server would leave out without a word.
    """
    from transformers import AutoConfig

    from .. import EngramConfig, EngramForCausalLM

    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, EngramConfig):
        raise ValueError(
            f"'{name}' is a {config.model_type} without a memory: `engram graft` gives it one, and `transformers "
            "serve` serves it as it is."
        )
    if config.composite_config is not None:
        raise ValueError(
            f"'{name}' is a whole model that also reads images, which `engram serve` does not serve yet: make a graft "
            "of its text model with `engram graft --text-only`."
        )
    return EngramForCausalLM.from_pretrained(name, device_map=device, dtype=dtype).eval()
