"""Which rows may change: counts equal a readable count, what is chosen changes, and nothing else does.

Counts and rows are integers and exact; scores are compared to 1e-12 in float64; rows that must not change are compared
bit by bit. Run: pytest tests/unit/test_selection.py
"""

import copy
import io
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from engram_transformers.hash_ngrams_engram import naive_hash_ids
from engram_transformers.rows_gradient_engram import are_among, row_gradient
from engram_transformers.training import EngramTrainer, create_optimizer
from engram_transformers.training.row_selection import RowCounts, RowSelection, select_rows


NEW = [[5, 6, 7, 8, 5, 6], [9, 5, 6], [300, 301, 302, 303]]
GENERAL = [[5, 6, 7], [40, 5, 6, 43], [44, 5, 6]]

token = st.integers(3, 12)  # few ids, so that texts share n-grams
texts = st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=6)


def naive_reads(model, text: list[int]) -> list[tuple[str, int]]:
    """Part and row of every read of one text, in plain Python."""
    memory, reads = model.memory, []
    hashing = memory.hashing
    classes = [int(hashing.token_map[token]) if token >= 0 else -1 for token in text]
    for index, layer in enumerate(memory.layer_ids):
        primes = hashing.primes[index].tolist()
        hashes = naive_hash_ids(classes, hashing.multipliers[index].tolist(), primes, int(hashing.pad_class))
        for position, alive in zip(hashes, classes, strict=True):
            for order, heads in enumerate(primes):
                table = memory.tables[str(layer)].orders()[order]
                for head in range(len(heads)):
                    row = position[order * len(heads) + head] + sum(heads[:head])
                    part = min(row // table.part_height, len(table) - 1)
                    name = f"memory.tables.{layer}.order{order + 2}.{part}"
                    if alive >= 0:
                        reads.append((name, row - part * table.part_height))
    return reads


def naive_scores(model, new: list[list[int]], general: list[list[int]]) -> dict[tuple[str, int], tuple]:
    """Score, reads and general texts of every row that the new texts read."""
    counts = Counter(read for text in new for read in naive_reads(model, text))
    documents = Counter(read for text in general for read in set(naive_reads(model, text)))
    totals = Counter()
    for (name, _), count in counts.items():
        totals[name.rpartition(".")[0]] += count
    return {
        (name, row): (
            count / totals[name.rpartition(".")[0]] * math.log((len(general) + 1) / (documents[name, row] + 1)),
            count,
            documents[name, row],
        )
        for (name, row), count in counts.items()
    }


def chosen(selection: RowSelection) -> set[tuple[str, int]]:
    return {(name, row) for name, rows in selection.rows.items() for row in rows.tolist()}


@pytest.fixture(params=[1, 3])
def model(tiny_engram, request):
    return tiny_engram(engram_table_parts=request.param)


# What is chosen.


@given(new=texts, general=texts)
def test_without_limits_the_rows_are_those_that_no_general_text_reads(new, general, model):
    expected = naive_scores(model, new, general)
    selection = select_rows(model, new, reference_texts=general)
    assert chosen(selection) == {read for read, (_, _, documents) in expected.items() if documents == 0}
    covered = sum(count for _, count, documents in expected.values() if documents == 0)
    assert selection.coverage == pytest.approx(covered / sum(count for _, count, _ in expected.values()), abs=1e-12)


@given(new=texts, general=texts, top_k=st.integers(1, 40))
def test_the_best_rows_of_each_order_are_chosen(new, general, top_k, model):
    expected = naive_scores(model, new, general)
    found = chosen(select_rows(model, new, reference_texts=general, top_k=top_k))
    for order in {name.rpartition(".")[0] for name, _ in expected}:
        scores = {read: score for read, (score, _, _) in expected.items() if read[0].startswith(order)}
        mine = {read for read in found if read[0].startswith(order)}
        assert len(mine) == min(top_k, sum(score > 0 for score in scores.values()))
        best_left_out = max((score for read, score in scores.items() if read not in mine), default=0.0)
        assert all(scores[read] >= best_left_out - 1e-12 for read in mine)


@given(new=texts, general=texts, min_score=st.floats(0.001, 0.5))
def test_rows_above_a_score_are_chosen(new, general, min_score, model):
    expected = naive_scores(model, new, general)
    found = chosen(select_rows(model, new, reference_texts=general, min_score=min_score))
    assert all(expected[read][0] > min_score - 1e-12 for read in found)
    assert all(expected[read][0] < min_score + 1e-12 for read in expected if read not in found)


def test_every_row_comes_with_what_was_counted(model):
    expected = naive_scores(model, NEW, GENERAL)
    selection = select_rows(model, NEW, reference_texts=GENERAL, min_score=1e-9)
    seen = {
        (name, row): (reads, general)
        for name, part in selection.parts.items()
        for row, reads, general in zip(part.rows.tolist(), part.reads.tolist(), part.general.tolist(), strict=True)
    }
    assert seen == {read: counted[1:] for read, counted in expected.items() if counted[0] > 1e-9}
    assert len(selection) == len(seen) < sum(part.all_rows for part in selection.parts.values()) == len(expected)
    assert f"{len(seen):,} of the {len(expected):,} rows" in str(selection) and "(3 texts)" in str(selection)
    assert all(torch.equal(rows, torch.unique(rows)) for rows in selection.rows.values())


def test_a_row_that_every_general_text_reads_is_never_chosen(model):
    same = [NEW[0]]
    assert len(select_rows(model, same, reference_texts=same, top_k=10_000)) == 0
    assert len(select_rows(model, same, reference_texts=GENERAL[1:2], top_k=10_000)) > 0, (
        "control: another general text"
    )


# What texts may be.


def test_strings_token_ids_tensors_and_padded_batches_are_counted_alike(tiny_engram, tiny_tokenizer):
    model, strings = tiny_engram(), ["the sea is deep", "a ship"]
    ids = tiny_tokenizer(strings)["input_ids"]
    assert len(ids[0]) != len(ids[1])
    padded = tiny_tokenizer(strings, padding=True, padding_side="left", return_tensors="pt")
    against = [[7, 8, 9]]
    kinds = [
        select_rows(model, strings, reference_texts=against, tokenizer=tiny_tokenizer, top_k=50),
        select_rows(model, (text for text in ids), reference_texts=iter(against), top_k=50),
        select_rows(model, [torch.tensor(text) for text in ids], reference_texts=against, top_k=50),
        select_rows(model, [padded], reference_texts=against, top_k=50),
        select_rows(model, [[], *ids], reference_texts=[*against, []], top_k=50),
    ]
    for kind in kinds[1:]:
        assert_equal(kind, kinds[0])
    unmasked = select_rows(model, [padded["input_ids"]], reference_texts=against, top_k=50)
    assert chosen(unmasked) != chosen(kinds[0]), "control: pads that are read as text"


def assert_equal(one: RowSelection, other: RowSelection) -> None:
    assert one.general_texts == other.general_texts and one.digests == other.digests
    assert one.parts.keys() == other.parts.keys()
    for name, part in one.parts.items():
        for field, value in vars(part).items():
            there = getattr(other.parts[name], field)
            assert torch.equal(value, there) if isinstance(value, torch.Tensor) else value == there, (name, field)


def test_packed_documents_are_counted_apart(tiny_engram):
    model = tiny_engram()
    packed = {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]]}
    apart = select_rows(model, [[5, 6, 7], [8, 9]], reference_texts=GENERAL[1:2])
    assert_equal(select_rows(model, [packed], reference_texts=GENERAL[1:2]), apart)
    assert chosen(select_rows(model, [packed["input_ids"]], reference_texts=GENERAL[1:2])) != chosen(apart), "control"
    resetting = tiny_engram(engram_reset_token_ids=[7])
    by_token = select_rows(resetting, [[5, 6, 7, 8, 9]], reference_texts=GENERAL[1:2])
    assert chosen(by_token) == chosen(apart)


@given(reads=st.lists(st.lists(st.integers(0, 50), max_size=30), max_size=12), together=st.integers(1, 64))
def test_counts_are_the_same_however_they_are_gathered(reads, together):
    counts = RowCounts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram_transformers.training.row_selection.TOGETHER", together)
        for rows in reads:
            counts.add(torch.tensor(rows, dtype=torch.int64))
    counts.merge_waiting()
    expected = Counter(row for rows in reads for row in rows)
    assert dict(zip(counts.rows.tolist(), counts.counts.tolist(), strict=True)) == expected
    assert counts.rows.tolist() == sorted(expected)
    assert counts.reads == sum(expected.values())


def test_reads_are_not_kept_beyond_the_distinct_rows():
    counts = RowCounts()
    for _ in range(300):
        counts.add(torch.arange(1000))
    assert sum(map(len, counts.waiting)) < 2**16 + 1000 < 300 * 1000
    assert len(counts.rows) == 1000


@given(rows=st.sets(st.integers(0, 30)), known=st.sets(st.integers(0, 30)))
def test_membership_is_that_of_sets(rows, known):
    rows, known = sorted(rows), sorted(known)
    found = are_among(torch.tensor(rows, dtype=torch.int64), torch.tensor(known, dtype=torch.int64))
    assert found.tolist() == [row in known for row in rows]


# What a selection does.


def train(model, steps: int = 3) -> list[float]:
    """A few steps on the new texts; the norm of the gradient before each."""
    optimizer = create_optimizer(model, lr=1e-2)
    norms = []
    for _ in range(steps):
        for text in NEW:
            ids = torch.tensor([[*text, 11]])  # the last token's rows predict nothing
            model(ids, labels=ids).loss.backward()
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(float(torch.nn.utils.clip_grad_norm_(held, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def changed_rows(model, before: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    return {
        (name, row)
        for name, part in rows_of(model).items()
        for row in (part != before[name]).any(dim=1).nonzero().flatten().tolist()
    }


def rows_of(model) -> dict[str, torch.Tensor]:
    return {
        name: part.read(torch.arange(part.table_shape[0])).clone() for name, part in model.memory.named_parts().items()
    }


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_chosen_rows_change_and_no_others(placement, model, tmp_path):
    model.save_pretrained(tmp_path)
    model.set_trainable("memory")
    guarded, free = (twin.place_memory(placement, folder=tmp_path) for twin in (copy.deepcopy(model), model))
    selection = select_rows(guarded, NEW, reference_texts=GENERAL)
    selection.apply(guarded)
    before = rows_of(guarded)
    train(guarded)
    train(free)
    assert changed_rows(guarded, before) == chosen(selection)
    read = {read for text in NEW for read in naive_reads(model, text)}
    assert changed_rows(free, before) == read > chosen(selection), "control: without a selection"
    RowSelection.clear(guarded)
    train(guarded)
    assert changed_rows(guarded, before) == read


def test_what_general_text_reads_stays_bit_for_bit(tiny_engram):
    def after(guard: bool):
        model = tiny_engram()
        model.requires_grad_(False)
        model.memory.tables.requires_grad_(True)
        if guard:
            select_rows(model, NEW, reference_texts=GENERAL).apply(model)
        with torch.no_grad():
            before = [model(torch.tensor([text])).logits for text in (*GENERAL, *NEW)]
        train(model)
        with torch.no_grad():
            return [
                torch.equal(model(torch.tensor([text])).logits, logits)
                for text, logits in zip((*GENERAL, *NEW), before, strict=True)
            ]

    assert after(guard=True) == [True, True, True, False, False, False]
    assert not all(after(guard=False)[:3]), "control: without a selection"


def test_norms_count_only_rows_that_may_change(tiny_engram):
    def gradients(guard: bool):
        model = tiny_engram(trained=True)
        selection = select_rows(model, NEW, reference_texts=GENERAL)
        if guard:
            selection.apply(model)
        ids = torch.tensor([NEW[0]])
        model(ids, labels=ids).loss.backward()
        return selection, {name: row_gradient(part) for name, part in model.memory.named_parts().items()}

    selection, guarded = gradients(guard=True)
    _, free = gradients(guard=False)
    for name, gradient in guarded.items():
        kept = are_among(free[name].rows, selection.rows[name])
        assert torch.equal(gradient.rows, free[name].rows[kept]) and 0 < int(kept.sum()) < len(kept)
        torch.testing.assert_close(gradient.row_values, free[name].row_values[kept], rtol=0, atol=1e-6)
        expected = free[name].row_values[kept].norm()
        torch.testing.assert_close(torch.nn.utils.get_total_norm([gradient]), expected, rtol=1e-5, atol=0)


def test_a_batch_that_reads_no_chosen_row_leaves_no_gradient(tiny_engram):
    model = tiny_engram()
    select_rows(model, NEW[2:], reference_texts=[*NEW[:2], *GENERAL]).apply(model)
    ids = torch.tensor([GENERAL[0]])
    model(ids, labels=ids).loss.backward()
    assert all(part.grad is None for part in model.memory.named_parts().values())
    optimizer = create_optimizer(model)
    before = rows_of(model)
    optimizer.step()
    assert changed_rows(model, before) == set()


# Saved, and refused.


def test_a_selection_survives_a_file_of_plain_tensors(tiny_engram):
    model = tiny_engram()
    selection, file = select_rows(model, NEW, reference_texts=GENERAL, top_k=9), io.BytesIO()
    torch.save(selection.state_dict(), file)
    file.seek(0)
    loaded = RowSelection.from_state_dict(torch.load(file, weights_only=True))
    assert_equal(loaded, selection)
    loaded.apply(model)
    assert {name: part.selected.tolist() for name, part in model.memory.named_parts().items()} == {
        name: rows.tolist() for name, rows in selection.rows.items()
    }


def test_a_selection_follows_the_tables_to_another_place_and_into_a_copy(tiny_engram):
    model = tiny_engram()
    selection = select_rows(model, NEW, reference_texts=GENERAL).apply(model)
    twin = copy.deepcopy(model)
    for moved in (model.place_memory("cpu"), twin):
        before = rows_of(moved)
        train(moved)
        assert changed_rows(moved, before) == chosen(selection)


def test_a_resumed_run_keeps_the_selection_that_its_script_does_not_make_again(tiny_engram, tmp_path):
    dataset = [{"input_ids": [*text, 11], "labels": [*text, 11]} for text in NEW]

    def run(model, steps: int, resume: bool):
        args = TrainingArguments(tmp_path, max_steps=steps, save_steps=2, report_to=[], per_device_train_batch_size=1)
        EngramTrainer(model, args, train_dataset=dataset).train(resume_from_checkpoint=resume)
        return rows_of(model)

    guarded, resumed, free = (tiny_engram().set_trainable("memory") for _ in range(3))
    before, selection = rows_of(guarded), select_rows(guarded, NEW, reference_texts=GENERAL).apply(guarded)
    run(guarded, steps=2, resume=False)
    run(resumed, steps=4, resume=True)
    assert changed_rows(resumed, before) == chosen(selection)
    run(free, steps=4, resume=False)
    assert changed_rows(free, before) > chosen(selection), "control: without a selection"


def test_a_resumed_optimizer_keeps_the_selection(tiny_engram):
    model = tiny_engram()
    selection = select_rows(model, NEW, reference_texts=GENERAL).apply(model)
    optimizer, file = create_optimizer(model), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = tiny_engram()
    create_optimizer(fresh).load_state_dict(torch.load(file, weights_only=True))
    for name, part in fresh.memory.named_parts().items():
        assert torch.equal(part.selected, selection.rows[name])


def test_another_memorys_selection_is_refused(tiny_engram):
    model, other = tiny_engram(), tiny_engram(engram_seed=1)
    selection = select_rows(other, NEW, reference_texts=GENERAL)
    with pytest.raises(ValueError, match="made for another memory: its engram_hash_sha256 is"):
        selection.apply(model)
    assert all(getattr(part, "selected", None) is None for part in model.memory.named_parts().values())
    selection.apply(other)  # the control


@pytest.mark.parametrize(
    ("rows", "why"), [([3, 3], "twice"), ([4, 3], "descending"), ([-1, 3], "negative"), ([3, 10**6], "too high")]
)
def test_damaged_rows_are_refused_before_anything_is_applied(rows, why, tiny_engram):
    model = tiny_engram()
    selection = select_rows(model, NEW, reference_texts=GENERAL)
    list(selection.parts.values())[-1].rows = torch.tensor(rows)
    with pytest.raises(ValueError, match="must be unique, ascending and below"):
        selection.apply(model)
    assert all(getattr(part, "selected", None) is None for part in model.memory.named_parts().values()), why


def test_what_cannot_be_counted_is_refused(tiny_engram, tmp_path):
    model = tiny_engram()
    with pytest.raises(TypeError, match="texts is one str: pass a list"):
        select_rows(model, "the sea", reference_texts=GENERAL)
    with pytest.raises(TypeError, match="pass tokenizer="):
        select_rows(model, ["the sea"], reference_texts=GENERAL)
    with pytest.raises(ValueError, match="reference_texts holds no text"):
        select_rows(model, NEW, reference_texts=[])
    with pytest.raises(ValueError, match="texts holds no text"):
        select_rows(model, iter([]), reference_texts=GENERAL)
    with pytest.raises(ValueError, match="top_k=0"):
        select_rows(model, NEW, reference_texts=GENERAL, top_k=0)
    with pytest.raises(IndexError, match="token id 4104 is outside the vocabulary"):
        select_rows(model, [[4104]], reference_texts=GENERAL)
    selection = select_rows(model, NEW, reference_texts=GENERAL)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tables are not loaded"):
        selection.apply(model.place_memory("none", folder=tmp_path))
