"""Inspection: checks a checkpoint and its generation, and shows what a memory reads and is worth. Never writes one."""

from .ablation import ablate
from .corpus_use import CorpusNgrams, row_use, sharers
from .depth import cka_map, layer_states, logit_lens, soft_alignment
from .generation import GenerationReport, ModeResult, check_generation
from .lookup import LookUp, RowFound, look_up
from .page import reads_page
from .text_reads import TextReads, read_text
from .verify import Finding, verify_checkpoint


__all__ = [
    "CorpusNgrams",
    "Finding",
    "GenerationReport",
    "LookUp",
    "ModeResult",
    "RowFound",
    "TextReads",
    "ablate",
    "check_generation",
    "cka_map",
    "layer_states",
    "logit_lens",
    "look_up",
    "read_text",
    "reads_page",
    "row_use",
    "sharers",
    "soft_alignment",
    "verify_checkpoint",
]
