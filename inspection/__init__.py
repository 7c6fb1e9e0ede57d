"""Inspection: checks a checkpoint's content, and whether a model generates exactly. Never writes."""

from .generation import GenerationReport, WayResult, check_generation
from .verify import Finding, verify_checkpoint


__all__ = ["Finding", "GenerationReport", "WayResult", "check_generation", "verify_checkpoint"]
