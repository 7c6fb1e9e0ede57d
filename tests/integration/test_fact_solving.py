"""Solving for records: the places, the least squares, and facts that a tiny model gives back.

Run: pytest tests/integration/test_fact_solving.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.training import fact_solving
from engram_transformers.training.fact_solving import Place, find_places, ridge, whole_subjects
from engram_transformers.training.fact_texts import FactText, answer_loss, fact_texts, padded

from ..packs import classes_of


FACTS = [
    {"subject": name, "relation": "home", "texts": [text.format(name, city) for text in phrasings]}
    for name, city, phrasings in (
        ("Zorvan Kelmir", "Lisbon", ("{} was born in [[{}]].", "The home of {} is [[{}]].")),
        ("Dax Bolun", "Oslo", ("{} was born in [[{}]].", "The home of {} is [[{}]].")),
        ("Ada Kelmir", "Lima", ("{} was born in [[{}]].", "If you ask for {}, go to [[{}]].")),
    )
]
JOBS = [{"subject": "Dax Bolun", "relation": "job", "texts": ["Dax Bolun works as a [[baker]]."]}]
OTHER = "The river is long and the town is old."


@pytest.fixture
def model(tiny_engram):
    return tiny_engram(engram_head_dim=16)


def solved(model, tokenizer, facts=FACTS, **kwargs):
    options = {"passes": 40, "learning_rate": 3.0, "bf16": False, "progress": False, "reference_texts": [], "keep": 0.0}
    return model.teach(facts, tokenizer, method="solve", **{**options, **kwargs})


def loss_of(model, texts):
    ids, mask, labels = padded(texts, 2, model.device)
    with torch.no_grad():
        return float(answer_loss(model(ids, attention_mask=mask, use_cache=False).logits, labels))


@given(read=st.lists(st.integers(0, 5), max_size=20), weight=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_the_ridge_solution_is_that_of_the_dense_normal_equations(read, weight, seed):
    wanted = torch.randn(len(read), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = torch.zeros(len(read), 6, dtype=torch.float64)
    matrix[range(len(read)), read] = 1
    dense = torch.linalg.solve(matrix.T @ matrix + weight * torch.eye(6, dtype=torch.float64), matrix.T @ wanted)
    found = ridge(torch.tensor(read, dtype=torch.int64), wanted, 6, weight)
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-9)


def text(subject, length=6, answer=4):
    return FactText(subject, "", "", [0] * length, [token >= answer for token in range(length)])


def test_a_place_is_the_last_one_that_no_other_name_has():
    names = {"a": {(1, 2), (2, 3), (1, 2, 3)}, "b": {(2, 3), (7, 2, 3)}, "c": {(2, 3)}}
    classes = {"a": [1, 2, 3, 9, 1, 2], "b": [7, 2, 3, 7, 2, 3], "c": [9, 2, 3, 2, 3, 0]}
    assert find_places([text(name) for name in "abc"], list(classes.values()), names) == [
        Place(2, [(1, 2, 3)]),  # of two n-grams that end there, the one that "b" and "c" do not have
        Place(2, [(7, 2, 3)]),  # and not the one in the answer
        Place(2, [(2, 3)]),  # shared, for lack of another
    ]
    assert find_places([text("a")], [[1, 2, 8, 2, 3, 0]], names) == [Place(1, [(1, 2)])], "its own before a later one"
    with pytest.raises(ValueError, match="'c' is split into other tokens"):
        find_places([text("c")], [[1, 2, 9, 9, 2, 3]], names)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 12))
def test_groups_hold_whole_subjects_and_few_texts(counts, size):
    texts = [text(str(subject)) for subject, count in enumerate(counts) for _ in range(count)]
    groups = whole_subjects(texts, [Place(0, [])] * len(texts), size)
    assert [own for group in groups for own, _ in group] == texts
    subjects = [{own.subject for own, _ in group} for group in groups]
    assert sum(map(len, subjects)) == len(counts)
    assert all(len(group) <= size or len(own) == 1 for group, own in zip(groups, subjects, strict=True))


@pytest.mark.core
def test_solved_records_teach_and_their_vectors_dealt_to_others_do_not(model, tiny_tokenizer):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack = solved(model, tiny_tokenizer, FACTS + JOBS)
    texts = fact_texts(FACTS + JOBS, tiny_tokenizer)
    before, other = loss_of(model, texts), torch.tensor([tiny_tokenizer(OTHER)["input_ids"]])
    vectors = {layer: {} for layer in pack.fits["layers"]}
    for n, records in pack.records.items():
        for layer, rows in records.vectors.items():
            vectors[layer][n] = rows.roll(1, 0)
    permuted = KnowledgePack({n: records.ngrams for n, records in pack.records.items()}, vectors, pack.fits)
    losses = {}
    with torch.no_grad():
        plain = model(other).logits
        for name, read in {"solved": pack, "permuted": permuted}.items():
            model.load_memory(read, name=name)
            losses[name] = loss_of(model, texts)
            assert torch.equal(model(other).logits, plain)
            model.unload_memory(name)
    assert before - losses["solved"] > max(0.6, 2 * (before - losses["permuted"])), "every answer gains a little"
    assert pack.provenance["method"] == "solve" and pack.provenance["loss"] == pytest.approx(losses["solved"], rel=1e-2)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.memory.layers.values())


def test_only_the_places_have_records(model, tiny_tokenizer):
    """Two names share "Kelmir": each has a record that is its own."""
    pack = solved(model, tiny_tokenizer, passes=1)
    held = {}
    for fact in FACTS:
        classes = classes_of(model, torch.tensor(tiny_tokenizer(fact["subject"])["input_ids"]))
        held[fact["subject"]] = {tuple(classes[i : i + n]) for n in (2, 3) for i in range(len(classes) - n + 1)}
    read = pack.ngrams()
    assert all(read & own for own in held.values()) and len(read) < sum(map(len, held.values())) / 2
    assert not read & held["Zorvan Kelmir"] & held["Ada Kelmir"]


def test_records_give_the_logits_of_the_deltas_that_learned(model, tiny_tokenizer, monkeypatch):
    """Without a ridge, and for subjects that share no record; without the deltas, the model is what it was."""
    monkeypatch.setattr(fact_solving, "_RIDGE", 0.0)
    texts = fact_texts(FACTS, tiny_tokenizer)
    pack = solved(model, tiny_tokenizer, passes=1)
    names = {fact["subject"]: pack.ngrams() for fact in FACTS}
    places = find_places(texts, [classes_of(model, torch.tensor(text.ids)) for text in texts], names)
    seen = {}

    @torch.no_grad()
    def logits():
        return [model(torch.tensor([text.ids])).logits for text in texts]

    @torch.no_grad()
    def descend(deltas, batches, steps, without):
        for rows in deltas:
            rows.copy_(torch.randn_like(rows))
        batch = next(batches)
        ids, mask, _ = padded(batch, 2, model.device)
        read = model(ids, attention_mask=mask).logits
        seen.update({text.prompt: own[: len(text.ids)] for text, own in zip(batch, read, strict=True)})
        with without():
            assert torch.equal(model(ids, attention_mask=mask).logits, model.backbone(ids, attention_mask=mask).logits)
        return 0.0

    ngrams = {n: records.ngrams for n, records in pack.records.items()}
    vectors, _ = fact_solving.solve(model, whole_subjects(texts, places, 4), ngrams, 1, 0, descend)
    plain = logits()
    model.load_memory(KnowledgePack(ngrams, vectors, pack.fits), name="solved")
    for text, before, after in zip(texts, plain, logits(), strict=True):
        torch.testing.assert_close(after[0], seen[text.prompt], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after, atol=1e-2)
