"""The checker of generation catches every break that a wrong implementation of a memory's history makes.

Each break is planted in a model, trained or freshly grafted (where random rows stand in for its zeros); the ways that
it spoils must be wrong, and the unbroken model is exact in the same ways.
Run: pytest tests/integration/test_checker.py
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import CodeGenConfig
from transformers.cache_utils import LinearAttentionLayer

from engram_transformers import pretrained_engram
from engram_transformers.cache_engram import EngramCacheLayer
from engram_transformers.cache_paged_engram import PagedTexts
from engram_transformers.inspection import check_generation, generation
from engram_transformers.inspection.modes import PERTURBATIONS, Mode, Subject
from engram_transformers.memory_engram import EngramMemory


def history_on_a_module(patch):
    """One history for a model, begun anew whenever a cache is empty, as a module's attribute would be."""

    def cache_layer(self, cache, backbone_layers):
        if cache is None:
            return None
        if cache.get_seq_length() == 0 or not hasattr(self, "kept"):
            self.kept = EngramCacheLayer(self.convolutions, self.hashing.context_length)
        return self.kept

    patch.setattr(EngramMemory, "cache_layer", cache_layer)


def convolution_state_dropped(patch):
    patch.setattr(EngramCacheLayer, "extend_convolution", lambda self, inputs, state_idx, receptive_field: inputs)


def classes_forgotten(patch):
    patch.setattr(EngramCacheLayer, "recent_classes", lambda self, classes: None)


def pads_not_masked(patch):
    patch.setattr(pretrained_engram, "alive_positions", lambda *given: None)


def beams_not_reordered(patch):
    patch.setattr(EngramCacheLayer, "reorder_cache", lambda self, beam_idx: None)


def batch_not_selected(patch):
    patch.setattr(EngramCacheLayer, "batch_select_indices", lambda self, indices: None)


def batch_repeated_in_the_wrong_order(patch):
    def repeat(self, repeats):
        for index, state in self.conv_states.items():
            self.conv_states[index] = state.flip(-1).repeat_interleave(repeats, dim=0)

    patch.setattr(EngramCacheLayer, "batch_repeat_interleave", repeat)


def crop_not_followed(patch):
    def crop(self, tokens_to_remove):
        LinearAttentionLayer.crop(self, 0)
        self.seen -= abs(tokens_to_remove)

    patch.setattr(EngramCacheLayer, "crop", crop)


def documents_run_together(patch):
    patch.setattr(pretrained_engram, "document_ends", lambda *given: None)


def ids_of_embeddings_one_late(patch):
    original = pretrained_engram.checked_text_ids

    def late(input_ids, inputs_embeds, engram_input_ids):
        ids = original(input_ids, inputs_embeds, engram_input_ids)
        return ids if inputs_embeds is None else ids.roll(1, dims=1)

    patch.setattr(pretrained_engram, "checked_text_ids", late)


def requests_forgotten(patch):
    patch.setattr(PagedTexts, "remember_classes", lambda self, classes: None)


CACHED = {"greedy", "beams", "chunks", "interleaved requests", "assisted by itself", "prompt lookup", "static cache"}
BREAKS = {
    history_on_a_module: {"interleaved requests", "beams", "cache.reorder_cache", "cache.batch_select_indices"},
    convolution_state_dropped: CACHED,
    classes_forgotten: CACHED,
    pads_not_masked: {"left padding", "left padding, beams", "static cache, left padding"},
    beams_not_reordered: {"beams", "beam sampling", "left padding, beams", "cache.reorder_cache"},
    batch_not_selected: {"cache.batch_select_indices"},
    batch_repeated_in_the_wrong_order: {"cache.batch_repeat_interleave"},
    crop_not_followed: {"cache.crop", "prompt lookup", "assisted by another"},
    documents_run_together: {"packed documents"},
    ids_of_embeddings_one_late: {"inputs_embeds"},
    requests_forgotten: {"continuous batching"},
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "freshly grafted"])
@pytest.mark.parametrize("break_model", BREAKS, ids=lambda plant: plant.__name__)
def test_a_planted_break_is_caught(break_model, trained, tiny_engram, monkeypatch):
    model, ways = tiny_engram(trained=trained), BREAKS[break_model]
    before = check_generation(model, modes=ways)
    assert before.ok and before.stood_in == (not trained), str(before)  # the control
    break_model(monkeypatch)
    report = check_generation(model, modes=ways)
    assert {result.mode for result in report.wrong} == ways, str(report)
    assert not report.ok


def test_a_model_is_left_as_it_was(tiny_engram):
    model = tiny_engram().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.generation_config.to_dict(), model.backbone.generation_config.to_dict()
    assert check_generation(model, modes=["greedy", "assisted by itself", "assisted by another"]).stood_in
    assert model.training
    assert (model.generation_config.to_dict(), model.backbone.generation_config.to_dict()) == settings
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(table._forward_hooks for table in model.memory.tables.values())


def test_prompts_come_from_the_tokenizer(tiny_engram, tiny_tokenizer):
    prompts = generation.make_prompts(tiny_engram(), tiny_tokenizer)
    assert [tiny_tokenizer.decode(prompt) for prompt in prompts] == list(generation.PROMPTS)
    assert check_generation(tiny_engram(trained=True), tiny_tokenizer, modes=["greedy", "left padding"]).ok


def test_mistakes_are_named(tiny_engram, tiny_donor):
    with pytest.raises(TypeError, match="takes an EngramForCausalLM, got LlamaForCausalLM"):
        check_generation(tiny_donor())
    with pytest.raises(ValueError, match=r"unknown modes \['greedly'\]; there are \['greedy', "):
        check_generation(tiny_engram(), modes=["greedly"])


def test_the_report_prints_as_a_table(tiny_engram):
    report = check_generation(tiny_engram(trained=True), modes=["greedy", "right padding", "nn.DataParallel"])
    text = str(report)
    assert all(word in text for word in ("greedy", "largest logit difference", "tokens equal", "RuntimeError"))
    assert report.summary() == "2 exact, 1 refused"


@torch.no_grad()
@pytest.mark.parametrize(("gap", "status"), [(0.5, "backbone's"), (0.7, "wrong")])
def test_other_tokens_need_a_gap_that_the_difference_of_the_logits_closes(gap, status, monkeypatch):
    found = {
        "ours": generation.Comparison(0.3, None, False, gap),
        "plain backbone": generation.Comparison(0.4, None, True, 0.0),  # the same tokens, by chance
    }
    monkeypatch.setattr(generation, "compare", lambda mode, subject: found[subject])
    assert generation._run_mode(Mode("any", run=None), "ours", "plain backbone").status == status


def test_batches_are_padded_where_the_backbone_knows_no_pad():
    config = SimpleNamespace(text_config=CodeGenConfig(), engram_pad_token_id=7)
    assert not hasattr(config.text_config, "pad_token_id"), "control"
    assert generation.pad_id(SimpleNamespace(config=config)) == 7


def test_rounding_is_measured_by_many_changes_and_once_for_each_text(tiny_donor, monkeypatch):
    donor, passes = tiny_donor(), []
    forward = donor.forward
    monkeypatch.setattr(donor, "forward", lambda *given, **more: passes.append(1) or forward(*given, **more))
    subject = Subject(donor, [], 1, pad_token_id=2, has_memory=False, assistant=donor)
    text, other = torch.arange(5, 25), torch.arange(6, 26)
    measured = subject.rounding(text)
    assert 0 < measured < 1e-2  # of logits of size 1
    assert len(passes) == 1 + PERTURBATIONS
    assert subject.rounding(text.clone()) == measured and len(passes) == 1 + PERTURBATIONS
    assert subject.rounding(other) != measured and len(passes) == 2 * (1 + PERTURBATIONS)
    assert PERTURBATIONS >= 16  # with 4, another seed measured 3 times as much
