"""Changed rows over a table in a file: read back as they were written, the others as the file has them, the file as it
was; copies and pickles go their own ways. Integers and bytes, so everything is exact.

Run: pytest tests/unit/test_overlay.py
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.files_safetensors_engram import read_header, write_shard
from engram_transformers.rows_index_engram import RowIndex
from engram_transformers.rows_overlay_engram import RowOverlay
from engram_transformers.rows_storage_engram import FileRows, ShardFile, file_part
from engram_transformers.rows_table_engram import OrderRows, TablePart


WIDTH = 3


def stored(folder, heights: list[int], dtype=torch.float32) -> tuple[RowOverlay, torch.Tensor]:
    """An overlay on a file, and the table that it holds, `(rows, WIDTH)`."""
    path = folder / f"table-{len(list(folder.iterdir()))}.safetensors"
    whole = torch.randn(sum(heights), WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    names = {str(number): part for number, part in enumerate(whole.split(heights))}
    write_shard(path, names)
    file = ShardFile(path)
    return RowOverlay(FileRows([file_part(file, read_header(path), name) for name in names])), whole


@st.composite
def histories(draw):
    """Heights of parts, and what happens to rows: writes and reads in turn."""
    height = draw(st.integers(1, 12))
    heights = [height] * draw(st.integers(0, 2)) + [height + draw(st.integers(0, 5))]
    rows = st.lists(st.integers(0, sum(heights) - 1), max_size=30)
    return heights, draw(st.lists(st.tuples(rows, rows), max_size=6))


@given(history=histories(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_are_read_as_they_were_last_written(history, dtype, tmp_path):
    heights, steps = history
    overlay, whole = stored(tmp_path, heights, dtype)
    expected, first = whole.clone(), [sum(heights[:number]) for number in range(len(heights))]
    for number, (written, read) in enumerate(steps):
        for part, begin, height in zip(overlay.changes, first, heights, strict=True):
            own = sorted({row - begin for row in written if begin <= row < begin + height})
            values = torch.full((len(own), WIDTH), number + 0.5) + torch.arange(len(own))[:, None]
            part.write(torch.tensor(own, dtype=torch.int64), values)
            expected[torch.tensor(own, dtype=torch.int64) + begin] = values.to(dtype)
            assert torch.equal(part.read(torch.arange(height)), expected[begin : begin + height])
        asked = torch.tensor(read, dtype=torch.int64)
        assert torch.equal(overlay.read(asked), expected[asked])
        unique = asked.unique()
        overlay.see(unique, expected[unique])  # as a pass does; what is written afterwards counts
        resident = overlay.read_resident(asked)
        assert resident is None or torch.equal(resident, expected[asked])
        at_once = overlay.stored.read_resident(asked) is not None
        assert (resident is not None) == at_once, "what was changed needs no disk, and the rest is where it was"
    assert torch.equal(torch.cat(overlay.tensors()), expected)
    assert overlay.changed == len({row for written, _ in steps for row in written})
    control = RowOverlay(overlay.stored)
    assert torch.equal(torch.cat(control.tensors()), whole), "the file is as it was"


def test_what_a_pass_has_read_is_forgotten_with_the_changes(tmp_path):
    overlay, whole = stored(tmp_path, [4, 5])
    rows = torch.arange(2, 7)
    overlay.part(0).write(torch.tensor([3]), torch.ones(1, WIDTH))
    overlay.see(rows, overlay.read(rows))
    for changes in overlay.changes:
        changes.clear()
    assert torch.equal(overlay.part(0).read(torch.tensor([2, 3])), whole[[2, 3]])


@given(visits=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=8))
def test_places_are_those_of_first_sight(visits):
    index, places = RowIndex(), {}
    for visit in visits:
        rows = sorted(set(visit))
        for row in rows:
            places.setdefault(row, len(places))
        assert index.slots(torch.tensor(rows, dtype=torch.int64)).tolist() == [places[row] for row in rows]
        found, known = index.find(torch.arange(41))
        assert [int(place) for place, is_known in zip(found, known, strict=True) if is_known] == [
            places[row] for row in range(41) if row in places
        ]
        assert known.tolist() == [row in places for row in range(41)]
    assert index.rows.tolist() == sorted(places)


def test_the_first_write_takes_no_more_memory_than_its_rows(tmp_path):
    overlay, _ = stored(tmp_path, [100])
    rows = torch.arange(0, 60, 2)
    overlay.part(0).expect(rows)
    assert overlay.changed == 0
    for piece in rows.split(7):
        overlay.part(0).write(piece, torch.ones(len(piece), WIDTH))
    assert overlay.changes[0].values.shape == (30, WIDTH)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda overlay: pickle.loads(pickle.dumps(overlay))])
def test_a_copy_has_the_changes_and_goes_its_own_way(copied, tmp_path):
    overlay, whole = stored(tmp_path, [4, 5])
    overlay.part(1).write(torch.tensor([2]), torch.full((1, WIDTH), 7.0))
    twin = copied(overlay)
    assert torch.equal(torch.cat(twin.tensors()), torch.cat(overlay.tensors()))
    twin.part(1).write(torch.tensor([2, 3]), torch.zeros(2, WIDTH))
    assert torch.equal(overlay.read(torch.tensor([6, 7])), torch.stack([torch.full((WIDTH,), 7.0), whole[7]]))
    assert torch.equal(twin.read(torch.tensor([6, 7])), torch.zeros(2, WIDTH))
    assert twin.part(1) is not overlay.part(1)


def test_an_order_reads_on_from_other_files_and_its_parts_stay_what_an_optimizer_holds(tmp_path):
    overlay, whole = stored(tmp_path, [4])
    other, _ = stored(tmp_path, [4])
    order = OrderRows([4], WIDTH, whole.dtype, hold=False)
    order.place(overlay)
    (part,) = order.parts
    part.write(torch.tensor([1]), torch.zeros(1, WIDTH))
    assert overlay.changed == 1 and part.shape == (0, WIDTH) and part.table_shape == (4, WIDTH)
    order.store = other
    order.mend_parts()
    assert order.parts[0] is part and other.changed == 0
    assert torch.equal(part.read(torch.arange(4)), whole)
    part.write(torch.tensor([1]), torch.zeros(1, WIDTH))
    assert not other.read(torch.tensor([1])).any()


def test_a_part_says_its_shape_and_refuses_rows_that_it_has_not(tmp_path):
    overlay, _ = stored(tmp_path, [4, 6])
    assert [part.shape for part in overlay.changes] == [(4, WIDTH), (6, WIDTH)]
    assert TablePart(torch.zeros(5, 2)).table_shape == (5, 2)
    with pytest.raises(IndexError, match="row 4 is outside the 4 rows"):
        overlay.part(0).write(torch.tensor([4]), torch.zeros(1, WIDTH))
    assert overlay.changed == 0


def test_a_resident_part_is_written_in_place():
    part = TablePart(torch.zeros(5, 2, dtype=torch.bfloat16))
    part.write(torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert part.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4], [0, 0]]
    kept = part.read(torch.tensor([3]))
    part.write(torch.tensor([3]), torch.zeros(1, 2))
    assert kept.tolist() == [[3, 4]], "what was read is a copy"
