"""Transformers' own server around one loaded model, whose packs a request chooses by the name of its model.

What it chooses: the model is loaded before the server begins and stays, so the server looks up no class by its name.
Of the server it gives the parts that know about models: which names there are, and what each of them generates with.
Promises: a name reads the packs that it lists, in that order, and an unknown one is answered with 404 and the names
that there are; requests are answered one after the other, on one thread. Never batches continuously or loads another
model. Needs the packages of the extra "serve", which importing this module asks for.
Source: transformers 5.20.2 to 5.24, `transformers/cli/serve.py` and `transformers/cli/serving`.
"""

import inspect
import time

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState


class ReadsPacks:
    """A loaded model whose `generate` reads these packs and no others; in all else it is the model.

    Args:
        model (`PreTrainedModel`): a model with a memory, which has loaded the packs.
        packs (`tuple` of `str`): their names in the order of reading.
    """

    def __init__(self, model: PreTrainedModel, packs: tuple[str, ...]):
        self.model = model
        self.packs = packs

    def generate(self, **inputs):
        """As the model's own, for a batch of one row, which is what the server gives."""
        return self.model.generate(**inputs, memory_names=[self.packs])

    def __getattr__(self, name: str):
        return getattr(self.model, name)


class ServedNames(ModelManager):
    """The names that a client may ask for: the model's, and with packs after it, as in "my-graft+law+people".

    Args:
        model (`PreTrainedModel`): a model with a memory; the packs that it reads are those of its plain name.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        names (`list` of `str`): names of the model; the first one is what `/v1/models` lists.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.names = names
        self.active = tuple(model.active_memories)
        self.loaded_packs = sorted(model.memory.packs.loaded)
        self.since = int(time.time())

    def listed(self) -> list[str]:
        """Returns the model's name, and one for each pack."""
        return [self.names[0], *(f"{self.names[0]}+{pack}" for pack in self.loaded_packs)]

    def packs_of(self, requested: str | None) -> tuple[str, ...]:
        """Returns the packs that a request for this model reads.

        Raises:
            `HTTPException`: 404 for another model or a pack that is not loaded, 400 for a pack that is named twice.
        """
        if requested is None or requested in self.names:
            return self.active
        rest = next((requested[len(name) + 1 :] for name in self.names if str(requested).startswith(f"{name}+")), None)
        if rest is None:
            raise HTTPException(404, f"model {requested!r} is not served here; served are {self.listed()}.")
        packs = tuple(rest.split("+"))
        if unknown := [pack for pack in packs if pack not in self.loaded_packs]:
            raise HTTPException(
                404, f"no pack named {unknown[0]!r} is loaded for {requested!r}; served are {self.listed()}."
            )
        if len(set(packs)) != len(packs):
            raise HTTPException(400, f"model {requested!r} names a pack twice: each is read once.")
        return packs

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Returns the name as it is: there are no revisions to choose from."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, progress_callback=None, **_):
        """Returns the model with the packs of this name, and its tokenizer; both are loaded already."""
        model = ReadsPacks(self.model, self.packs_of(model_id_and_revision))
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return model, self.tokenizer

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """Returns what `/v1/models` lists: nothing of the Hub's cache, which is not served."""
        return [{"id": name, "object": "model", "created": self.since, "owned_by": ""} for name in self.listed()]

    get_gen_models = list_models  # its name before transformers 5.24


class OneAfterTheOther(GenerationState):
    """One thread that generates for all names, because they share one model; never continuous batching."""

    def __init__(self):
        super().__init__(continuous_batching=False)

    def get_manager(self, model_id: str, use_cb: bool = False):
        """Returns the same thread for every name."""
        if use_cb:
            raise NotImplementedError("continuous batching would give the memory wrong n-grams.")
        return super().get_manager("the model")


class _Endpoint:
    """An endpoint of the server that checks the request's model first, so that a mistake is an answer and not a 500."""

    def __init__(self, handler, served: ServedNames, takes_messages: bool):
        self.handler = handler
        self.served = served
        self.takes_messages = takes_messages

    async def handle_request(self, body: dict, request_id: str):
        self.served.packs_of(body.get("model"))
        body["model"] = body.get("model") or self.served.names[0]
        if self.takes_messages and not self.served.tokenizer.chat_template:
            raise HTTPException(400, "the model's tokenizer has no chat template: use /v1/completions.")
        return await self.handler.handle_request(body, request_id)


class _Refused:
    """An endpoint that a language model with a memory does not have here."""

    async def handle_request(self, *_):
        raise HTTPException(404, "this endpoint is not served for a model with a memory; see docs/serving.md.")


def make_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> FastAPI:
    """Returns Transformers' server for a loaded model: chat completions, completions and responses.

    Args:
        model (`PreTrainedModel`): a causal language model with a memory, with its packs loaded.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        names (`list` of `str`): names of the model, the one to list first.

    Raises:
        `ValueError`: if this version of Transformers builds its server from other parts.
    """
    served, state = ServedNames(model, tokenizer, names), OneAfterTheOther()
    endpoints = {
        "chat_handler": _Endpoint(ChatCompletionHandler(served, state), served, takes_messages=True),
        "completion_handler": _Endpoint(CompletionHandler(served, state), served, takes_messages=False),
        "response_handler": _Endpoint(ResponseHandler(served, state), served, takes_messages=True),
    }
    parts = inspect.signature(build_server).parameters
    if missing := {"model_manager", "generation_state", *endpoints} - set(parts):
        raise ValueError(
            f"this version of transformers makes its server without {sorted(missing)}: `engram serve` was tested with "
            "transformers 5.20.2 to 5.24."
        )
    others = {name: _Refused() for name in parts if name.endswith("_handler") and name not in endpoints}
    app = build_server(model_manager=served, generation_state=state, **endpoints, **others)
    app.add_exception_handler(HTTPException, _said)
    return app


async def _said(_, error: HTTPException) -> JSONResponse:
    """Answers a mistake in the form of which OpenAI's clients show the message."""
    told = {"message": str(error.detail), "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": told}, status_code=error.status_code)


def run(app: FastAPI, listening, log_level: str) -> None:
    """Answers requests at a socket until the process is interrupted."""
    uvicorn.Server(uvicorn.Config(app, log_level=log_level)).run(sockets=[listening])
