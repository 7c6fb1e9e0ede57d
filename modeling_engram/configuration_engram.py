"""Re-exports the configuration; in a saved checkpoint the real file has this name."""

from engram_transformers.configuration.configuration_engram import (
    REMEDY,
    EngramConfig,
    EngramFormatError,
    refuse_parts,
    saying_what_to_install,
)


__all__ = ["REMEDY", "EngramConfig", "EngramFormatError", "refuse_parts", "saying_what_to_install"]
