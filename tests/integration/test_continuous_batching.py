"""Continuous batching: every request gets the tokens that `generate` gives for its prompt alone.

Schedules of requests run step by step in this thread, so that each is the same in every run: requests join, leave,
are evicted and read again, are read in pieces and share prefixes. The memory is filled, with a convolution.
Run: pytest tests/integration/test_continuous_batching.py
"""

import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
)
from transformers.generation.continuous_batching import continuous_api

from engram_transformers import cache_paged_engram, compat_engram
from engram_transformers.cache_paged_engram import PagedTexts

from ..conftest import examples
from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import engram_on
from .backbones import BACKBONES, HEADS, MIXED


# What the backbone has pages for. The window of the second holds fewer tokens than the 9 that the memory reads before
# each, that of the third, whose pages are the only ones, just enough.
KINDS = {
    "full": lambda: LlamaConfig(**HEADS),
    "mixed": lambda: Gemma3TextConfig(**HEADS, **MIXED),
    "windows": lambda: MistralConfig(**HEADS, sliding_window=10),
}
NEW = 8  # tokens that `generate` writes at most
PAGE = 4


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A manager that stops collects garbage twice, which takes a second each time in a process of tests."""
    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: 0))


@functools.cache
def model_on(kind: str):
    """A filled memory; tests only read it."""
    return engram_on(KINDS[kind]())


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 4000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt(prefix: int, kept: int, tail: int) -> tuple[int, ...]:
    """One of a few prompts: many begin alike, none is longer than 18 tokens."""
    return tuple(random_ids(12, 100 + prefix)[:kept] + random_ids(1 + tail, tail))


def alone(model, ids: tuple[int, ...], new: int = NEW) -> list[int]:
    """What `generate` writes after one prompt."""
    ids = torch.tensor([ids])
    told = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None, "max_new_tokens": new}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **told)[0, ids.shape[1] :].tolist()


@functools.cache
def expected(kind: str, ids: tuple[int, ...]) -> list[int]:
    return alone(model_on(kind), ids)


GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 2, "max_new_tokens": NEW}


def settings(**fields) -> dict:
    """Settings of both kinds for a small cache."""
    small = {"page_size": PAGE, "num_blocks": 24, "max_batch_tokens": 32, **fields}
    return {
        "generation_config": GenerationConfig(**GREEDY),
        "continuous_batching_config": ContinuousBatchingConfig(**small),
    }


def batched(model, prompts, new: int = NEW, **fields) -> list[list[int]]:
    """What `generate_batch` writes after several prompts."""
    outputs = model.generate_batch([list(ids) for ids in prompts], max_new_tokens=new, **settings(**fields)).values()
    assert [output.error for output in outputs] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs]


class Requests:
    """A manager's loop, step by step in this thread, and counts of what happened in it."""

    def __init__(self, model, **fields):
        self.manager = model.init_continuous_batching(**settings(**fields))
        self.processor = self.manager.batch_processor = self.manager._create_batch_processor()
        self.counts = Counter()
        self.count(self.processor.offloading_manager, "offload_requests", "evicted")
        self.count(self.processor.cache, "search_prefix_match", "shared")

    def count(self, owner, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counting(*given):
            result = original(*given)
            self.counts[name] += int(result)
            return result

        setattr(owner, method, counting)

    def restart(self) -> None:
        """Forgets all requests and pages; the memory's tables keep what is in them."""
        self.processor.reset()
        self.processor.cache.reset()

    def step(self) -> None:
        if self.processor.prepare_next_batch():
            self.processor._generation_step(self.manager.model)
            self.processor.update_batch()

    def run(self, schedule: list[tuple]) -> dict[int, list[int]]:
        """Runs `(prompt, new tokens, step to join at, step to cancel at or None)`; returns tokens by index."""
        written, step = {}, 0
        waiting = dict(enumerate(schedule))
        while waiting or self.processor.has_pending_requests():
            for index, (ids, new, joins, _) in list(waiting.items()):
                if joins <= step:
                    self.manager.add_request(list(ids), request_id=str(index), max_new_tokens=new)
                    del waiting[index]
            for index, (_, _, _, leaves) in enumerate(schedule):
                if leaves == step:
                    self.manager.cancel_request(str(index))
                    # Transformers waits for ever for a request to finish if it evicts one and the others are cancelled.
                    self.processor.scheduler.block_new_requests = False
            if not self.manager.input_queue.empty() or self.processor.has_pending_requests():
                self.step()
            step += 1
            assert step < 1000, "requests wait for ever"
        while not self.manager.output_router.output_queue.empty():
            output = self.manager.output_router.output_queue.get()
            assert output.error is None
            written[int(output.request_id)] = output.generated_tokens
        return written


@functools.cache
def requests_on(kind: str, blocks: int, tokens: int) -> Requests:
    return Requests(model_on(kind), num_blocks=blocks, max_batch_tokens=tokens)


# Blocks of caches: the first holds little more than the longest request, the last has room for all.
BLOCKS = {"full": [7, 9, 16], "mixed": [5, 6, 9], "windows": [5, 6, 9]}


@st.composite
def schedules(draw, kind: str) -> tuple[int, int, list[tuple]]:
    """Blocks of the cache, tokens of a batch, and requests."""
    requests = st.tuples(
        st.builds(prompt, st.integers(0, 1), st.sampled_from([0, 4, 9, 12]), st.integers(0, 5)),
        st.integers(1, NEW),
        st.integers(0, 12),
        st.sampled_from([None, None, None, 3, 9]),
    )
    sizes = st.sampled_from(BLOCKS[kind]), st.sampled_from([3, 8, 40])
    return draw(st.tuples(*sizes, st.lists(requests, min_size=2, max_size=8)))


def run_schedules(kind: str, count: int) -> Counter:
    """Asserts that many schedules are exact; returns what happened in them."""
    seen = Counter()

    @examples(count)
    @given(schedule=schedules(kind))
    def every_request_is_exact(schedule):
        blocks, tokens, planned = schedule
        requests = requests_on(kind, blocks, tokens)
        requests.restart()
        requests.counts.clear()
        try:
            written = requests.run(planned)
        except RuntimeError as error:  # a schedule that Transformers gives up, whatever the model
            assert "no requests can be offloaded" in str(error)
            reject()
        for index, (ids, new, _, leaves) in enumerate(planned):
            if index in written:
                assert written[index] == expected(kind, ids)[:new], (index, planned)
            else:
                assert leaves is not None
        seen.update({**requests.counts, "schedules": 1, "left": len(planned) - len(written)})
        seen["pieces"] += sum(len(ids) > tokens for ids, *_ in planned)

    every_request_is_exact()
    return seen


# Six requests that grow where there is no room for all, two that begin as others did, and one that leaves.
CROWDED = [(prompt(index % 2, 4 * (index % 2), index), NEW, index // 2, None) for index in range(6)]
CROWDED += [(prompt(0, 12, 0), 6, 14, None), (prompt(0, 9, 4), NEW, 40, None), (prompt(0, 4, 3), NEW, 3, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_are_evicted_share_a_prefix_or_leave_are_exact(kind):
    requests = requests_on(kind, BLOCKS[kind][1], 8)
    requests.restart()
    requests.counts.clear()
    written = requests.run(CROWDED)
    assert written == {index: expected(kind, ids)[:new] for index, (ids, new, *_) in enumerate(CROWDED[:-1])}
    assert requests.counts["evicted"] and bool(requests.counts["shared"]) == (kind == "full")


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_schedules_are_exact(kind):
    run_schedules(kind, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("full", 80), ("mixed", 60), ("windows", 60)])
def test_many_schedules_are_exact(kind, count):
    seen = run_schedules(kind, count)
    print(kind, dict(seen))
    assert seen["evicted"] and seen["left"] and seen["pieces"] and (seen["shared"] or kind != "full"), seen


def nothing_before(patch):
    original = cache_paged_engram._origins
    patch.setattr(
        cache_paged_engram, "_origins", lambda firsts, known, *sizes: original(firsts, torch.zeros_like(known), *sizes)
    )


def requests_run_together(patch):
    original = cache_paged_engram._origins
    patch.setattr(cache_paged_engram, "_origins", lambda firsts, known, *sizes: original(firsts[:1], known[:1], *sizes))


def classes_not_stored(patch):
    patch.setattr(PagedTexts, "remember_classes", lambda self, classes: None)


def convolution_not_stored(patch):
    original = PagedTexts.store
    patch.setattr(
        PagedTexts, "store", lambda self, state, new: None if new.is_floating_point() else original(self, state, new)
    )


def stored_one_place_late(patch):
    original = PagedTexts.store

    def late(self, state, new):
        self.places = (self.places + 1) % self.table_length
        original(self, state, new)
        self.places = (self.places - 1) % self.table_length

    patch.setattr(PagedTexts, "store", late)


@pytest.mark.parametrize("kind", ["full", "windows"])
@pytest.mark.parametrize(
    "break_model",
    [nothing_before, requests_run_together, classes_not_stored, convolution_not_stored, stored_one_place_late],
)
def test_a_planted_break_changes_what_is_written(break_model, kind, monkeypatch):
    requests = requests_on(kind, BLOCKS[kind][1], 8)
    requests.restart()
    requests.processor.cache.engram_tables.clear()
    break_model(monkeypatch)
    written = requests.run(CROWDED)
    wrong = sum(written[index] != expected(kind, ids)[:new] for index, (ids, new, *_) in enumerate(CROWDED[:-1]))
    assert wrong >= 4


PROMPTS = [prompt(0, 12, 0), prompt(0, 12, 1), prompt(1, 0, 0), prompt(1, 9, 5)]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_generate_batch_is_exact(kind):
    assert batched(model_on(kind), PROMPTS, max_batch_tokens=7) == [expected(kind, ids) for ids in PROMPTS]


def test_without_the_memory_the_backbone_batches_alone(tmp_path):
    model = model_on("full")
    plain = [alone(model.backbone, ids, 4) for ids in PROMPTS]
    with model.disable_memory():
        assert batched(model, PROMPTS, 4) == plain == batched(model.backbone, PROMPTS, 4)
    assert batched(model, PROMPTS, 4) == [expected("full", ids)[:4] for ids in PROMPTS] != plain
    model.save_pretrained(tmp_path)
    nowhere = type(model).from_pretrained(tmp_path, engram_placement="none")
    assert batched(nowhere, PROMPTS, 4) == plain


@pytest.mark.parametrize(
    "fields",
    [
        {"engram_kernel_size": 0},
        {"engram_reset_token_ids": [random_ids(12, 100)[10], random_ids(12, 100)[2]]},
        {"engram_max_ngram_size": 4, "engram_gate": "sigmoid"},
    ],
    ids=["without convolution", "documents end", "longer n-grams"],
)
def test_other_memories_are_exact(fields):
    model = engram_on(KINDS["full"](), **fields)
    assert Requests(model, num_blocks=8, max_batch_tokens=5).run([(ids, NEW, 0, None) for ids in PROMPTS]) == {
        index: alone(model, ids) for index, ids in enumerate(PROMPTS)
    }


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_tables_may_be_elsewhere_and_packs_are_read(placement, tmp_path):
    model = engram_on(KINDS["full"]())
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, engram_placement=placement)
    without = [alone(model, ids) for ids in PROMPTS]
    assert without == [expected("full", ids) for ids in PROMPTS]
    grams = set().union(*(ngrams_in(classes_of(model, torch.tensor(ids))) for ids in PROMPTS))
    model.load_memory(pack_of(model, grams), name="all")
    packed = [alone(model, ids) for ids in PROMPTS]
    assert batched(model, PROMPTS, max_batch_tokens=7) == packed != without


def test_eager_attention_is_exact():
    model = engram_on(KINDS["mixed"]())
    model.set_attn_implementation("eager")
    single = [alone(model, ids) for ids in PROMPTS]
    assert batched(model, PROMPTS) == single
    assert model.backbone.config._attn_implementation == "eager"  # restored


def test_a_block_table_names_the_same_places_as_indices():
    requests, compared = Requests(model_on("full")), []

    def compare(_, args, inputs):
        batch, cache = requests.processor.inputs_and_outputs.requests_in_batch, inputs["cache"]
        if any(future.query_length > 1 for future in batch):
            return  # such a pass has no block table
        blocks = torch.full((1, len(batch), 24), -1, dtype=torch.int32)
        for row, future in enumerate(batch):
            past = future.state.position_offset - 1
            cache.fill_block_table(future.state.request_id, past, 1, blocks[:, row])
        by_index, by_block = (PagedTexts(cache, {**inputs, "block_table": table}, 9) for table in (None, blocks))
        assert torch.equal(by_index.places, by_block.places) and torch.equal(by_index.origins, by_block.origins)
        for row, future in enumerate(batch):
            past = min(future.state.position_offset - 1, 9)
            assert torch.equal(by_index.before[row, :past], by_block.before[row, :past])
        compared.append(len(batch))

    hook = requests.manager.model.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        requests.run([(ids, NEW, 0, None) for ids in PROMPTS])
    finally:
        hook.remove()
    assert max(compared) == len(PROMPTS)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cpu_offload_space": 1.0}, "cpu_offload_space=1.0: Transformers copies pages"),
        ({"cpu_offload_space": None}, "Set it to 0"),
        ({"use_cuda_graph": True}, "use_cuda_graph=True: .* runs without CUDA graphs"),
        ({"use_cuda_graph": (False, True)}, "set it to False"),
        ({"varlen_compile_config": CompileConfig()}, "leave out varlen_compile_config"),
        ({"default_compile_level": 1}, "is not compiled"),
    ],
)
def test_settings_that_would_lose_a_history_are_refused(fields, says):
    with pytest.raises(NotImplementedError, match=says):
        batched(model_on("full"), PROMPTS, **fields)


def test_several_answers_and_packs_by_request_are_refused():
    model = model_on("full")
    with pytest.raises(NotImplementedError, match="num_return_sequences=3: .* Give each prompt 3 times"):
        model.init_continuous_batching(GenerationConfig(num_return_sequences=3, do_sample=True))
    with pytest.raises(NotImplementedError, match="Choose them before with set_memories"):
        model.generate_batch([[5, 6]], memory_names=["law"])


def test_backbones_without_pages_are_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"no pages for layers of \['conv'\]"):
        engram_on(BACKBONES["lfm2"]()).init_continuous_batching()
    with pytest.raises(NotImplementedError, match=r"last 9 tokens \(sliding_window\), and the memory reads 9"):
        engram_on(MistralConfig(**HEADS, sliding_window=9)).init_continuous_batching()
    monkeypatch.setattr(compat_engram.PagedAttentionArgs, "__annotations__", {"input_ids": torch.Tensor})
    with pytest.raises(NotImplementedError, match="install transformers 5.20.2 to 5.24"):
        model_on("full").init_continuous_batching()


def test_the_users_settings_are_not_changed():
    given = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8)
    model_on("full").init_continuous_batching(GenerationConfig(**GREEDY), given)
    assert given.use_cuda_graph is None


def test_a_pass_without_the_memory_amid_requests_is_refused():
    requests = Requests(model_on("full"))
    requests.manager.add_request(list(PROMPTS[0]))
    requests.step()
    with requests.manager.model.disable_memory(), pytest.raises(ValueError, match="begun with the memory on"):
        requests.step()
