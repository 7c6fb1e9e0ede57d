"""`make sweep`: every causal type of Transformers with a memory, at a tiny random size; then docs/backbones.md.

Each type runs in a process of its own, because some crash, hang or take much memory. What is in results.jsonl for the
same version of Transformers is not run again, unless it is named.

Run: python -m tests.sweep [TYPE ...]
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .check import Row, send_row
from .page import PAGE, RESULTS, page, read_rows


SECONDS, BYTES = 240, 8 << 30  # of one type
PROCESSES = multiprocessing.get_context("forkserver")  # its server imports once, and forks for each type


def row_of(model_type: str) -> Row:
    """Checks a type in a process of its own."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=send_row, args=(model_type, sender, BYTES))
    process.start()
    sender.close()
    row = Row(model_type, "not built", said=f"it takes more than {SECONDS} seconds")
    try:
        if receiver.poll(SECONDS):
            row = receiver.recv()
    except EOFError:  # the process is dead
        row = Row(model_type, "fails", said="its process crashes")
    process.kill()
    process.join()
    row.transformers = transformers.__version__
    print(f"{row.type}: {row.outcome} {row.said}", flush=True)
    return row


def main(named: list[str]) -> int:
    """Runs what is named, or else what is missing, and writes results and page; returns 1 if a type fails."""
    types = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := sorted(set(named) - set(types)):
        raise SystemExit(f"unknown types {unknown}: name keys of AutoModelForCausalLM's mapping.")
    rows = {row.type: row for row in read_rows() if row.type in types and row.transformers == transformers.__version__}
    PROCESSES.set_forkserver_preload(["tests.sweep.check"])
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", "2"))) as workers:
        for row in workers.map(row_of, named or [name for name in types if name not in rows]):
            rows[row.type] = row
            lines = [json.dumps(asdict(rows[name])) + "\n" for name in types if name in rows]
            RESULTS.write_text("".join(lines), encoding="utf-8")
    PAGE.write_text(page(read_rows()), encoding="utf-8")
    return int(any(row.outcome == "fails" for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
