"""Ways of running a language model that must all give the same logits for the same text.

Each mode takes a `Subject` (a model and a few prompts) and returns `Reading`s: texts with the model's logits. The same
modes run on the Engram model and on its plain backbone, the control.
Promises: uses only public features of `generate`, forward passes and `Cache`. Never changes a model.
Source: Transformers 5.23, `generation/utils.py` and `cache_utils.py`.
"""

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel

from engram_transformers.backbone_engram import find_decoder_layers
from engram_transformers.compat_engram import CACHE, data_parallel_replica, undo_compile


SEED = 0

# One-bit changes of the embeddings with which rounding is measured, once for each text. Of 12 seeds one measured up to
# 1.9 times as much as another (8 texts, a tiny Llama); with 4 changes it was 3.1 times.
PERTURBATIONS = 16


@dataclass
class Reading:
    """A text and the model's predictions for it.

    Args:
        text (`torch.LongTensor` of shape `(length,)`): token ids, without pads.
        logits (`torch.Tensor` of shape `(steps, vocabulary)`): predictions after `text[first]`, `text[first + 1]`, ...
        first (`int`): position of the first prediction.
    """

    text: torch.Tensor
    logits: torch.Tensor
    first: int


@dataclass
class Subject:
    """A model under test.

    Args:
        model (`PreTrainedModel`): the Engram model, or its backbone as the control.
        prompts (`list[torch.LongTensor]`): token ids of shape `(length,)`, of different lengths, 6 or more.
        new_tokens (`int`): tokens to generate.
        pad_token_id (`int`): pads batches.
        has_memory (`bool`): whether it takes Engram's arguments.
        assistant (`PreTrainedModel`): another model with the same vocabulary.
        roundings (`dict[tuple[int, ...], float]`, *optional*): measured rounding by text; see `rounding`.
    """

    model: PreTrainedModel
    prompts: list[torch.Tensor]
    new_tokens: int
    pad_token_id: int
    has_memory: bool
    assistant: PreTrainedModel
    roundings: dict[tuple[int, ...], float] = field(default_factory=dict)

    @cached_property
    def greedy(self) -> list[Reading]:
        """Greedy decoding of each prompt separately and without a cache."""
        return _one_by_one(use_cache=False)(self)

    def new_cache(self) -> DynamicCache:
        """Makes an empty cache with this backbone's kinds of layers."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def read(self, ids: torch.Tensor, cache=None, **inputs) -> torch.Tensor:
        """Returns logits `(batch, length, vocabulary)` of ids `(batch, length)`."""
        return self.model(ids, **{CACHE: cache}, use_cache=cache is not None, **inputs).logits

    def rounding(self, text: torch.Tensor) -> float:
        """Returns the change of a text's logits when the last bits of its embeddings change.

        At most half of the digits of the largest logit: a larger difference has another cause.
        """
        known = tuple(text.tolist())
        if known not in self.roundings:
            try:
                self.roundings[known] = self.measure_rounding(text)
            except RuntimeError:  # gemma4_text finds ids by their embeddings, and changed ones are none's
                self.roundings[known] = 0.0
        return self.roundings[known]

    def measure_rounding(self, text: torch.Tensor) -> float:
        """Measures `rounding` by reading the text many times."""
        inputs = {"engram_input_ids": text[None]} if self.has_memory else {}
        inputs["use_cache"] = False
        embeds = self.model.get_input_embeddings()(text[None])  # (1, length, hidden)
        at_once = self.model(inputs_embeds=embeds, **inputs).logits
        bit, generator = torch.finfo(embeds.dtype).eps, torch.Generator().manual_seed(SEED)
        changes = []
        for _ in range(PERTURBATIONS):
            signs = torch.randint(0, 2, embeds.shape, generator=generator, device="cpu").to(embeds) * 2 - 1
            changed = self.model(inputs_embeds=embeds * (1 + bit * signs), **inputs).logits
            changes.append(float((changed - at_once).float().abs().max()))
        return min(max(changes), math.sqrt(bit) * float(at_once.abs().max()))

    def read_on(self, ids: torch.Tensor, cache, first: int) -> list[Reading]:
        """Reads whole texts `(batch, length)` from position `first` on, after what a cache holds of them."""
        logits = self.read(ids[:, first:], cache)
        return [Reading(text, row, first) for text, row in zip(ids, logits, strict=True)]

    def write(self, prompts: list[torch.Tensor], **options) -> list[Reading]:
        """Generates from a batch of prompts, padded on the left where lengths differ."""
        ids = pad_sequence(prompts, batch_first=True, padding_value=self.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
        inputs = {"input_ids": ids} if "inputs_embeds" not in options else {}
        torch.manual_seed(SEED)
        out = self.model.generate(
            **inputs,
            attention_mask=mask,
            return_dict_in_generate=True,
            output_logits=True,
            **{**self.settings(), **options},
        )
        written = out.sequences[:, -self.new_tokens :]  # (batch * returned, new tokens)
        returned = len(written) // len(prompts)
        beams = getattr(out, "beam_indices", None)
        readings = []
        for row, tokens in enumerate(written):
            prompt = prompts[row // returned]
            places = [row] * self.new_tokens if beams is None else beams[row, : self.new_tokens].tolist()
            logits = torch.stack([step[place] for step, place in zip(out.logits, places, strict=True)])
            readings.append(Reading(torch.cat([prompt, tokens]), logits, len(prompt) - 1))
        return readings

    def settings(self) -> dict:
        """Returns settings for greedy decoding of fixed length, whatever the model's own settings are."""
        return {
            "max_new_tokens": self.new_tokens,
            "min_new_tokens": self.new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "repetition_penalty": 1.0,
            "pad_token_id": self.pad_token_id,
            "disable_compile": True,
        }

    def rows(self) -> torch.Tensor:
        """Returns the prompts truncated to one length, `(prompts, length)`."""
        shortest = min(len(prompt) for prompt in self.prompts)
        return torch.stack([prompt[:shortest] for prompt in self.prompts])


@dataclass(frozen=True)
class Mode:
    """One mode of running a model.

    Args:
        name (`str`): for tables.
        run (`Callable[[Subject], list[Reading]]`): runs it.
        expect (`Callable[[Subject], list[Reading]]`, *optional*):
            The expected text: the same choice of tokens without a cache, one text at a time. None where no tokens are
            chosen.
        refused (`type[Exception]`, *optional*): the error with which Engram refuses it.
        device (`str`, *optional*): the kind of device that it needs.
    """

    name: str
    run: Callable[[Subject], list[Reading]]
    expect: Callable[[Subject], list[Reading]] | None = None
    refused: type[Exception] | None = None
    device: str | None = None


def _one_by_one(prompts: Callable[[Subject], list[torch.Tensor]] | None = None, **options):
    """Generates from each prompt separately; from all of the subject's if `prompts` is None."""

    def run(s: Subject) -> list[Reading]:
        chosen = s.prompts if prompts is None else prompts(s)
        return [reading for prompt in chosen for reading in s.write([prompt], **options)]

    return run


def _first_tokens(s: Subject) -> list[torch.Tensor]:
    return [prompt[:1] for prompt in s.prompts]


def repeated(s: Subject) -> list[torch.Tensor]:
    """Returns every prompt twice in a row, so that prompt lookup finds something."""
    return [prompt.repeat(2) for prompt in s.prompts]


def _padded_right(s: Subject) -> list[Reading]:
    ids = pad_sequence(s.prompts, batch_first=True, padding_value=s.pad_token_id)
    mask = pad_sequence([torch.ones_like(p) for p in s.prompts], batch_first=True)
    logits = s.read(ids, attention_mask=mask)
    return [Reading(text, row[: len(text)], 0) for text, row in zip(s.prompts, logits, strict=True)]


def packed(s: Subject) -> list[Reading]:
    """Reads all prompts in one row, separated only by positions."""
    positions = torch.cat([torch.arange(len(prompt), device=prompt.device) for prompt in s.prompts])
    logits = s.read(torch.cat(s.prompts)[None], position_ids=positions[None])[0]
    pieces = logits.split([len(prompt) for prompt in s.prompts])
    return [Reading(text, piece, 0) for text, piece in zip(s.prompts, pieces, strict=True)]


def in_chunks(new_cache: Callable[[Subject], DynamicCache] = Subject.new_cache):
    """Reads every prompt in pieces of 1, 2, 3, 1, 2, 3, ... tokens."""

    def run(s: Subject) -> list[Reading]:
        readings = []
        for text in s.prompts:
            cache, pieces, first = new_cache(s), [], 0
            while first < len(text):
                size = 1 + len(pieces) % 3
                pieces.append(s.read(text[None, first : first + size], cache)[0])
                first += size
            readings.append(Reading(text, torch.cat(pieces), 0))
        return readings

    return run


def continued(s: Subject) -> list[Reading]:
    """Generates, appends the end of another prompt, and continues with the returned cache."""
    readings = []
    for prompt, other in zip(s.prompts, s.prompts[1:] + s.prompts[:1], strict=True):
        cache = s.new_cache()
        longer = torch.cat([s.write([prompt], **{CACHE: cache})[0].text, other[-3:]])
        readings += s.write([longer], **{CACHE: cache})
    return readings


def _continued_without_cache(s: Subject) -> list[Reading]:
    pairs = zip(s.greedy, s.prompts[1:] + s.prompts[:1], strict=True)
    longer = [torch.cat([reading.text, other[-3:]]) for reading, other in pairs]
    return _one_by_one(lambda _: longer, use_cache=False)(s)


def interleaved(s: Subject) -> list[Reading]:
    """Reads one token of each text in turn, each text with a separate cache."""
    rows = s.rows()
    caches = [s.new_cache() for _ in rows]
    steps = [
        torch.cat([s.read(row[None, t : t + 1], cache)[0] for row, cache in zip(rows, caches, strict=True)])
        for t in range(rows.shape[1])
    ]
    return [Reading(row, logits, 0) for row, logits in zip(rows, torch.stack(steps, dim=1), strict=True)]


def cropped(s: Subject) -> list[Reading]:
    """Reads a wrong ending, crops it, and reads the right one."""
    rows, cache = s.rows(), s.new_cache()
    middle = rows.shape[1] - 3
    s.read(rows[:, :middle], cache)
    cache.activate_past_recording()
    s.read(rows.flip(0)[:, middle:], cache)
    cache.crop(-3)
    return s.read_on(rows, cache, middle)


def _changed_batch(change: Callable[[DynamicCache], None], kept: list[int], start: list[int] | None = None):
    """Reads the beginnings of some texts, changes the cache's batch, and reads on.

    Args:
        change: changes the cache. kept: prompts whose ends are read afterwards; the cache then holds their beginnings.
        start: prompts whose beginnings are read; all if None.
    """

    def run(s: Subject) -> list[Reading]:
        rows, cache = s.rows(), s.new_cache()
        middle = rows.shape[1] // 2
        begun = rows if start is None else rows[start]
        s.read(begun[:, :middle], cache)
        change(cache)
        beginnings = rows[kept] if start is None else rows[start].expand(len(kept), -1)
        texts = torch.cat([beginnings[:, :middle], rows[kept][:, middle:]], dim=1)  # (kept, length)
        return s.read_on(texts, cache, middle)

    return run


def copied(s: Subject) -> list[Reading]:
    """Reads two endings with copies of the cache of one beginning."""
    rows, cache = s.rows(), s.new_cache()
    middle = rows.shape[1] // 2
    s.read(rows[:1, :middle], cache)
    texts = torch.cat([rows[:1, :middle].expand(len(rows), -1), rows[:, middle:]], dim=1)  # (prompts, length)
    return [reading for text in texts for reading in s.read_on(text[None], copy.deepcopy(cache), middle)]


def _embedded(s: Subject) -> list[Reading]:
    """Generates from embeddings; the memory gets the ids separately."""
    readings = []
    for prompt in s.prompts:
        ids = {"engram_input_ids": prompt[None]} if s.has_memory else {}
        embeds = s.model.get_input_embeddings()(prompt[None])
        readings += s.write([prompt], inputs_embeds=embeds, **ids)
    return readings


def assisted(by_itself: bool, **options):
    """Decodes every prompt with the model itself, or another one, as the assistant."""
    return lambda s: _one_by_one(assistant_model=s.model if by_itself else s.assistant, **options)(s)


def _with_compiled_layers(s: Subject) -> list[Reading]:
    """Reads with every decoder layer compiled separately, as `accelerate.utils.compile_regions` does."""
    backbone = s.model.backbone if s.has_memory else s.model
    layers = find_decoder_layers(backbone, backbone.config.get_text_config(decoder=True).num_hidden_layers)
    torch.compiler.reset()
    for layer in layers:
        layer.compile(backend="eager")
    try:
        return [Reading(prompt, s.read(prompt[None])[0], 0) for prompt in s.prompts]
    finally:
        for layer in layers:
            undo_compile(layer)


def _in_threads(s: Subject) -> list[Reading]:
    """Reads all prompts at the same time, each in its own thread."""
    with ThreadPoolExecutor(len(s.prompts)) as threads:
        logits = list(threads.map(lambda prompt: s.read(prompt[None])[0], s.prompts))
    return [Reading(prompt, read, 0) for prompt, read in zip(s.prompts, logits, strict=True)]


def _nested(s: Subject) -> list[Reading]:
    """Reads another prompt while one is being read."""
    backbone = s.model.backbone if s.has_memory else s.model
    layers = find_decoder_layers(backbone, backbone.config.get_text_config(decoder=True).num_hidden_layers)
    outer, inner = s.prompts[0], s.prompts[1]
    readings = []

    def read_inner(*_):
        handle.remove()
        readings.append(Reading(inner, s.read(inner[None])[0], 0))

    handle = layers[0].register_forward_pre_hook(read_inner)
    readings.append(Reading(outer, s.read(outer[None])[0], 0))
    return readings


def replicated(s: Subject) -> list[Reading]:
    data_parallel_replica(s.model)(s.prompts[0][None])
    raise AssertionError("a replica of nn.DataParallel was not declined")


def _batched_continuously(s: Subject) -> list[Reading]:
    """Generates from all prompts by continuous batching, at most 8 tokens in a pass.

    It gives tokens and no logits: those of reading at once stand in, so that tokens alone are compared.
    """
    prompts = [prompt.tolist() for prompt in s.prompts]
    blocks = 1 + sum(math.ceil((len(prompt) + s.new_tokens) / 16) for prompt in prompts)
    sizes = {"page_size": 16, "num_blocks": blocks, "max_batch_tokens": 8, "auto_switch_to_flash": False}
    ends = s.model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    greedy = {"do_sample": False, "max_new_tokens": s.new_tokens, "eos_token_id": -1, "pad_token_id": s.pad_token_id}
    greedy |= {"suppress_tokens": ends} if ends else {}  # as `min_new_tokens` does elsewhere, which is not offered here
    written = {}
    with s.model.continuous_batching_context_manager(
        GenerationConfig(**greedy), continuous_batching_config=ContinuousBatchingConfig(**sizes)
    ) as manager:
        requests = manager.add_requests(prompts)
        while len(written) < len(prompts) and manager.is_running():
            if (output := manager.get_result(timeout=1)) is not None:
                written[output.request_id] = output
    if failed := [request for request in requests if request not in written or written[request].error is not None]:
        error = getattr(written.get(failed[0]), "error", None)
        raise RuntimeError(f"continuous batching gave no answer to {len(failed)} of {len(prompts)} requests: {error}")
    readings = []
    for prompt, request in zip(s.prompts, requests, strict=True):
        text = torch.cat([prompt, prompt.new_tensor(written[request].generated_tokens)])
        readings.append(Reading(text, s.read(text[None])[0, len(prompt) - 1 : -1], len(prompt) - 1))
    return readings


def same(prompts: Callable[[Subject], list[torch.Tensor]] | None = None, **options) -> dict:
    """Chooses tokens in some manner, and expects the same tokens without a cache."""
    return {"run": _one_by_one(prompts, **options), "expect": _one_by_one(prompts, use_cache=False, **options)}


def greedy(run: Callable[[Subject], list[Reading]]) -> dict:
    """Expects the tokens of greedy decoding without a cache."""
    return {"run": run, "expect": lambda s: s.greedy}


SAMPLING = {"do_sample": True, "top_k": 20, "temperature": 1.0}

MODES = [
    Mode("greedy", **same()),
    Mode("one-token prompt", **same(_first_tokens)),
    Mode("sampling", **same(**SAMPLING)),
    Mode("beams", **same(num_beams=4)),
    Mode("beam sampling", **same(num_beams=4, **SAMPLING)),
    Mode("num_return_sequences", **same(num_return_sequences=3, **SAMPLING)),
    Mode("left padding", **greedy(lambda s: s.write(s.prompts))),
    Mode("left padding, beams", lambda s: s.write(s.prompts, num_beams=4), _one_by_one(num_beams=4, use_cache=False)),
    Mode("right padding", _padded_right),
    Mode("packed documents", packed),
    Mode("static cache", **greedy(_one_by_one(cache_implementation="static"))),
    Mode("static cache, left padding", **greedy(lambda s: s.write(s.prompts, cache_implementation="static"))),
    Mode("offloaded cache", **greedy(_one_by_one(cache_implementation="offloaded")), device="cuda"),
    Mode("DynamicCache() of the user", in_chunks(lambda s: DynamicCache())),
    Mode("chunks", in_chunks()),
    Mode("prefill_chunk_size", **greedy(_one_by_one(prefill_chunk_size=3))),
    Mode("assisted by itself", **greedy(assisted(by_itself=True))),
    Mode("assisted by another", **greedy(assisted(by_itself=False))),
    Mode("prompt lookup", _one_by_one(repeated, prompt_lookup_num_tokens=3), _one_by_one(repeated, use_cache=False)),
    Mode("assisted, static cache", **greedy(assisted(by_itself=True, cache_implementation="static"))),
    Mode(
        "prompt lookup, static cache",
        _one_by_one(repeated, prompt_lookup_num_tokens=3, cache_implementation="static"),
        _one_by_one(repeated, use_cache=False),
    ),
    Mode("continued cache", continued, _continued_without_cache),
    Mode("copied cache", copied),
    Mode("interleaved requests", interleaved),
    Mode("cache.crop", cropped),
    Mode(
        "cache.reorder_cache",
        _changed_batch(lambda c: c.reorder_cache(torch.tensor([2, 0, 0], device="cpu")), [2, 0, 0]),
    ),
    Mode("cache.batch_repeat_interleave", _changed_batch(lambda c: c.batch_repeat_interleave(3), [0, 1, 2], [0])),
    Mode(
        "cache.batch_select_indices",
        _changed_batch(lambda c: c.batch_select_indices(torch.tensor([2, 0], device="cpu")), [2, 0]),
    ),
    Mode("inputs_embeds", **greedy(_embedded)),
    Mode("compiled layers", _with_compiled_layers),
    Mode("threads", _in_threads),
    Mode("a pass inside a pass", _nested),
    Mode("nn.DataParallel", replicated, refused=RuntimeError),
    Mode("continuous batching", **greedy(_batched_continuously)),
]
