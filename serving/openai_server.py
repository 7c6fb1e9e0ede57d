"""Transformers' own server around one loaded model, whose packs a request chooses by the name of its model.

What it chooses: the model is loaded before the server begins and stays, so the server looks up no class by its name.
Of the server it gives the parts that know about models: which names there are, and what each of them generates with.
Promises: a name reads the packs that it lists, in that order, and an unknown one is answered with 404 and the names
that there are. Requests are answered one after the other, on one thread, or batched continuously: then all read the
same packs and sample alike, and a request that asks for something else is answered with 400. Never loads another model.
Needs the packages of the extra "serve", which importing this module asks for.
Source: transformers 5.20.2 to 5.24, `transformers/cli/serve.py` and `transformers/cli/serving`.
"""

import inspect
import time

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..cache_paged_engram import batching_settings


_PAGE = 256  # tokens in a page, which is Transformers' default
_LEAST_BLOCKS = 16


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
    """One thread that generates for all names, because they share one model."""

    def __init__(self):
        super().__init__(continuous_batching=False)

    def get_manager(self, model_id: str, use_cb: bool = False):
        """Returns the same thread for every name."""
        return super().get_manager("the model", use_cb)

    def check(self, body: dict, packs: tuple[str, ...]) -> None:
        """Accepts every request: each is generated by itself."""


class BatchedContinuously(GenerationState):
    """One manager that batches the requests for all names, which therefore read and sample alike.

    Args:
        active (`tuple` of `str`): the packs that are read.
        settings (`ContinuousBatchingConfig`): of the manager.
    """

    OWN = ("max_new_tokens", "eos_token_id")  # what Transformers takes from each request

    def __init__(self, active: tuple[str, ...], settings: ContinuousBatchingConfig):
        super().__init__(continuous_batching=True, cb_config=settings)
        self.active = active
        self.sampling: dict | None = None  # of the request with which Transformers made the manager

    def get_manager(self, model_id: str, use_cb: bool = False):
        """Returns the same manager for every name."""
        return _SamplesAlike(super().get_manager("the model", use_cb), self)

    def check(self, body: dict, packs: tuple[str, ...]) -> None:
        """Raises HTTPException for a request that reads other packs."""
        if packs != self.active:
            raise HTTPException(
                400,
                f"requests are batched continuously, so all read the packs {list(self.active)}, and not {list(packs)}: "
                "start the server with other --active packs, or without --continuous-batching.",
            )

    def check_sampling(self, asked: GenerationConfig) -> None:
        """Raises HTTPException for a request that samples otherwise than the manager."""
        told = {name: value for name, value in asked.to_dict().items() if name not in self.OWN}
        first = told if self.sampling is None else self.sampling
        if other := {name: told.get(name) for name in told.keys() | first.keys() if told.get(name) != first.get(name)}:
            raise HTTPException(
                400,
                "requests are batched continuously and sample as the first one did, with "
                f"{ {name: first.get(name) for name in other} }, and not with {other}: send the same, or start the "
                "server without --continuous-batching.",
            )
        self.sampling = told


class _SamplesAlike:
    """The manager of continuous batching, which checks a request where Transformers would drop its sampling."""

    def __init__(self, manager, state: BatchedContinuously):
        self.manager, self.state = manager, state

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        self.state.check_sampling(gen_config)
        self.manager.init_cb(model, gen_config)

    def __getattr__(self, name: str):
        return getattr(self.manager, name)


def settings_of_pages(model: PreTrainedModel, num_blocks: int | None) -> ContinuousBatchingConfig:
    """Returns settings of continuous batching.

    Args:
        model (`PreTrainedModel`): whose keys and values the pages hold.
        num_blocks (`int`, *optional*): blocks of 256 tokens; if None, they take at most the bytes of the weights.
    """
    if num_blocks is None:
        text_config = model.config.get_text_config(decoder=True)
        heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        token = 2 * text_config.num_hidden_layers * heads * width * model.dtype.itemsize
        weights = sum(weight.nbytes for weight in model.backbone.parameters())
        num_blocks = max(_LEAST_BLOCKS, weights // (_PAGE * token))
    return ContinuousBatchingConfig(page_size=_PAGE, num_blocks=num_blocks)


class _Endpoint:
    """An endpoint of the server that checks the request first, so that a mistake is an answer and not a 500."""

    def __init__(self, kind, served: ServedNames, state: OneAfterTheOther | BatchedContinuously, takes_messages: bool):
        self.handler = kind(served, state)
        self.served = served
        self.state = state
        self.takes_messages = takes_messages

    async def handle_request(self, body: dict, request_id: str):
        packs = self.served.packs_of(body.get("model"))
        body["model"] = body.get("model") or self.served.names[0]
        if self.takes_messages and not self.served.tokenizer.chat_template:
            raise HTTPException(400, "the model's tokenizer has no chat template: use /v1/completions.")
        self.state.check(body, packs)
        return await self.handler.handle_request(body, request_id)


class _Refused:
    """An endpoint that a language model with a memory does not have here."""

    async def handle_request(self, *_):
        raise HTTPException(404, "this endpoint is not served for a model with a memory; see docs/serving.md.")


def make_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    batching: ContinuousBatchingConfig | None = None,
) -> FastAPI:
    """Returns Transformers' server for a loaded model: chat completions, completions and responses.

    Args:
        model (`PreTrainedModel`): a causal language model with a memory, with its packs loaded.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        names (`list` of `str`): names of the model, the one to list first.
        batching (`ContinuousBatchingConfig`, *optional*): batches requests continuously; one after the other if None.

    Raises:
        `NotImplementedError`: for a backbone or a setting with which continuous batching would lose histories.
        `ValueError`: if this version of Transformers builds its server from other parts.
    """
    served, state = ServedNames(model, tokenizer, names), OneAfterTheOther()
    if batching is not None:
        text_config = model.config.get_text_config(decoder=True)
        batching = batching_settings(batching, model.generation_config, text_config, model.memory.lookback)
        state = BatchedContinuously(served.active, batching)
    endpoints = {
        "chat_handler": _Endpoint(ChatCompletionHandler, served, state, takes_messages=True),
        "completion_handler": _Endpoint(CompletionHandler, served, state, takes_messages=False),
        "response_handler": _Endpoint(ResponseHandler, served, state, takes_messages=True),
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
    app.state.generation = state
    return app


async def _said(_, error: HTTPException) -> JSONResponse:
    """Answers a mistake in the form of which OpenAI's clients show the message."""
    told = {"message": str(error.detail), "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": told}, status_code=error.status_code)


def run(app: FastAPI, listening, log_level: str) -> None:
    """Answers requests at a socket until the process is interrupted."""
    try:
        uvicorn.Server(uvicorn.Config(app, log_level=log_level)).run(sockets=[listening])
    finally:
        app.state.generation.shutdown()  # the thread of continuous batching would go on
