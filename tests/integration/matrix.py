"""The matrix of backbones and modes of generating: what its cells may be, and its page in the documentation.

Write the page: python -m tests.integration.matrix docs/generation.md (`make docs`).
"""

import logging
import sys
from pathlib import Path

from transformers.cache_utils import Cache

from engram_transformers.compat_engram import CACHE
from engram_transformers.inspection import GenerationReport, check_generation
from engram_transformers.inspection.modes import MODES
from tests.tiny import engram_on

from .backbones import BACKBONES, READS_PADS, REFUSED


ROWS = BACKBONES | READS_PADS

# Cells in which the plain backbone differs from itself; within twice of that is what a memory can be asked for.
BACKBONES_OWN = {
    ("deepseek_v4_compressed", "left padding"): "it compresses pads with the text",
    ("deepseek_v4_compressed", "left padding, beams"): "it compresses pads with the text",
    ("deepseek_v4_compressed", "packed documents"): "it compresses tokens of neighbouring documents",
    ("gpt_oss", "packed documents"): "its masks ignore position_ids, so it reads across the border",
    ("lfm2", "packed documents"): "its convolution crosses borders",
    ("lfm2", "prompt lookup, static cache"): "it has no mask for a static cache that is cropped",
    ("falcon_h1", "packed documents"): "its state crosses borders",
    ("falcon_h1", "cache.crop"): "its recurrent state is not rolled back",
}

NO_ROLLBACK = ("assisted by itself", "assisted by another", "prompt lookup")
BATCH_CHANGES = ("cache.batch_repeat_interleave", "cache.batch_select_indices")

# Cells that are refused, and what the error says. All but the first and those of
# mistral and phi3 are the plain backbone's own refusals.
REFUSALS = {(row, "nn.DataParallel"): "torchrun or accelerate launch" for row in ROWS}
for row in ("deepseek_v4", "deepseek_v4_compressed", "falcon_h1"):
    REFUSALS |= {(row, mode): "assisted generation is not supported with stateful models" for mode in NO_ROLLBACK}
for row in ("deepseek_v4", "deepseek_v4_compressed"):
    REFUSALS |= {(row, mode): "compressed" for mode in ("static cache", "static cache, left padding")}
    REFUSALS |= {(row, mode): "size" for mode in (*BATCH_CHANGES, "cache.crop")}
    REFUSALS[row, "DynamicCache() of the user"] = "store_compression_weights"
STATIC_ROLLBACK = ("assisted, static cache", "prompt lookup, static cache")
if CACHE == "past_key_values":  # before 5.24
    REFUSALS |= {(row, mode): "not supported with Static cache" for row in ROWS for mode in STATIC_ROLLBACK}
else:
    for row in ("mistral", "phi3", "qwen2", "smollm3", "gemma2", "gemma3", "gpt_oss"):  # windows over static caches
        REFUSALS |= {(row, mode): "requires a cache that can be cropped" for mode in STATIC_ROLLBACK}
for row in ("deepseek_v4", "deepseek_v4_compressed", "falcon_h1"):
    REFUSALS |= {(row, mode): "assisted generation is not supported with stateful models" for mode in STATIC_ROLLBACK}
for row in ("lfm2", "falcon_h1"):
    has_states = hasattr(Cache, "get_conv_state")  # not in transformers 5.20
    REFUSALS[row, "DynamicCache() of the user"] = "Cannot get conv state" if has_states else "has_previous_state"
REFUSALS |= {("lfm2", mode): "'LinearAttentionLayer' object has no attribute" for mode in BATCH_CHANGES}
REFUSALS |= {("falcon_h1", mode): "Sizes of tensors must match" for mode in BATCH_CHANGES}

for row in ("mistral", "phi3"):  # windows alone, and so small
    REFUSALS[row, "continuous batching"] = "hold the last 8 tokens (sliding_window), and the memory reads 9"
for row in ("deepseek_v4", "deepseek_v4_compressed", "lfm2", "falcon_h1"):
    REFUSALS[row, "continuous batching"] = "has no pages for layers of"
REFUSALS["deepseek_v3", "continuous batching"] = "gave no answer"  # pages hold keys as wide as values

SYMBOLS = {"exact": "=", "rounding": "~", "backbone's": "b", "refused": "r", "not run": "gpu", "wrong": "**WRONG**"}

PAGE = """# Ways of generating

<!-- made by `make docs`; tests/integration/test_matrix.py asserts every cell -->

Each cell is a tiny random model with a random memory and a convolution that is not zero. It is run in one way and
compared with reading each text at once, by itself, without a cache and without pads: logits to 1e-5 in float32, and the
tokens that are chosen. Run the same check on your own model:

```python
from engram_transformers import check_generation

print(check_generation(model, tokenizer))
```

`engram verify CHECKPOINT` runs it too, as its last section.

- `=` is exact.
- `~` is rounding: the difference is above 1e-5, but at most 4 times what changing the last bit of the embeddings makes.
- `b`: the plain backbone differs from itself in this mode. With a memory, the difference is at most twice as large
  (list below).
- `r`: refused with an error, by Transformers or the backbone, which does not support this mode, or by Engram
  (`nn.DataParallel`, continuous batching with windows that hold fewer tokens than the memory reads).
- `gpu`: needs a GPU; not run on a machine without one.

{table}

Where the plain backbone differs from itself:

{differing}

Refused when the memory is grafted or the configuration is made:

{refused}

Explanations:

- N-grams and convolution inputs of a text are in one more layer of its `Cache`, so every operation on a cache reaches
  them. `crop` works on tokens that were read after `cache.activate_past_recording()`, and is refused otherwise. A cache
  that was continued without its memory is refused.
- Packed documents are separated where `position_ids` restart (with `attention_mask=None` and `use_cache=False`, as
  backbones need it too), or by `engram_segment_ids`. With a cache or a two-dimensional mask, a restart is refused.
- The table is for the locked transformers, 5.23, which refuses assisted decoding with a static cache. With 5.24 it is
  exact, except where the backbone has sliding windows (refused by Transformers).
- Continuous batching keeps keys and values of many requests in pages, and a memory's histories beside them.
  Transformers has pages for full attention and windows alone, with keys as wide as values. Mistral and phi3 have
  nothing but windows, of 8 tokens here: a window must hold more tokens than the memory reads before each, 9 with the
  default convolution.
- Positions that are not text are -1 in `engram_input_ids`, also in `generate`.
- Of the 189 causal model types of transformers 5.23.0, 162 work with a memory, 22 are refused when it is put in, and 5
  could not be built: [backbones.md](backbones.md) has each of them, in fewer ways. Whole models that read images are on
  [a page of their own](composite.md).
- `~` comes from the published gate: if its score is close to 0, the signed square root is so steep that rounding of
  1e-7 becomes 5e-5 (`engram_gate="sigmoid"` does not have this). A wrong history makes a difference a thousand times
  larger.
"""


def page(reports: dict[str, GenerationReport]) -> str:
    """The documentation's page."""
    cells = {(row, result.mode): SYMBOLS[result.status] for row, report in reports.items() for result in report.results}
    lines = ["| | " + " | ".join(reports) + " |", "| --- |" + " :-: |" * len(reports)]
    lines += [f"| {mode.name} | " + " | ".join(cells[row, mode.name] for row in reports) + " |" for mode in MODES]
    differing = [f"- {row}, {mode}: {why}." for (row, mode), why in BACKBONES_OWN.items()]
    refused = [f"- {name}: {said}." for name, (_, said) in REFUSED.items()]
    return PAGE.format(table="\n".join(lines), differing="\n".join(differing), refused="\n".join(refused))


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    Path(sys.argv[1]).write_text(page({name: check_generation(engram_on(make())) for name, make in ROWS.items()}))
