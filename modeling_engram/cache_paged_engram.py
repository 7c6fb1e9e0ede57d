"""PagedTexts: histories of requests in continuous batching, stored beside the pages of their keys and values.

Transformers packs the next tokens of many requests into one row and says where its cache holds the tokens before them.
Here every token of such a row is a text of one token, with a history of its own, so that all else stays as it is.
Promises: a history is read at the places that hold the keys of the same tokens. So requests may join, leave, wait, be
evicted and read again, be read in pieces, or share a prefix, in any order. Histories live as long as the cache.
Never follows a page that is copied outside of a forward pass: what copies pages is refused before anything runs.
Source: transformers 5.20 to 5.24, `generation/continuous_batching`.
"""

import copy

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedConfig

from .cache_engram import CLASS_STATE
from .compat_engram import FULL_ATTENTION, SLIDING_ATTENTION, PagedAttentionCache, kinds_of_pages


class PagedTexts:
    """What one packed pass knows of the texts before its tokens: [`EngramCacheLayer`]'s methods, for a batch of tokens.

    T tokens of R requests are in the pass. A table for each state hangs on the cache, one row for each token that the
    pages of one kind of attention can hold. Zeros mean "no text".

    Args:
        cache (`PagedAttentionCache`): the cache of all requests.
        inputs (`dict`): the pass's arguments, as Transformers' continuous batching gives them.
        lookback (`int`): earlier positions that the memory reads.
    """

    def __init__(self, cache: PagedAttentionCache, inputs: dict, lookback: int):
        kinds = cache.cache_allocators
        pages = kinds.get(FULL_ATTENTION, kinds.get(SLIDING_ATTENTION))
        reserved = cache.pool.num_reserved_sectors * pages.blocks_per_sector
        self.tables: dict[int | str, torch.Tensor] = vars(cache).setdefault("engram_tables", {})
        self.table_length = (pages.num_blocks + reserved) * pages.tokens_per_page
        starts = inputs["cu_seq_lens_q"].long()  # (R + 1,)
        back = torch.arange(1, lookback + 1, device=starts.device)  # (lookback,)
        find = _places_by_index if inputs["block_table"] is None else _places_by_block
        self.places, self.before, known = find(pages, inputs, starts, back)
        self.origins = _origins(starts[:-1], known, len(self.places), lookback)

    def recent_classes(self, classes: torch.Tensor) -> torch.Tensor:
        """Returns the classes before each token, `(T, lookback)`, -1 for no text, from those of the pass, `(T, 1)`."""
        return self.look_back(CLASS_STATE, classes + 1)[:, :-1] - 1

    def remember_classes(self, classes: torch.Tensor) -> None:
        """Stores the classes `(T, 1)` of a finished forward pass."""
        self.store(CLASS_STATE, classes + 1)

    def extend_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """Stores flags `(T, 1)`, True where a document ends; returns them after earlier ones, `(T, lookback + 1)`."""
        full = self.look_back("ends", ends)
        self.store("ends", ends)
        return full

    def extend_convolution(self, inputs: torch.Tensor, state_idx: int, receptive_field: int) -> torch.Tensor:
        """Stores inputs `(T, 1, channels)`; returns them after earlier ones, `(T, lookback + 1, channels)`."""
        full = self.look_back(state_idx, inputs)
        self.store(state_idx, inputs)
        return full

    def look_back(self, state: int | str, new: torch.Tensor) -> torch.Tensor:
        """Returns `new`, `(T, 1, ...)`, after what came before each token: `(T, lookback + 1, ...)`."""
        earlier = self.table(state, new)[self.before.flatten().to(new.device)]  # (R * lookback, ...)
        nothing = new.new_zeros(1, *new.shape[2:])
        return torch.cat([nothing, earlier, new[:, 0]])[self.origins.to(new.device)]  # (T, lookback + 1, ...)

    def store(self, state: int | str, new: torch.Tensor) -> None:
        """Writes `new`, `(T, 1, ...)`, to where the pass's keys go."""
        self.table(state, new)[self.places.to(new.device)] = new[:, 0]

    def table(self, state: int | str, new: torch.Tensor) -> torch.Tensor:
        """Returns the table of a state, `(table_length, ...)`, made on first use."""
        if state not in self.tables:
            self.tables[state] = new.new_zeros(self.table_length, *new.shape[2:])
        return self.tables[state]


def _places_by_index(pages, inputs: dict, starts: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the tokens' places `(T,)`, those of the tokens before each request's first, `(R, lookback)`, and how many
    of these there are, `(R,)`.

    The indices name, for each request, the tokens that attention reads, the oldest first and the new ones last.
    """
    ends = inputs["cu_seq_lens_k"][pages.layer_type].long()  # (R + 1,)
    known = ends.diff() - starts.diff()  # (R,)
    reads = inputs["read_index"][pages.index]  # empty where no request has earlier tokens
    wanted = (ends[:-1] + known)[:, None] - back  # (R, lookback)
    before = reads[wanted.clamp(min=0)] if len(reads) else torch.zeros_like(wanted)
    # The layers' pages of a block follow each other, and indices count the tokens of all: ours are those of one layer.
    stride, length = pages.block_physical_stride, pages.tokens_per_page
    places, before = (at // stride * length + at % stride for at in (inputs["write_index"][pages.index], before))
    return places, before, known


def _places_by_block(pages, inputs: dict, starts: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As `_places_by_index`, for a pass with one token of each request whose kernel finds pages in a block table."""
    positions = inputs["position_ids"][0, :, None].long()  # (R, 1)
    wanted = (positions - torch.cat([back.new_zeros(1), back])).clamp(min=0)  # (R, 1 + lookback)
    length, blocks = pages.tokens_per_page, inputs["block_table"][pages.index].long()
    numbers = blocks.gather(1, wanted // length) // (pages.block_physical_stride // length)
    places = numbers * length + wanted % length  # (R, 1 + lookback)
    return places[:, 0], places[:, 1:], positions[:, 0]


def _origins(firsts: torch.Tensor, known: torch.Tensor, tokens: int, lookback: int) -> torch.Tensor:
    """Returns where `look_back` finds the tokens before each token, and itself: `(T, lookback + 1)`, the oldest first.

    0 is nothing, then come the tokens before the first of each request, the nearest first, then the tokens of the pass.
    """
    here = torch.arange(tokens, device=firsts.device)  # (T,)
    request = torch.searchsorted(firsts, here, right=True) - 1  # (T,)
    back = torch.arange(lookback, -1, -1, device=firsts.device)  # (lookback + 1,)
    beyond = back - (here - firsts[request])[:, None]  # (T, lookback + 1): 1 is the last token before the pass
    earlier = request[:, None] * lookback + beyond
    stored = torch.where(beyond <= known[request, None], earlier, 0)
    return torch.where(beyond > 0, stored, 1 + len(firsts) * lookback + here[:, None] - back)


def batching_settings(
    given: ContinuousBatchingConfig | None,
    generation_config: GenerationConfig,
    text_config: PreTrainedConfig,
    lookback: int,
) -> ContinuousBatchingConfig:
    """Returns settings of continuous batching under which the memory reads every history.

    Args:
        given (`ContinuousBatchingConfig`, *optional*): the user's; not changed.
        generation_config (`GenerationConfig`): may ask for several answers to a prompt, which is refused.
        text_config (`PreTrainedConfig`): the backbone's.
        lookback (`int`): earlier positions that the memory reads.

    Returns:
        `ContinuousBatchingConfig` without CUDA graphs.

    Raises:
        `NotImplementedError`: for a backbone or a setting with which a history would be lost.
    """
    settings = given or getattr(generation_config, "continuous_batching_config", None) or ContinuousBatchingConfig()
    kinds = kinds_of_pages(text_config)
    if FULL_ATTENTION not in kinds and text_config.sliding_window <= lookback:
        raise NotImplementedError(
            f"the backbone's pages hold the last {text_config.sliding_window} tokens (sliding_window), and the memory "
            f"reads {lookback} before each: use generate() with a batch."
        )
    if (answers := generation_config.num_return_sequences or 1) > 1:
        raise NotImplementedError(
            f"num_return_sequences={answers}: Transformers copies pages for the further answers, and the memory's "
            f"histories are not copied with them. Give each prompt {answers} times; its pages are shared."
        )
    if settings.cpu_offload_space != 0:
        raise NotImplementedError(
            f"cpu_offload_space={settings.cpu_offload_space}: Transformers copies pages to host memory and back, and "
            "the memory's histories are not copied with them. Set it to 0: what is evicted is read again."
        )
    compiles = [settings.varlen_compile_config, settings.decode_compile_config, settings.default_compile_level]
    if any(compiles) or getattr(text_config, "compile_config", None):
        raise NotImplementedError(
            "continuous batching with a memory is not compiled: leave out varlen_compile_config, "
            "decode_compile_config, default_compile_level and the backbone's compile_config."
        )
    if settings.use_cuda_graph not in (None, False, (False, False)):
        raise NotImplementedError(
            f"use_cuda_graph={settings.use_cuda_graph}: continuous batching with a memory runs without CUDA graphs. "
            "Leave it out, or set it to False."
        )
    settings = copy.deepcopy(settings)
    settings.use_cuda_graph = False
    return settings
