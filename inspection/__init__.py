"""Inspection: checks a checkpoint's content, and whether a model generates exactly. Never writes."""

from .generation import GenerationReport, ModeResult, check_generation
from .verify import Finding, verify_checkpoint


__all__ = ["Finding", "GenerationReport", "ModeResult", "check_generation", "verify_checkpoint"]
