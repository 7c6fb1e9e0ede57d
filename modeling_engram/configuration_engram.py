"""Door to the configuration floor; in a saved checkpoint the real file stands here under the same name."""

from engram_transformers.configuration.configuration_engram import (
    REMEDY,
    EngramConfig,
    EngramFormatError,
    refuse_parts,
    saying_what_to_install,
)


__all__ = ["REMEDY", "EngramConfig", "EngramFormatError", "refuse_parts", "saying_what_to_install"]
