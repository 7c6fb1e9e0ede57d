"""What was measured of a checkpoint, as Markdown: its sizes and needs, receipt, training log, checks and packs.

Promises: sizes come from configuration and index, other figures from the files that measurements left; what is missing
is marked as not measured; texts from files hold no Markdown of their own. Never reads a weight.
Source: docs/publishing.md.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..configuration import EngramConfig
from ..files_checkpoint_engram import expected_shards
from ..files_safetensors_engram import DTYPE_NAMES, total_size
from ..knowledge_pack_engram import KnowledgePack
from ..rows_placement_engram import TABLES_PREFIX


NOT_MEASURED = "not measured"
NOT_SAID = "not said"
_ITEMSIZES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def plain(value: object) -> str:
    """Returns a value as text in which Markdown finds no marks, tables or lines."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in " ".join(str(value).split()))


def table(rows: Iterable[Iterable[object]], header: Iterable[str] = ("", "")) -> str:
    """Returns rows of Markdown as a table; numbers are on the right if the header says so with a colon at the end."""
    header = list(header)
    marks = ["---:" if name.endswith(":") else "---" for name in header]
    lines = [[name.removesuffix(":") for name in header], marks, *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def memory_sizes(config: EngramConfig) -> str:
    """Returns the memory's sizes as a table."""
    rows, table_bytes = _rows_and_bytes(config)
    heads = f"2..{config.engram_max_ngram_size} x {config.engram_n_heads}"
    kernel = config.engram_kernel_size
    sizes = {
        "layers (from 0)": ", ".join(map(str, config.engram_layer_ids)),
        "orders x heads": heads,
        "rows": f"{rows:,} of {config.engram_head_dim} values ({config.engram_table_dtype}), {table_bytes:,} bytes",
        "classes of token ids": f"{config.engram_compressed_vocab_size:,}",
        "convolution": f"kernel size {kernel}" if kernel else "none",
    }
    return table(sizes.items())


def needs(folder: Path, config: EngramConfig) -> str:
    """Returns what each placement of the tables needs: bytes by place, and bytes of rows that a token reads."""
    rows, table_bytes = _rows_and_bytes(config)
    total = total_size(folder)
    others = f"{total - table_bytes:,}" if total else NOT_MEASURED
    reads = len(config.engram_layer_ids) * len(config.engram_orders) * config.engram_n_heads  # rows of a token
    read = f"{reads * (table_bytes // rows):,}"
    lines = [
        ('"device"', f"{total:,}" if total else NOT_MEASURED, 0, 0, f"{read} on the device"),
        ('"cpu"', others, f"{table_bytes:,}", 0, f"{read} from host memory"),
        ('"disk"', others, "pages that were read", f"{table_bytes:,}", f"{read}, in at most {reads} reads"),
        ('"none", the backbone alone', others, 0, 0, 0),
    ]
    return table(lines, ("engram_placement", "device:", "host:", "disk:", "rows that a token reads:"))


def read_json(file: Path) -> dict:
    """Returns what a JSON file holds; empty if there is none.

    Raises:
        `ValueError`: naming the file, if it is not a JSON object.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON that can be read ({error}): restore it, or take it away.") from error
    if not isinstance(told, dict):
        raise ValueError(f"'{file}' must hold a JSON object, and holds a {type(told).__name__}: restore it.")
    return told


def how_grafted(told: Mapping) -> str:
    """Returns how a graft was made, from its receipt."""
    if not told:
        return f"The graft: {NOT_SAID} (there is no receipt)."
    source = {
        name: told[name] for name in ("donor", "revision", "subfolder", "donor_files", "left_out") if name in told
    }
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in told.get("versions", {}).items())
    lines = [*source.items(), *told.get("recipe", {}).items()]
    return table([*((plain(name), plain(value)) for name, value in lines), ("versions", versions or NOT_SAID)])


def training_log(state: Mapping) -> str:
    """Returns steps and losses of a run from Trainer's `trainer_state.json`."""
    if not state:
        return NOT_MEASURED
    lines = []
    for name, label in {"loss": "training loss", "eval_loss": "evaluation loss"}.items():
        found = [entry for entry in state.get("log_history", ()) if isinstance(entry.get(name), (int, float))]
        ends = [f"{entry[name]:.4f} (step {entry.get('step')})" for entry in (*found[:1], *found[1:][-1:])]
        lines.append([label, *(ends + [NOT_MEASURED] * 2)[:2]])
    steps = state.get("global_step")
    epoch = f", up to epoch {state['epoch']:.3g}" if isinstance(state.get("epoch"), (int, float)) else ""
    return f"{steps} steps{epoch}.\n\n{table(lines, ('nats a token', 'first:', 'last:'))}"


def checks(findings: Iterable) -> str:
    """Returns what `verify_checkpoint` found."""
    lines = [(found.section, "ok" if found.ok else "wrong", plain(found.detail)) for found in findings]
    return table(lines, ("`engram verify`", "result", "detail")) if lines else NOT_MEASURED


def packs(files: Iterable[Path]) -> str:
    """Returns the reports of knowledge packs, one after the other."""
    said = []
    for file in files:
        pack = KnowledgePack.load(file)
        said.append(f"`{file.name}`: {len(pack):,} records, {pack.nbytes:,} bytes.\n\n{pack_report(pack)}")
    return "\n\n".join(said) or "none"


def pack_report(pack: KnowledgePack) -> str:
    """Returns the report that a pack carries, made by `report_pack`."""
    report = pack.provenance.get("report")
    if not isinstance(report, Mapping):
        return NOT_MEASURED
    return table(_report_rows(report), ("texts", "number:", "with the pack:", "without:"))


def _report_rows(report: Mapping) -> Iterator[tuple]:
    """Yields the rows of a report."""
    for kind in ("taught", "unseen"):
        if kind in report:
            now = report[kind]
            right, before = f"{now['right']:.1%} right", f"{now['before']['right']:.1%} right"
            yield f"{kind} phrasings", now["texts"], right, before
    for kind, found in report["other_texts"].items():
        same = f"loss {found['loss']:.4f}, {found['texts_identical']:.1%} identical bit for bit"
        yield plain(kind), found["texts"], same, f"loss {found['loss_before']:.4f}"


def _rows_and_bytes(config: EngramConfig) -> tuple[int, int]:
    """Returns rows and bytes of all tables."""
    tables = [found for name, found in expected_shards(config).items() if name.startswith(TABLES_PREFIX)]
    return sum(shape[0] for shape, _ in tables), sum(math.prod(shape) * _ITEMSIZES[kind] for shape, kind in tables)
