"""The real model: SmolLM2-135M grafted, taught and read with and without a cache.

Needs the donor's folder: `make test` fetches it and sets ENGRAM_DONOR. Run: ENGRAM_DONOR=runs/donor pytest tests/real
"""

import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM
from engram_transformers.compat_engram import CACHE
from engram_transformers.conversion import graft, plan_graft
from engram_transformers.inspection import check_generation, verify_checkpoint
from engram_transformers.training import create_optimizer


DONOR = Path(os.environ.get("ENGRAM_DONOR", "runs/donor"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (DONOR / "model.safetensors").is_file(), reason=f"no donor in {DONOR}: run `make donor`"),
]

TEXT = (
    "Aegospotami: a creek emptying into the Hellespont in Turkey; at its mouth in 405 BC the Spartan fleet under "
    "Lysander destroyed the Athenian fleet in the final battle of the Peloponnesian War. "
)
CHUNKS = [1, 2, 3, 7]
FIELDS = {"engram_vocab_size": 20_000, "engram_head_dim": 16, "engram_kernel_size": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DONOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return graft(DONOR, tmp_path_factory.mktemp("real") / "graft", [1, 10], **FIELDS)


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A memory that has read one sentence ten times, with a convolution that has moved off zero."""
    torch.manual_seed(0)
    model = EngramForCausalLM.from_backbone(str(DONOR), engram_layer_ids=[1, 10], **FIELDS)
    model.backbone.requires_grad_(False)
    optimizer = create_optimizer(model, lr=2e-3, table_lr_multiplier=25)
    batch = tokenizer(TEXT, return_tensors="pt")
    for _ in range(10):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(float(layer.conv.abs().max()) > 1e-3 for layer in model.memory.layers.values())
    return model.eval()


@torch.no_grad()
def test_fresh_graft_gives_the_donors_logits_bit_for_bit(folder, tokenizer):
    batch = tokenizer([TEXT, TEXT[:60]], return_tensors="pt", padding=True)
    donor = AutoModelForCausalLM.from_pretrained(DONOR)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(**batch).logits, donor(**batch).logits)


def test_fresh_graft_verifies(folder):
    findings = verify_checkpoint(folder, generation=False)
    assert [finding.section for finding in findings] == ["files", "constants", "tokenizer"]
    assert all(finding.ok for finding in findings), findings


@pytest.mark.slow
def test_the_checker_finds_the_model_exact_up_to_rounding(taught, tokenizer):
    ways = ["left padding", "static cache", "prompt lookup", "cache.crop"]  # all of them take minutes
    report = check_generation(taught, tokenizer, modes=ways)
    assert report.ok, str(report)
    assert report.stood_in, "control: no row of the one sentence that was taught is in the checker's prompts"
    assert {result.status for result in report.results} <= {"exact", "rounding"}, str(report)
    assert max(result.difference for result in report.results) < 1e-3  # logits reach 30


@torch.no_grad()
def test_the_memory_learns_a_sentence_and_switching_it_off_forgets_it(taught, tokenizer):
    batch = tokenizer(TEXT, return_tensors="pt")
    donor = AutoModelForCausalLM.from_pretrained(DONOR)
    plain = float(donor(**batch, labels=batch["input_ids"]).loss)
    assert float(taught(**batch, labels=batch["input_ids"]).loss) < plain - 1.0
    with taught.disable_memory():
        assert float(taught(**batch, labels=batch["input_ids"]).loss) == plain


def chunk_differences(model, ids, chunk: int) -> torch.Tensor:
    """By how much logits of a text that is read in chunks differ from those of the text read at once."""
    cache, logits = None, []
    for piece in ids.split(chunk, dim=1):
        out = model(piece, **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        logits.append(out.logits)
    return (torch.cat(logits, dim=1) - model(ids).logits).abs()


@pytest.fixture(scope="module")
def backbones_own(taught, tokenizer) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Ids of 28 tokens, and how the plain donor differs from itself in chunks."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :28]
    with torch.no_grad(), taught.disable_memory():
        return ids, {chunk: chunk_differences(taught, ids, chunk) for chunk in CHUNKS}


@torch.no_grad()
@pytest.mark.parametrize("chunk", CHUNKS)
def test_reading_in_chunks_equals_reading_at_once_to_the_backbones_own_difference(taught, backbones_own, chunk):
    """Logits reach 30, where float32 itself is worth 2e-6: the plain donor differs by 5e-5 to 1e-4 at most, 1e-5 in
    the mean. The mean is held against the donor's in the same chunks, the largest of 1.4 million numbers, which is a
    matter of luck (half to twice the donor's), against the donor's in any."""
    ids, own = backbones_own
    found = chunk_differences(taught, ids, chunk)
    assert float(found.mean()) <= 2 * float(own[chunk].mean())
    assert float(found.max()) <= 2 * max(float(control.max()) for control in own.values())


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 4])
def test_generating_with_a_cache_equals_generating_without(taught, tokenizer, beams):
    tokenizer.padding_side = "left"
    batch = tokenizer(["Aegospotami:", "The Spartan fleet under"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    cached = taught.generate(**batch, **settings)
    assert torch.equal(cached, taught.generate(**batch, use_cache=False, **settings))
    if beams == 1:
        assert "Hellespont" in tokenizer.decode(cached[0])


def test_the_plan_in_the_documentation_is_what_the_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "grafting.md").read_text(encoding="utf-8")
    printed = re.search(r"```\n(donor  .*?)\n```", page, re.DOTALL)[1].splitlines()
    planned = plan_graft(DONOR, [1, 10], engram_vocab_size=200_000, engram_head_dim=48)
    assert planned.lines()[1:10] == printed[1:10]  # the first line has the folder; the warnings depend on the machine
    assert "the tables are larger than the donor" in planned.lines()[10]
