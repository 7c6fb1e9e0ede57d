"""Inspection: what a checkpoint holds and whether it is right. Reads, and never writes."""

from .verify import Finding, verify_checkpoint


__all__ = ["Finding", "verify_checkpoint"]
