"""What a memory does to a text: reads, ablations, and the use of rows by a corpus.

Run: pytest tests/integration/test_inspection.py
"""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.hash_ngrams_engram import naive_hash_ids
from engram_transformers.inspection import CorpusNgrams, ablate, look_up, read_text, row_use, sharers
from engram_transformers.inspection.changed_memory import fixed_gate, gates_through, one_row, only_layers, shuffled_rows
from engram_transformers.rows_quantised_engram import quantise, vectors_of

from ..conftest import examples
from ..packs import classes_of, ngrams_in, pack_of


TEXT = "Alexander the Great met Diana, Princess of Wales."
TEXTS = [TEXT, "It rained all day.", "The United Kingdom, the United States"]


@pytest.fixture
def trained(tiny_engram):
    return tiny_engram(trained=True)


def ids_of(tokenizer, text=TEXT) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


@torch.no_grad()
def logits(model, tokenizer, text=TEXT) -> torch.Tensor:
    return model(ids_of(tokenizer, text), use_cache=False).logits


def test_gate_times_value_is_what_was_added(tiny_engram, tiny_tokenizer):
    """Bigrams alone and no convolution: one order's gated value is all that a layer adds."""
    model = tiny_engram(trained=True, engram_max_ngram_size=2, engram_kernel_size=0)
    before = logits(model, tiny_tokenizer)
    reads = read_text(model, tiny_tokenizer, TEXT)
    torch.testing.assert_close(reads.by_order[..., 0], reads.added, rtol=1e-5, atol=1e-6)
    assert "".join(reads.tokens) == TEXT and bool((reads.added > 0).all())
    assert reads.gates.shape == reads.stream.shape == (2, len(reads.ids), 1)
    assert torch.equal(logits(model, tiny_tokenizer), before)


def test_a_fresh_memory_adds_nothing_and_one_row_is_seen_where_it_is_read(tiny_engram, tiny_tokenizer):
    model = tiny_engram()
    reads = read_text(model, tiny_tokenizer, TEXT)
    assert not reads.added.any() and not reads.filled.any() and bool((reads.gates > 0).all())
    row = reads.rows[1, 4, 0, 1]  # the second layer's bigram that ends at the fifth token, in the second head
    with torch.no_grad():
        model.memory.tables["2"].order2[0][row] = 1.0
    after = read_text(model, tiny_tokenizer, TEXT)
    assert torch.equal(after.filled[1, :, 0], reads.rows[1, :, 0] == row) and not after.filled[0].any()
    assert not after.filled[1, :, 1].any() and float(after.added[1, 4]) > 0


def test_records_stand_where_the_pack_holds_the_ngram(trained, tiny_tokenizer):
    ids = ids_of(tiny_tokenizer)
    trained.load_memory(pack_of(trained, ngrams_in(classes_of(trained, ids[0])[2:4])), "some")
    records = read_text(trained, tiny_tokenizer, TEXT).records
    assert [bool(found) for found in records[2:5]] == [False, True, False] and records[3][0][0] == "some"


def test_every_placement_shows_the_same(trained, tiny_tokenizer):
    expected = read_text(trained, tiny_tokenizer, TEXT).to_dict()
    assert read_text(trained.place_memory("cpu"), tiny_tokenizer, TEXT).to_dict() == expected


def test_what_cannot_be_read_is_refused(trained, tiny_tokenizer):
    with pytest.raises(ValueError, match="no tokens"):
        read_text(trained, tiny_tokenizer, "")
    with pytest.raises(ValueError, match="no text of two tokens"):
        ablate(trained, tiny_tokenizer, ["a"])
    with pytest.raises(ValueError, match="layers \\[3\\] have no memory"), only_layers(trained, [3]):
        pass
    with trained.disable_memory():
        for call in (lambda: read_text(trained, tiny_tokenizer, TEXT), lambda: ablate(trained, tiny_tokenizer, TEXTS)):
            with pytest.raises(ValueError, match="runs without its memory"):
                call()


def test_contexts_are_exact_at_their_ends_and_leave_nothing(tiny_engram, tiny_donor, tiny_tokenizer):
    donor = tiny_donor()
    model = tiny_engram(trained=True, donor=tiny_donor())
    plain = logits(donor, tiny_tokenizer)
    full = logits(model, tiny_tokenizer)
    with only_layers(model, []):
        assert torch.equal(logits(model, tiny_tokenizer), plain)
    with only_layers(model, [1, 2]):
        assert torch.equal(logits(model, tiny_tokenizer), full)
    with fixed_gate(model, 0.0):
        assert torch.equal(logits(model, tiny_tokenizer), plain)
    rows = torch.zeros_like(model.memory.hashing.primes)
    for context in (only_layers(model, [1]), fixed_gate(model, 1.0), shuffled_rows(model), one_row(model, rows)):
        with context:
            changed = logits(model, tiny_tokenizer)
        assert not torch.equal(changed, full) and not torch.equal(changed, plain)
        assert torch.equal(logits(model, tiny_tokenizer), full)
    with pytest.raises(KeyError), shuffled_rows(model), gates_through(model, lambda *_: {}["broken"]):
        logits(model, tiny_tokenizer)
    assert torch.equal(logits(model, tiny_tokenizer), full)


def test_shuffled_rows_are_a_permutation_of_every_head(tiny_engram):
    model = tiny_engram()
    hasher, seen = model.memory.hashing, []
    with shuffled_rows(model, seed=3):
        (hook,) = hasher._forward_hooks.values()
    for head, prime in enumerate(hasher.primes[1, 0].tolist()):
        rows = torch.zeros(2, 1, prime, 2, 2, dtype=torch.long)
        rows += (hasher.offsets - hasher.offsets[:, :, :1])[:, None, None]
        rows[1, 0, :, 0, head] += torch.arange(prime)
        _, moved = hook(None, (), (None, rows))
        own = moved[1, 0, :, 0, head] - rows[1, 0, 0, 0, head]
        assert sorted(own.tolist()) == list(range(prime)) and own.tolist() != list(range(prime))
        seen.append(own[:9].tolist())
    assert seen[0] != seen[1]


def test_ablation_of_a_trained_and_of_a_fresh_memory(tiny_engram, tiny_donor, tiny_tokenizer):
    model = tiny_engram(trained=True, donor=tiny_donor())
    found = ablate(model, tiny_tokenizer, TEXTS)
    total = tokens = 0.0
    for text in TEXTS:
        ids = ids_of(tiny_tokenizer, text)
        with torch.no_grad():
            scores = tiny_donor()(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    assert found["memory off"]["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert found["memory as it is"]["kl"] == found["memory as it is"]["difference"] == 0
    changed = set(found) - {"memory as it is"}
    assert {"layer 1 alone", "layer 2 alone", "rows shuffled", "one row", "gate fixed at 1.0"} < changed
    assert all(found[name]["kl"] > 0 and found[name]["tokens"] == tokens for name in changed)
    fresh = ablate(tiny_engram(donor=tiny_donor()), tiny_tokenizer, TEXTS)
    assert all(one["kl"] == one["difference"] == one["other_token"] == 0 for one in fresh.values())


def test_ablation_without_packs(tiny_engram, tiny_tokenizer):
    model = tiny_engram()
    model.load_memory(pack_of(model, ngrams_in(classes_of(model, ids_of(tiny_tokenizer)[0])[2:6])), "some")
    found = ablate(model, tiny_tokenizer, TEXTS)
    assert found["packs off"]["kl"] == found["memory off"]["kl"] > 0 and model.active_memories == ["some"]


@examples(10)
@given(st.lists(st.text(alphabet="ab ", max_size=12), min_size=1, max_size=6).filter(lambda texts: any(texts)))
def test_use_of_rows_equals_counting_by_hand(counted_model, tiny_tokenizer, texts):
    """By the plain-Python hash, one position at a time."""
    model, hasher = counted_model, counted_model.memory.hashing
    corpus = CorpusNgrams(model, tiny_tokenizer, texts)
    use = {(one["layer"], one["order"]): one for one in row_use(corpus, hot=1)}
    reads, grams = Counter(), {}
    for text in texts:
        classes = hasher.compress(ids_of(tiny_tokenizer, text).long())[0].tolist()
        padded = [int(hasher.pad_class)] * 2 + classes
        for number, layer in enumerate(hasher.layer_ids):
            primes = hasher.primes[number].tolist()
            hashes = naive_hash_ids(classes, hasher.multipliers[number].tolist(), primes, int(hasher.pad_class))
            for place, rows in enumerate(hashes):
                for index, row in enumerate(rows):
                    order, head = 2 + index // 2, index % 2
                    reads[layer, order, head, row] += 1
                    gram = tuple(padded[place + 3 - order : place + 3])
                    grams.setdefault((layer, order, head, row), set()).add(gram)
    for (layer, order), one in use.items():
        own = {key: found for key, found in grams.items() if key[:2] == (layer, order)}
        distinct = set().union(*own.values())
        assert one["ngrams"] == len(distinct) and one["most_ngrams"] == max(map(len, own.values()))
        assert one["occupancy"] == len(own) / one["rows"]
        shared = Counter(sum(gram in found and len(found) > 1 for found in own.values()) for gram in distinct)
        assert one["collide"] == [shared[heads] / len(distinct) for heads in range(3)]
        (hot,) = one["hot"]
        most = max(count for key, count in reads.items() if key[:2] == (layer, order))
        assert hot["reads"] == most == one["reads"][1] == reads[layer, order, hot["head"], hot["row"]]


@pytest.fixture(scope="module")
def counted_model():
    from transformers import LlamaConfig

    from ..tiny import engram_on

    sizes = {"vocab_size": 4104, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return engram_on(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=2), engram_vocab_size=11)


def test_who_else_reads_the_rows(trained, tiny_tokenizer, monkeypatch):
    """The text's own n-grams are found in the corpus that holds them; merging piece by piece changes nothing."""
    whole = CorpusNgrams(trained, tiny_tokenizer, TEXTS)
    monkeypatch.setattr("engram_transformers.inspection.corpus_use.GATHERED", 3)
    monkeypatch.setattr("engram_transformers.inspection.corpus_use.HASHED", 2)
    corpus = CorpusNgrams(trained, tiny_tokenizer, iter(TEXTS))
    assert row_use(corpus) == row_use(whole) and corpus.tokens == whole.tokens
    reads = read_text(trained, tiny_tokenizer, "the United Kingdom")
    found = sharers(corpus, reads)
    last = len(reads.ids) - 1
    for number, layer in enumerate(reads.layer_ids):
        for row in reads.rows[number, last, 0].tolist():
            assert corpus.words(corpus_gram(trained, tiny_tokenizer, "the United Kingdom")) in found[layer, 2, row]
    assert all(len(ngrams) <= 3 for ngrams in found.values())
    with pytest.raises(ValueError, match="no token"):
        CorpusNgrams(trained, tiny_tokenizer, ["", ""])


def corpus_gram(model, tokenizer, text) -> torch.Tensor:
    """The last bigram of a text, in classes."""
    return model.memory.hashing.compress(ids_of(tokenizer, text))[0, -2:]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_ngram_is_looked_up(tiny_engram, tiny_tokenizer, monkeypatch, dtype):
    """Norms and the most similar rows by a search over the whole head, in tables of two parts."""
    monkeypatch.setattr("engram_transformers.inspection.lookup.BLOCK", 100)
    model = filled(tiny_engram, dtype)
    corpus = CorpusNgrams(model, tiny_tokenizer, TEXTS)
    found = look_up(model, tiny_tokenizer, TEXT, corpus, most=2)
    reads = read_text(model, tiny_tokenizer, TEXT)
    assert [row.row for row in found.rows] == reads.rows[:, -1].flatten().tolist()
    table, hasher = model.memory.tables["2"], model.memory.hashing
    every = vectors_of(torch.cat(table.orders()[1].tensors()), table.dtype, table.width).float()
    for one in found.rows[-2:]:  # the second layer's trigrams
        first = int(hasher.offsets[1, 1, one.head] - hasher.offsets[1, 1, 0])
        head = every[first : first + int(hasher.primes[1, 1, one.head])]
        cosines = torch.nn.functional.cosine_similarity(head, every[one.row], dim=-1)
        cosines[one.row - first] = -1
        best = cosines.topk(2)
        assert one.norm == pytest.approx(float(every[one.row].norm()), rel=1e-5)
        assert [row for row, _ in one.neighbours] == (best.indices + first).tolist()
        assert [cosine for _, cosine in one.neighbours] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert corpus.words(model.memory.hashing.compress(ids_of(tiny_tokenizer))[0, -3:]) in one.sharers
    assert found.kl["without these rows"] > 0 and set(found.next_tokens) == {"as it is", "without these rows"}
    before = logits(model, tiny_tokenizer)[0, -1].softmax(-1)
    assert found.next_tokens["as it is"][0][1] == pytest.approx(float(before.max()))
    fresh = look_up(tiny_engram(), tiny_tokenizer, TEXT)
    assert fresh.kl == {"without these rows": 0} and all(row.norm == 0 and not row.neighbours for row in fresh.rows)


def filled(tiny_engram, dtype: str):
    """A trained memory in two parts, with rows of a type."""
    model = tiny_engram(trained=dtype == "float32", engram_table_dtype=dtype, engram_table_parts=2)
    if dtype == "int8":
        for table in model.memory.tables.values():
            for order in table.orders():
                for part in order.parts:
                    part.data.copy_(quantise(torch.randn(len(part), table.width), torch.int8))
    return model
