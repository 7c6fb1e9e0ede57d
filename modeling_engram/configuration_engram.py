"""Re-exports the configuration; in a saved checkpoint the real file has this name."""

from engram_transformers.configuration.configuration_engram import (
    REMEDY,
    EngramConfig,
    EngramFormatError,
    holds_other_models,
    placeholder_ids,
    saying_what_to_install,
)


__all__ = [
    "REMEDY",
    "EngramConfig",
    "EngramFormatError",
    "holds_other_models",
    "placeholder_ids",
    "saying_what_to_install",
]
