"""Knowledge packs in a model: what they touch, what they leave bit for bit, and undoing.

Run: pytest tests/integration/test_packs.py
"""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from engram_transformers.hash_ngrams_engram import NgramHasher
from engram_transformers.inspection import check_generation
from engram_transformers.inspection.generation import make_prompts
from engram_transformers.knowledge_pack_engram import FoundRecords, PackRead

from ..conftest import examples
from ..counting_device import counted
from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import engram_on


TEXTS = torch.randint(3, 4000, (4, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids=TEXTS, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


@pytest.fixture(params=[False, True], ids=["fresh", "trained"])
def model(request, tiny_engram):
    return tiny_engram(trained=request.param)


@pytest.fixture
def trained(tiny_engram):
    return tiny_engram(trained=True)


def first_text(model, places=slice(None)) -> set:
    return ngrams_in(classes_of(model, TEXTS[0])[places])


@pytest.mark.core
def test_texts_without_a_record_keep_every_bit(tiny_engram):
    """In a batch beside a text that has records; its own logits change, from the first n-gram on."""
    model = tiny_engram(trained=True)
    before = logits(model)
    model.load_memory(pack_of(model, first_text(model, slice(3, 6))), "first")
    after = logits(model)
    assert torch.equal(after[1:], before[1:]) and torch.equal(after[0, :4], before[0, :4])
    assert bool((after[0, 4:] != before[0, 4:]).any(-1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_table_the_rest_is_the_backbone(tiny_engram, dtype):
    model = tiny_engram().to(dtype)
    model.load_memory(pack_of(model, first_text(model)), "first")
    assert torch.equal(logits(model)[1:], logits(model.backbone)[1:])
    assert not torch.equal(logits(model)[0], logits(model.backbone)[0])


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_records_are_read_wherever_the_tables_are(trained, tmp_path, placement):
    pack = pack_of(trained, first_text(trained))
    trained.save_pretrained(tmp_path)
    trained.load_memory(pack, "first")
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement=placement)
    placed.load_memory(pack.save(tmp_path / "first.engram-pack.safetensors"))
    assert placed.active_memories == ["first"]
    assert torch.equal(logits(placed), logits(trained))


def test_a_pack_changes_no_file_of_the_model(trained, tmp_path):
    trained.save_pretrained(tmp_path / "before")
    trained.load_memory(pack_of(trained, first_text(trained)), "first")
    trained.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").glob("*.safetensors"):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.core
def test_every_way_of_generating_reads_records(model, monkeypatch):
    """As `check_generation` compares them; a look-up that forgets the cache's history is noticed."""
    windows = NgramHasher.windows
    grams = set().union(*(ngrams_in(classes_of(model, prompt)) for prompt in make_prompts(model, None)))
    model.load_memory(pack_of(model, grams), "prompts")
    report = check_generation(model)
    assert report.ok, str(report)
    monkeypatch.setattr(NgramHasher, "windows", lambda self, classes, *_: windows(self, classes))
    report = check_generation(model, modes=["chunks"])
    assert not report.ok, "a look-up that forgets the cache's history"


def test_pads_and_documents_end_an_ngram(trained):
    """A record is not found across them, and left pads change nothing."""
    trained.load_memory(pack_of(trained, first_text(trained)), "first")
    alone = logits(trained, TEXTS[:1])
    padded = torch.cat([torch.full((1, 3), 2), TEXTS[:1]], dim=1)
    mask = (padded != 2).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    read = logits(trained, padded, attention_mask=mask, position_ids=places)[:, 3:]
    assert torch.allclose(read, alone, atol=1e-5)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    apart = trained.memory.hashing.windows(
        trained.memory.hashing.compress(TEXTS[:1]), None, torch.nn.functional.pad(segments, (2, 0))
    )
    found = FoundRecords([PackRead(trained.memory.packs.loaded["first"])], apart).found
    matches = {one.order: one.matches[0].tolist() for one in found}
    assert matches[2] == [False] + [True] * 4 + [False] + [True] * 6
    assert matches[3] == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 5


@cache
def _with_packs():
    """One model, four packs of overlapping n-grams, and its logits without any."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = engram_on(LlamaConfig(vocab_size=4104, num_key_value_heads=2, pad_token_id=2, **sizes))
    texts = [ngrams_in(classes_of(model, text)) for text in TEXTS[:2]]
    packs = [pack_of(model, texts[n % 2], seed=n, mode=("add", "replace")[n // 2]) for n in range(4)]
    return model, packs, logits(model)


@examples(40)
@given(
    moves=st.lists(st.tuples(st.sampled_from(["load", "unload", "order"]), st.integers(0, 3), st.randoms()), max_size=8)
)
def test_whatever_was_done_undoing_restores_every_bit(moves):
    model, packs, plain = _with_packs()
    expected = {}
    for move, number, rng in moves:
        name = f"pack{number}"
        loaded = list(model.memory.packs.loaded)
        if move == "load" and name not in loaded:
            model.load_memory(packs[number], name)
        elif move == "unload" and name in loaded:
            assert model.unload_memory(name) is packs[number]
        elif move == "order":
            model.set_memories(rng.sample(loaded, rng.randint(0, len(loaded))))
        active = tuple(model.active_memories)
        now = logits(model)
        assert torch.equal(expected.setdefault(active, now), now), "the same packs in the same order give the same bits"
    for name in list(model.memory.packs.loaded):
        model.unload_memory(name)
    assert torch.equal(logits(model), plain)


def test_order_decides_between_packs_that_replace(trained):
    grams = first_text(trained)
    one, other = (pack_of(trained, grams, seed=seed, mode="replace") for seed in (1, 2))
    trained.load_memory(one, "one")
    alone = logits(trained)
    trained.load_memory(other, "other")
    assert trained.memory_conflicts() == {gram: ["one", "other"] for gram in grams}
    assert not torch.equal(logits(trained), alone)
    trained.set_memories(["other", "one"])
    assert torch.equal(logits(trained), alone)


@examples(30)
@given(
    rows=st.lists(
        st.permutations(range(4)).flatmap(lambda p: st.integers(0, 4).map(lambda n: p[:n])), min_size=4, max_size=4
    )
)
def test_every_row_reads_its_own_packs_in_its_own_order(rows):
    """Against one pass for each row, in which all rows read that row's packs."""
    model, packs, _ = _with_packs()
    for number, pack in enumerate(packs):
        model.load_memory(pack, f"pack{number}")
    names = [[f"pack{number}" for number in row] for row in rows]
    try:
        read = logits(model, memory_names=names)
        assert model.active_memories == [f"pack{number}" for number in range(4)]
        for row, own in enumerate(names):
            model.set_memories(own)
            assert torch.equal(read[row], logits(model)[row])
    finally:
        for name in list(model.memory.packs.loaded):
            model.unload_memory(name)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": False, "cache_implementation": "static"}])
def test_rows_generate_with_packs_of_their_own(trained, way):
    """Beams and sequences of a row stay with its packs; a name alone, several names, and none."""
    for seed, name in enumerate(["one", "other"]):
        trained.load_memory(pack_of(trained, ngrams_in(classes_of(trained, TEXTS[0])), seed=seed), name)
    same = TEXTS[:1].repeat(4, 1)
    names = ["one", None, ["other"], ["one", "other"]]
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "pad_token_id": 2, "return_dict_in_generate": True, "output_logits": True, **way}
    together = trained.generate(same, memory_names=names, **settings)
    firsts = []
    for row, own in enumerate(names):
        trained.set_memories([] if own is None else [own] if isinstance(own, str) else own)
        alone = trained.generate(same, **settings)
        assert torch.equal(together.sequences[row], alone.sequences[row])
        firsts.append(alone.logits[0][0])
    assert all(not torch.equal(firsts[0], other) for other in firsts[1:]), "control: packs matter here"


def test_names_for_rows_that_are_wrong_are_refused(trained):
    trained.load_memory(pack_of(trained, first_text(trained)), "one")
    before = logits(trained)
    for names, error, message in (
        (["one"] * 3, ValueError, "has 3 entries, and the batch has 4 rows"),
        (["one", None, None, "two"], ValueError, "no memory named 'two' is loaded"),
        ([["one", "one"], None, None, None], ValueError, "named twice"),
        ("one", TypeError, "not one text"),
    ):
        with pytest.raises(error, match=message):
            trained(TEXTS, memory_names=names)
        with pytest.raises(error, match=message):
            trained.generate(TEXTS, memory_names=names, max_new_tokens=1)
    assert torch.equal(logits(trained), before)
    nobody = trained(TEXTS, memory_names=[None] * 4).logits
    trained.set_memories([])
    assert torch.equal(nobody, logits(trained))


def test_a_trace_names_records_and_rows(trained):
    classes = classes_of(trained, TEXTS[0])
    trained.load_memory(pack_of(trained, first_text(trained, slice(3, 6))), "first")
    trace = trained.memory_trace(TEXTS[:1])
    assert [token["id"] for token in trace] == TEXTS[0].tolist()
    assert [len(token["records"]) for token in trace] == [0, 0, 0, 0, 1, 2] + [0] * 6
    assert trace[5]["records"] == [("first", tuple(classes[4:6])), ("first", tuple(classes[3:6]))]
    rows = trained.memory.hashing(TEXTS[:1])[1]
    assert all(token["rows"][2] == rows[1, 0, place].tolist() for place, token in enumerate(trace))
    with pytest.raises(ValueError, match="one text, given are 4"):
        trained.memory_trace(TEXTS)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_pass_reads_records(backend, tiny_llama_config, tiny_donor, tiny_engram):
    tiny_llama_config.num_hidden_layers = 2
    model = tiny_engram(trained=True, donor=tiny_donor(tiny_llama_config), layers=(0, 1))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    without = compiled(TEXTS, use_cache=False).logits
    model.load_memory(pack_of(model, first_text(model)), "first")
    read = compiled(TEXTS, use_cache=False).logits
    torch.compiler.reset()
    assert torch.allclose(read, logits(model), atol=1e-5)
    assert not torch.allclose(read[0], without[0], atol=1e-3)
    assert torch.equal(read[1:], without[1:]) or torch.allclose(read[1:], without[1:], atol=1e-6)


def test_copies_have_their_own_packs(trained):
    pack = pack_of(trained, first_text(trained))
    copied = copy.deepcopy(trained)
    copied.load_memory(pack, "first")
    assert trained.active_memories == [] and not torch.equal(logits(copied), logits(trained))


def test_mistakes_are_refused_and_change_nothing(trained, tmp_path, tiny_engram):
    pack = pack_of(trained, first_text(trained))
    before = logits(trained)
    with pytest.raises(ValueError, match="needs a name"):
        trained.load_memory(pack)
    with pytest.raises(FileNotFoundError):
        trained.load_memory(tmp_path / "none.engram-pack.safetensors")
    other = tiny_engram(trained=True, layers=(0, 1))
    with pytest.raises(ValueError, match=r"made for the Engram layers \[1, 2\], and this model has \[0, 1\]"):
        other.load_memory(pack, "first")
    retrained = tiny_engram(trained=True, seed=1)
    with pytest.raises(ValueError, match="projections and norms with the digest"):
        retrained.load_memory(pack, "first")
    trained.save_pretrained(tmp_path)
    nowhere = AutoModelForCausalLM.from_pretrained(tmp_path, engram_placement="none")
    with pytest.raises(ValueError, match="without its memory"):
        nowhere.load_memory(pack, "first")
    assert trained.active_memories == other.active_memories == retrained.active_memories == []
    assert torch.equal(logits(trained), before)


def test_another_type_of_the_same_reader_is_accepted(trained):
    pack = pack_of(trained, first_text(trained))
    half = copy.deepcopy(trained).to(torch.bfloat16)
    half.load_memory(pack, "first")
    assert half.active_memories == ["first"]


def test_weights_that_are_elsewhere_are_refused(trained):
    pack = pack_of(trained, first_text(trained))
    trained.memory.layers.to("meta")
    with pytest.raises(ValueError, match="offloaded or sharded"):
        trained.load_memory(pack, "first")
    assert trained.active_memories == []


@pytest.mark.parametrize("rows", [None, ["first", None]])
def test_vectors_on_the_host_travel_only_where_they_are_found(device, trained, rows):
    """On the counting device: the logits of a pack that was copied to it, and no byte of its vectors but those read."""
    many = first_text(trained) | {(first, second) for first in range(50) for second in range(40)}
    pack = pack_of(trained, many)
    texts = TEXTS[:2].to("counting")
    trained.to("counting")
    read, moved = {}, {}
    for placement in ("device", "cpu"):
        trained.load_memory(pack, "first", placement=placement)
        logits(trained, texts, memory_names=rows)  # copies what stays on the device
        with counted() as block:
            read[placement] = logits(trained, texts, memory_names=rows)
        moved[placement] = block.h2d
        trained.unload_memory("first")
    width = next(iter(pack.fits["widths"].values()))
    found = len(rows or (1, 1)) if rows is None else 1
    vectors = 4 * found * texts.shape[1] * width * len(pack.records) * len(pack.fits["layers"])
    assert torch.equal(read["device"].cpu(), read["cpu"].cpu())
    assert moved["cpu"] - moved["device"] == vectors < pack.nbytes / 4
    with pytest.raises(ValueError, match="placement 'disk' of a pack must be"):
        trained.load_memory(pack, "first", placement="disk")
