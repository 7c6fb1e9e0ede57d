"""Documents packed into one row read nothing across their borders, told apart by positions, segments or reset tokens.

Packed logits equal the separate documents' to 1e-5 in float32, and the plain backbone is packed in the same way as the
control. Rows are compared as integers. Run: pytest tests/integration/test_packing.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from engram_transformers import EngramForCausalLM
from engram_transformers.compat_engram import CACHE
from engram_transformers.rows_gradient_engram import RowGradient
from engram_transformers.training import EngramTrainer

from ..counting_device import counted
from .test_generation import TOLERANCE, in_chunks


END = 1


@pytest.fixture
def documents():
    return [torch.randint(3, 4000, (1, length)) for length in (6, 1, 9, 2)]


def positions_of(documents):
    return torch.cat([torch.arange(text.shape[1]) for text in documents])[None]


def segments_of(documents):
    return torch.cat([torch.full((text.shape[1],), i) for i, text in enumerate(documents)])[None]


def alone(model, documents):
    return torch.cat([model(text, use_cache=False).logits for text in documents], dim=1)


@torch.no_grad()
def test_restarting_positions_part_documents(documents, tiny_engram):
    model, ids = tiny_engram(trained=True), torch.cat(documents, dim=1)
    inputs = {"position_ids": positions_of(documents), "use_cache": False}
    for lm in (model.backbone, model):
        torch.testing.assert_close(lm(ids, **inputs).logits, alone(lm, documents), rtol=0, atol=TOLERANCE)
    assert (model(ids, use_cache=False).logits - alone(model, documents)).abs().max() > 0.1, "control: unparted"


@torch.no_grad()
def test_positions_of_one_row_part_every_row_of_a_batch(documents, tiny_engram):
    model, ids = tiny_engram(trained=True), torch.cat(documents, dim=1)
    rows, positions = torch.cat([ids, ids.flip(1)]), positions_of(documents)
    packed = model(rows, position_ids=positions, use_cache=False).logits
    for row, text in zip(packed, rows, strict=True):
        separate = alone(model, text[None].split([len(d[0]) for d in documents], dim=1))
        torch.testing.assert_close(row[None], separate, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_segments_part_documents_under_a_mask_of_the_users_own(documents, tiny_engram):
    model, ids, segments = tiny_engram(trained=True), torch.cat(documents, dim=1), segments_of(documents)
    same = segments[:, :, None] == segments[:, None]  # (1, length, length)
    mask = (same & torch.ones_like(same[0]).tril())[:, None]  # (1, 1, length, length)
    inputs = {"attention_mask": mask, "position_ids": positions_of(documents), "use_cache": False}
    all_alive = torch.ones_like(ids)
    packed = model(ids, engram_segment_ids=segments, engram_attention_mask=all_alive, **inputs).logits
    torch.testing.assert_close(packed, alone(model, documents), rtol=0, atol=TOLERANCE)
    by_positions = model(ids, engram_attention_mask=all_alive, **inputs).logits  # the positions say the same
    assert torch.equal(by_positions, packed)


@torch.no_grad()
def test_segments_go_before_positions(documents, tiny_engram):
    model, ids = tiny_engram(trained=True), torch.cat(documents, dim=1)
    inputs = {"position_ids": positions_of(documents), "use_cache": False}
    one = torch.zeros_like(ids)
    assert torch.equal(reads(model, ids, engram_segment_ids=one, **inputs), reads(model, ids, use_cache=False))
    assert not torch.equal(reads(model, ids, **inputs), reads(model, ids, use_cache=False))


def reads(model, ids, **inputs):
    """Vectors of all layers, as a forward pass reads them."""
    seen, original = [], model.memory.read
    model.memory.read = lambda *given: seen.append(original(*given)) or seen[-1]
    try:
        model(ids, **inputs)
    finally:
        model.memory.read = original
    return torch.stack([seen[0].vectors(layer) for layer in model.memory.layer_ids])


@torch.no_grad()
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), kernel=st.integers(0, 4), order=st.integers(2, 4))
def test_any_packing_reads_what_the_documents_read(lengths, kernel, order, tiny_engram):
    model = tiny_engram(trained=True, engram_kernel_size=kernel, engram_max_ngram_size=order)
    texts = [torch.randint(3, 4000, (1, length)) for length in lengths]
    ids, inputs = torch.cat(texts, dim=1), {"position_ids": positions_of(texts), "use_cache": False}
    separate = torch.cat([reads(model, text, use_cache=False) for text in texts], dim=2)
    assert torch.equal(reads(model, ids, **inputs), separate)
    torch.testing.assert_close(model(ids, **inputs).logits, alone(model, texts), rtol=0, atol=TOLERANCE)


# What would be wrong is refused.


@torch.no_grad()
def test_restarted_positions_with_a_cache_are_refused(documents, tiny_engram):
    model, ids, positions = tiny_engram(), torch.cat(documents, dim=1), positions_of(documents)
    for inputs in ({"use_cache": True}, {}):  # without a word, inference uses a cache
        with pytest.raises(ValueError, match="restart beside a cache.*use_cache=False"):
            model(ids, position_ids=positions, **inputs)
    cache = model(documents[0], use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="restart beside a cache"):
        model(documents[1], position_ids=positions[:, :1], **{CACHE: cache})
    model(documents[1], position_ids=positions[:, :1] + 6, **{CACHE: cache})  # the control


@torch.no_grad()
def test_restarted_positions_with_a_flat_mask_are_refused(documents, tiny_engram):
    model, ids, positions = tiny_engram(), torch.cat(documents, dim=1), positions_of(documents)
    with pytest.raises(ValueError, match="restart beside a two-dimensional attention_mask.*attention_mask=None"):
        model(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_left_pads_are_no_restart(use_cache, tiny_engram):
    model, ids, mask = tiny_engram(trained=True), torch.randint(3, 4000, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits[:1, 4:]
    torch.testing.assert_close(padded, model(ids[:1, 4:], use_cache=False).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_segments_are_checked(documents, tiny_engram):
    model, ids, segments = tiny_engram(), torch.cat(documents, dim=1), segments_of(documents)
    with pytest.raises(ValueError, match=r"engram_segment_ids has shape \(1, 17\), the ids have \(1, 18\)"):
        model(ids, engram_segment_ids=segments[:, 1:], use_cache=False)
    with pytest.raises(TypeError, match=r"engram_segment_ids must be a tensor of integers, got torch.float32"):
        model(ids, engram_segment_ids=segments.float(), use_cache=False)
    with pytest.raises(ValueError, match="engram_segment_ids are for rows read at once: pass use_cache=False"):
        model(ids, engram_segment_ids=segments, use_cache=True)


# Reset tokens: the other convention, in the configuration.


def resetting(tiny_engram, **fields) -> EngramForCausalLM:
    return tiny_engram(trained=True, engram_reset_token_ids=[END], **fields)


def test_reset_tokens_are_found_on_a_device_without_a_copy_to_it(tiny_engram, counting_device):
    memory, ids = tiny_engram(engram_reset_token_ids=[END, 7]).memory, torch.tensor([[7, 3, END], [5, -1, 7]])
    there = ids.to("counting")
    with counted() as crossed:
        ends = memory.resets(there)
    assert (crossed.h2d_copies, crossed.d2h_copies) == (0, 0)
    assert torch.equal(ends.cpu(), torch.isin(ids, torch.tensor([END, 7])))


@torch.no_grad()
@given(data=st.data(), kernel=st.integers(0, 4))
def test_after_a_reset_token_the_memory_reads_a_new_document(data, kernel, tiny_engram):
    model = resetting(tiny_engram, engram_kernel_size=kernel)
    ids = torch.randint(3, 4000, (1, data.draw(st.integers(2, 20), label="length")))
    ends = data.draw(st.sets(st.integers(0, ids.shape[1] - 2), max_size=4), label="ends")
    ids[0, sorted(ends)] = END
    cuts = [0, *(end + 1 for end in sorted(ends)), ids.shape[1]]
    texts = [ids[:, first:last] for first, last in zip(cuts, cuts[1:], strict=False)]
    segments = segments_of(texts)
    whole = model(ids, use_cache=False).logits
    assert torch.equal(reads(model, ids, use_cache=False), torch.cat([reads(model, t) for t in texts], dim=2))
    model.memory.reset_token_ids = []
    torch.testing.assert_close(
        model(ids, engram_segment_ids=segments, use_cache=False).logits, whole, rtol=0, atol=TOLERANCE
    )
    model.memory.reset_token_ids = [END]
    sizes, left = [], ids.shape[1]
    while left:
        sizes.append(data.draw(st.integers(1, left), label="chunk"))
        left -= sizes[-1]
    torch.testing.assert_close(in_chunks(model, ids, sizes), whole, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_reset_that_is_cropped_away_is_forgotten(tiny_engram):
    model, ids = resetting(tiny_engram), torch.randint(3, 4000, (1, 12))
    cache = model(ids[:, :8], use_cache=True)[CACHE]
    cache.activate_past_recording()
    model(torch.tensor([[5, END, 6]]), **{CACHE: cache})
    cache.crop(-3)
    rest = model(ids[:, 8:], **{CACHE: cache}).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 8:], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_beams_with_reset_tokens_equal_beams_without_a_cache(tiny_engram):
    model, ids = resetting(tiny_engram), torch.randint(3, 4000, (2, 9))
    ids[0, 7], ids[1, 4] = END, END
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_beams": 4, "pad_token_id": 2}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))


def test_reset_tokens_survive_a_checkpoint_and_are_off_by_default(tiny_engram, tmp_path):
    ids = torch.randint(3, 4000, (1, 9))
    ids[0, 4] = END
    resetting(tiny_engram).save_pretrained(tmp_path)
    loaded, plain = EngramForCausalLM.from_pretrained(tmp_path), tiny_engram(trained=True)
    assert loaded.config.engram_reset_token_ids == [END]
    assert plain.config.engram_reset_token_ids is None
    assert not torch.equal(reads(loaded, ids), reads(plain, ids))
    with pytest.raises(ValueError, match=r"engram_reset_token_ids=\[4104\]: 4104 is outside the vocabulary"):
        tiny_engram(engram_reset_token_ids=[4104])


# Padding-free training.


def test_padding_free_training_has_the_gradients_of_separate_documents(documents, tiny_engram):
    def gradients(batches):
        model = tiny_engram(trained=True).train()
        for batch in batches:
            (model(**batch, use_cache=False, num_items_in_batch=14).loss).backward()
        rows = {name: p.grad for name, p in model.named_parameters() if isinstance(p.grad, RowGradient)}
        dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name not in rows}
        return rows, dense

    features = [{"input_ids": text[0].tolist(), "labels": text[0].tolist()} for text in documents]
    collate = DataCollatorWithFlattening()
    packed_rows, packed_dense = gradients([collate(features)])
    rows, dense = gradients([collate([feature]) for feature in features])
    assert packed_rows.keys() == rows.keys() and packed_dense.keys() == dense.keys()
    for name, gradient in packed_rows.items():
        assert torch.equal(gradient.rows, rows[name].rows)
        torch.testing.assert_close(gradient.row_values, rows[name].row_values, rtol=0, atol=TOLERANCE)
    for name, gradient in packed_dense.items():
        torch.testing.assert_close(gradient, dense[name], rtol=1e-4, atol=TOLERANCE)


def test_trainer_trains_on_flattened_batches(documents, tiny_engram, tmp_path):
    features = [{"input_ids": text[0].tolist(), "labels": text[0].tolist()} for text in documents]
    losses = {}
    for kind in (EngramTrainer, Trainer):
        model = tiny_engram(trained=True)
        args = TrainingArguments(tmp_path / kind.__name__, max_steps=1, report_to=[], per_device_train_batch_size=4)
        model.memory.tables.requires_grad_(kind is EngramTrainer)
        trainer = kind(model, args, train_dataset=features, data_collator=DataCollatorWithFlattening())
        losses[kind] = trainer.train().training_loss
    assert losses[EngramTrainer] == pytest.approx(losses[Trainer], abs=TOLERANCE)
    with torch.no_grad():
        sums = [
            torch.nn.functional.cross_entropy(
                tiny_engram(trained=True)(text).logits[0, :-1], text[0, 1:], reduction="sum"
            )
            for text in documents
            if text.shape[1] > 1
        ]
    assert losses[EngramTrainer] == pytest.approx(float(sum(sums)) / 14, abs=TOLERANCE)


# What collators and engines say about documents, in their own words.


@torch.no_grad()
@pytest.mark.parametrize("told", ["seq_idx", "cu_seq_lens_q", "both", "with positions"])
def test_borders_by_any_name_are_the_memorys_borders(told, documents, tiny_engram):
    model, ids = tiny_engram(trained=True), torch.cat(documents, dim=1)
    lengths = torch.tensor([0, *(text.shape[1] for text in documents)]).cumsum(0).int()
    words = {"seq_idx": segments_of(documents).int(), "cu_seq_lens_q": lengths}
    given = words if told in ("both", "with positions") else {told: words[told]}
    wanted = model(ids, engram_segment_ids=segments_of(documents), use_cache=False).logits  # attention reads on
    if told == "with positions":
        given = {**given, "position_ids": positions_of(documents)}
        wanted = alone(model, documents)
    found = model(ids, **given, cu_seq_lens_k=lengths, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert (model(ids, use_cache=False).logits - found).abs().max() > 0.1, "control: unparted"


@torch.no_grad()
def test_borders_that_differ_are_refused(documents, tiny_engram):
    model, ids = tiny_engram(trained=True), torch.cat(documents, dim=1)
    lengths, whole = torch.tensor([0, 3, ids.shape[1]]).int(), torch.arange(ids.shape[1])[None]
    with pytest.raises(ValueError, match="part the row into other documents"):
        model(ids, seq_idx=segments_of(documents), cu_seq_lens_q=lengths, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_q ends a document where position_ids go on"):
        model(ids, position_ids=whole, cu_seq_lens_q=lengths, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_q parts the row.*use_cache=False"):
        model(ids, cu_seq_lens_q=lengths, use_cache=True)
    model(ids, cu_seq_lens_q=lengths[::2], use_cache=True)  # the control: one document


@torch.no_grad()
@pytest.mark.parametrize("positions", [[[5, 17, 9]], [[4]], [[0, 1, 2, 7, 8]], [[3, 4, 5]]])
def test_a_document_without_its_beginning_is_refused(positions, tiny_engram):
    """An engine's pass: the next tokens of many requests in one row, with a cache that the model does not see."""
    model, positions = tiny_engram(trained=True), torch.tensor(positions)
    ids = torch.arange(positions.shape[1])[None] * 9 + 5
    for mask in (None, torch.ones_like(ids))[: 2 if positions[0, 0] else 1]:
        with pytest.raises(ValueError, match="tokens before it are neither in the row nor in a cache"):
            model(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    model(ids, position_ids=positions, engram_segment_ids=torch.zeros_like(ids), use_cache=False)
    model.backbone(ids, position_ids=positions, use_cache=False)  # the control: it is for the memory alone


@torch.no_grad()
def test_serving_engines_are_refused(tiny_engram):
    model = tiny_engram()
    assert not model.is_backend_compatible() and model.backbone.is_backend_compatible()
    before = model.backbone.config._attn_implementation
    for attention in ("vllm", "sglang", "paged|sdpa"):
        model.backbone.config._attn_implementation = attention
        with pytest.raises(NotImplementedError, match="belongs to a serving engine"):
            model(torch.tensor([[5, 6]]))
    model.backbone.config._attn_implementation = before
    model(torch.tensor([[5, 6]]))
