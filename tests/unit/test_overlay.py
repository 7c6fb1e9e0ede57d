"""Changed rows over a table in a file: how they are found, what room they take, and who holds them. That they are read
as they were written is in tests/unit/test_row_stores.py.

Run: pytest tests/unit/test_overlay.py
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.files_safetensors_engram import read_header, write_shard
from engram_transformers.rows_overlay_engram import RowIndex, RowOverlay
from engram_transformers.rows_storage_engram import FileRows, ShardFile, file_part
from engram_transformers.rows_table_engram import OrderRows


WIDTH = 3


def stored(folder, heights: list[int], dtype=torch.float32) -> tuple[RowOverlay, torch.Tensor]:
    """An overlay on a file, and the table that it holds, `(rows, WIDTH)`."""
    path = folder / f"table-{len(list(folder.iterdir()))}.safetensors"
    whole = torch.randn(sum(heights), WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    names = {str(number): part for number, part in enumerate(whole.split(heights))}
    write_shard(path, names)
    file = ShardFile(path)
    return RowOverlay(FileRows([file_part(file, read_header(path), name) for name in names])), whole


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
