"""Processes of one machine share one copy of a table that is in host memory, until they train it.

Read from the kernel's own account of this process' pages (`/proc/self/smaps`, Linux).
Run: pytest tests/integration/test_processes_shared_pages.py
"""

import gc
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_transformers import EngramForCausalLM
from engram_transformers.files_atomic_engram import MEMORY_STEM
from engram_transformers.rows_placement_engram import named_orders
from engram_transformers.training import create_optimizer, sync_row_gradients
from engram_transformers.training.distributed import table_parts

from ..tiny import GOLDEN, fill_memory
from .process_models import loss_of, own_texts, small_config, texts


PAGE = 4096

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no account of pages on this system")


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """A folder with tables of 26 MB."""
    folder = tmp_path_factory.mktemp("graft")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    sizes = {"engram_vocab_size": 50_000, "engram_n_heads": 2, "engram_head_dim": 16}
    donor = AutoModelForCausalLM.from_config(small_config())
    model = EngramForCausalLM.from_backbone(donor, tokenizer, [0, 1], **sizes)
    fill_memory(model).save_pretrained(folder)
    return str(folder)


def mapped_pages(field: str) -> int:
    """Bytes of one kind in this process' mappings of memory shards."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(None, 1)[0]
        if "-" in head and not head.endswith(":"):
            inside = MEMORY_STEM in line
        elif inside and head == f"{field}:":
            total += int(line.split()[1]) * 1024
    return total


def pages_after_reading(graft: str, placement: str, copied: bool) -> tuple[int, int, int]:
    """Bytes of the tables, and of this process' pages of them: all, and its share of those that several have."""
    gc.collect()  # what an earlier test mapped
    model = EngramForCausalLM.from_pretrained(graft, engram_placement=placement)
    parts = [rows for _, order in named_orders(model.memory.tables) for rows in order.tensors()]
    if copied:
        for part in parts:
            part.detach()[:] += 0  # writes every page
    assert sum(float(part.detach().sum()) for part in parts) != 0  # reads every page
    dist.barrier()
    found = mapped_pages("Rss"), mapped_pages("Pss")
    dist.barrier()
    return sum(part.nbytes for part in parts), *found


@pytest.mark.parametrize("placement", ["cpu", "device"])
def test_two_processes_hold_a_table_once(pair, graft, placement):
    for nbytes, all_pages, share in pair.run(pages_after_reading, graft, placement, False):
        assert nbytes > 25_000_000
        assert all_pages >= nbytes, "every page was read"
        assert share == pytest.approx(all_pages / 2, rel=0.05)


def test_control_of_pages_that_are_written_each_has_its_own(pair, graft):
    for nbytes, _, share in pair.run(pages_after_reading, graft, "cpu", True):
        assert share >= nbytes


def pages_after_a_step(graft: str, placement: str) -> tuple[int, int, int, int]:
    """Rows that a step touched; private bytes of the mapping after it; bytes of rows that are kept beside it."""
    gc.collect()  # what an earlier test mapped
    model = EngramForCausalLM.from_pretrained(graft, engram_placement=placement).set_trainable("tables").train()
    optimizer = create_optimizer(model)
    loss_of(model, own_texts(0, dist.get_rank(), 2)).backward()
    sync_row_gradients(model)
    touched = sum(len(part.grad.rows) for part in table_parts(model))
    optimizer.step()
    kept = sum(part.store.values.nbytes for part in table_parts(model) if hasattr(part.store, "values"))
    tables = sum(table.nbytes for table in model.memory.tables.values())
    return touched, mapped_pages("Private_Dirty"), kept, tables


def test_training_makes_private_the_pages_that_it_touches(pair, graft):
    for touched, private, kept, nbytes in pair.run(pages_after_a_step, graft, "cpu"):
        assert 0 < touched < 2 * 4 * texts().numel() * 2
        assert 0 < private <= (touched + 8) * PAGE  # a row of 64 bytes lies in one page or, at a border, in two
        assert private < nbytes / 4
        assert kept == 0


def test_training_on_disk_keeps_the_rows_that_it_touches_and_no_page(pair, graft):
    for touched, private, kept, _ in pair.run(pages_after_a_step, graft, "disk"):
        assert private == 0
        assert kept == touched * 16 * 4
