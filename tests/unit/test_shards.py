"""Memory shards: what is written is read back bit for bit, zeros take no disk, and damage is named.

Run with `pytest tests/unit/test_shards.py`.
"""

import json
import math
import os
import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from engram_transformers import EngramFormatError
from engram_transformers.files_atomic_engram import INDEX_NAME, SINGLE_NAME
from engram_transformers.files_safetensors_engram import (
    DTYPE_NAMES,
    MAX_MEMORY_SHARD_SIZE,
    ZERO_BLOCK,
    ZeroTensor,
    check_folder,
    group_tensors,
    parse_size,
    read_header,
    read_index,
    shard_name,
    tensor_bytes,
    write_index,
    write_shard,
    write_shards,
)


# Shapes: a scalar, nothing at all, and more.
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
NAMES = st.text('abc.é"\\ ', min_size=1, max_size=8)


@st.composite
def tensors(draw):
    """Named tensors of every type that a shard may hold, of random bits (NaN and -0.0 among them) or all zeros."""
    made = {}
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPE_NAMES))), draw(SHAPES)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        top = 2 if dtype == torch.bool else 256  # a bool's byte is 0 or 1
        data = torch.randint(0, top, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        filled = data.view(dtype).view(shape)
        made[name] = draw(st.sampled_from([filled, torch.zeros_like(filled), ZeroTensor(shape, dtype)]))
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def fresh(folder, name="new"):
    """An empty folder that no earlier example has used."""
    made = folder / f"{name}-{len(list(folder.iterdir()))}"
    made.mkdir()
    return made


def read_back(folder, weight_map: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for file_name in sorted(set(weight_map.values())):
        with safe_open(folder / file_name, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.offset_keys()}
    return found


def header_end(path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


@given(made=tensors(), max_bytes=st.sampled_from([10**4, 10**6]))
def test_what_is_written_is_read_back_bit_for_bit(made, max_bytes, tmp_path):
    folder = fresh(tmp_path)
    weight_map = write_shards(folder, "engram-memory", made, max_bytes)
    assert set(weight_map) == set(made)
    found = read_back(folder, weight_map)
    assert set(found) == set(made)
    for name, tensor in made.items():
        assert (found[name].dtype, tuple(found[name].shape)) == (tensor.dtype, tuple(tensor.shape))
        assert bits(found[name]) == (bytes(tensor_bytes(tensor)) if isinstance(tensor, ZeroTensor) else bits(tensor))
        entry = read_header(folder / weight_map[name])[name]
        assert (entry.dtype, entry.shape) == (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert entry.end - entry.begin == tensor_bytes(tensor)
        assert (header_end(folder / weight_map[name]) + entry.begin) % tensor.dtype.itemsize == 0  # can be mapped


def test_tensors_that_are_views_or_need_gradients_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    made = {"turned": base.t(), "sliced": base[:, 1:3], "grad": base.clone().requires_grad_()}
    found = read_back(tmp_path, write_shards(tmp_path, "engram-memory", made, 10**6))
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


@pytest.mark.parametrize("place", [0, ZERO_BLOCK - 1, ZERO_BLOCK, 2 * ZERO_BLOCK, 3 * ZERO_BLOCK + 4])
def test_a_single_byte_among_zeros_is_kept(place, tmp_path):
    tensor = torch.zeros(3 * ZERO_BLOCK + 5, dtype=torch.uint8)
    tensor[place] = 7
    write_shard(tmp_path / "a.safetensors", {"behind": torch.tensor([1.5]), "zeros": tensor})
    found = read_back(tmp_path, {"zeros": "a.safetensors"})
    assert torch.equal(found["zeros"], tensor)
    assert found["behind"].tolist() == [1.5]


def blocks(path) -> int:
    """Bytes that a file takes on disk."""
    return os.stat(path).st_blocks * 512


@pytest.fixture
def sparse_folder(tmp_path):
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(50_000_000)
    if blocks(tmp_path / "hole") > 1_000_000:
        pytest.skip("the file system of the temporary folder has no sparse files")
    return tmp_path


def test_zeros_take_no_disk(sparse_folder):
    """100 MB of zeros, as a `ZeroTensor` and as 8 MB of ordinary ones, beside a control that is not zeros."""
    rows = ZeroTensor((25_000_000,), torch.float32)
    write_shard(sparse_folder / "holes.safetensors", {"rows": rows, "zeros": torch.zeros(2_000_000)})
    write_shard(sparse_folder / "control.safetensors", {"ones": torch.ones(2_000_000)})
    assert (sparse_folder / "holes.safetensors").stat().st_size > 108_000_000
    assert blocks(sparse_folder / "holes.safetensors") < 100_000
    assert blocks(sparse_folder / "control.safetensors") >= 8_000_000
    found = read_back(sparse_folder, {"rows": "holes.safetensors"})["rows"]
    assert found.shape == (25_000_000,)
    assert not found[::1000].any()


def test_a_file_is_never_overwritten(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    assert (tmp_path / "a.safetensors").read_bytes() == before


# Sizes and groups.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (5_000_000, 5_000_000),
        ("8GB", 8_000_000_000),
        (" 5 kb ", 5000),
        ("1.5MB", 1_500_000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        (MAX_MEMORY_SHARD_SIZE, 8_000_000_000),
    ],
)
def test_sizes_are_decimal(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size", [0, -5, True, "0GB", "8", "8 GiB", "GB", "-1GB", "1e3B", "", None, 5.0, "1.2.3GB", "0.5B"]
)
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match=r"must be a positive number of bytes or a text such as '8GB'"):
        parse_size(size)


@given(sizes=st.lists(st.integers(0, 30), max_size=20), max_bytes=st.integers(1, 60))
def test_groups_keep_the_order_and_the_limit_and_are_no_more_than_needed(sizes, max_bytes):
    made = {str(i): ZeroTensor((size,), torch.uint8) for i, size in enumerate(sizes)}
    if sizes and max(sizes) > max_bytes:
        with pytest.raises(ValueError, match=f"more than max_memory_shard_size={max_bytes:,}: .*engram_table_parts"):
            group_tensors(made, max_bytes)
        return
    groups = group_tensors(made, max_bytes)
    assert [name for group in groups for name in group] == list(made)
    totals = [sum(sizes[int(name)] for name in group) for group in groups]
    assert max(totals) <= max_bytes
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + sizes[int(following[0])] > max_bytes  # the next tensor would not have fitted


@given(made=tensors(), max_bytes=st.integers(6000, 9000))
def test_files_are_numbered_and_hold_no_more_than_the_limit(made, max_bytes, tmp_path):
    folder = fresh(tmp_path)
    weight_map = write_shards(folder, "engram-memory", made, max_bytes)
    files = sorted(path.name for path in folder.iterdir())
    assert files == [shard_name("engram-memory", i, len(files)) for i in range(1, len(files) + 1)]
    assert set(weight_map.values()) == (set(files) if made else set())
    for path in folder.iterdir():
        assert sum(entry.end - entry.begin for entry in read_header(path).values()) <= max_bytes


def test_names_are_those_of_transformers():
    assert shard_name("engram-memory", 2, 13) == "engram-memory-00002-of-00013.safetensors"


# Damage to a file.


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "engram-memory-00001-of-00001.safetensors"
    write_shard(path, {"rows": torch.arange(10.0), "map": torch.arange(5)})
    return path


def test_an_undamaged_file_is_read(shard):
    assert set(read_header(shard)) == {"rows", "map"}


@pytest.mark.parametrize("place", ["empty", "length", "before header", "in header", "after header", "in data", "last"])
def test_a_truncated_file_is_refused_by_name(place, shard):
    end, size = header_end(shard), shard.stat().st_size
    cut = {"empty": 0, "length": 4, "before header": 8, "in header": end - 9, "after header": end, "in data": end + 17}
    with open(shard, "r+b") as file:
        file.truncate(cut.get(place, size - 1))
    with pytest.raises(EngramFormatError) as refusal:
        read_header(shard)
    assert shard.name in str(refusal.value)
    assert "truncated" in str(refusal.value)
    assert re.search("Copy or download it again", str(refusal.value))


@pytest.mark.parametrize("more", [1, 8, 4096])
def test_a_file_that_is_too_long_is_refused_by_name(more, shard):
    expected = shard.stat().st_size
    with open(shard, "ab") as file:
        file.write(bytes(more))
    with pytest.raises(EngramFormatError, match=f"{shard.name}.*{expected + more:,} bytes.*says {expected:,}.*damaged"):
        read_header(shard)


@given(content=st.binary(max_size=60), length=st.none() | st.integers(0, 2**64 - 1))
def test_bytes_that_are_no_safetensors_file_are_refused(content, length, tmp_path):
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content if length is None else struct.pack("<Q", length) + content)
    with pytest.raises(EngramFormatError, match=r"garbage\.safetensors"):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(0, 9) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries({}, optional={"dtype": JSON, "shape": JSON, "data_offsets": JSON | st.lists(JSON)})


@given(header=JSON | st.dictionaries(st.sampled_from(["a", "b"]), JSON | ENTRIES, max_size=2))
def test_headers_that_are_no_header_raise_nothing_but_a_format_error(header, tmp_path):
    path, encoded = tmp_path / "header.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(3))
    with pytest.raises(EngramFormatError, match=r"header\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, null]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, [4]]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [false, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [5, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        "[" * 100_000,
    ],
    ids=["text", "null", "lists", "floats", "booleans", "negative", "backwards", "one alone", "endless lists"],
)
def test_headers_with_impossible_offsets_are_format_errors(header, tmp_path):
    path = tmp_path / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(EngramFormatError, match=r"header\.safetensors"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'gone\.safetensors' is missing.*incomplete.*again"):
        read_header(tmp_path / "gone.safetensors")


# Damage to an index, and the check of a whole folder.


def indexed(folder, content) -> None:
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    (folder / INDEX_NAME).write_text(text)


def test_an_index_is_read(tmp_path):
    write_index(tmp_path, {"b": "x-1.safetensors", "a": "x_2.safetensors"}, 99)
    assert read_index(tmp_path) == {"a": "x_2.safetensors", "b": "x-1.safetensors"}
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"] == {"total_size": 99}


@pytest.mark.parametrize(
    "file_name",
    [
        "../other/model.safetensors",
        "..",
        "/etc/passwd",
        "folder/model.safetensors",
        "folder\\model.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "model.pt",
        "model.safetensors.pkl",
        "model.safetensors\n",
        "",
        "mödel.safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_plain_safetensors_files_only(file_name, tmp_path):
    indexed(tmp_path, {"a": "fine.safetensors", "b": file_name})
    with pytest.raises(EngramFormatError, match=r"maps 'b' to .*only plain \.safetensors file names"):
        read_index(tmp_path)
    indexed(tmp_path, {"a": "fine.safetensors"})
    assert read_index(tmp_path) == {"a": "fine.safetensors"}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": "a"}', "\udcff"])
def test_what_is_no_index_is_refused(text, tmp_path):
    (tmp_path / INDEX_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EngramFormatError, match=r"is not a checkpoint index .*restore it"):
        read_index(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {re.escape(INDEX_NAME)}.*interrupted.*engram graft"):
        read_index(tmp_path)


def test_a_single_file_that_would_be_read_in_the_indexs_place_is_refused(tmp_path):
    indexed(tmp_path, {"a": "fine.safetensors"})
    (tmp_path / SINGLE_NAME).write_bytes(b"")
    with pytest.raises(EngramFormatError, match=r"would be read instead of the index.*Delete it"):
        read_index(tmp_path)


EXPECTED = {"memory.rows": ((10,), "F32"), "memory.map": ((5,), "I64")}


@pytest.fixture
def checkpoint(tmp_path):
    made = {"memory.rows": torch.arange(10.0), "memory.map": torch.arange(5), "other": torch.ones(2)}
    write_index(tmp_path, write_shards(tmp_path, "engram-memory", made, 45), 0)
    return tmp_path


def test_a_whole_checkpoint_is_accepted(checkpoint):
    check_folder(checkpoint, EXPECTED)
    assert len(list(checkpoint.glob("engram-memory-*"))) == 3


def test_a_checkpoint_without_a_file_is_refused(checkpoint):
    (checkpoint / shard_name("engram-memory", 3, 3)).unlink()  # not even one of the memory's own
    with pytest.raises(FileNotFoundError, match="engram-memory-00003-of-00003"):
        check_folder(checkpoint, EXPECTED)


def test_a_file_without_its_tensor_is_refused(checkpoint):
    index = read_index(checkpoint)
    indexed(checkpoint, {**index, "memory.map": index["memory.rows"]})
    with pytest.raises(EngramFormatError, match=r"engram-memory-00001-of-00003.* holds 'memory.map', but it does not"):
        check_folder(checkpoint, EXPECTED)


def test_an_index_without_a_tensor_is_refused(checkpoint):
    index = read_index(checkpoint)
    del index["memory.map"]
    indexed(checkpoint, index)
    with pytest.raises(EngramFormatError, match=r"does not name 'memory.map'.*never filled with random rows.*graft"):
        check_folder(checkpoint, EXPECTED)


@pytest.mark.parametrize("wrong", [((11,), "F32"), ((10, 1), "F32"), ((10,), "BF16")])
def test_a_tensor_of_another_shape_or_type_is_refused(wrong, checkpoint):
    with pytest.raises(EngramFormatError, match=r"'memory.rows' as F32 \[10\], config.json needs .*other sizes"):
        check_folder(checkpoint, {**EXPECTED, "memory.rows": wrong})
