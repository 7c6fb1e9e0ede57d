"""Door to the configuration floor; in a saved checkpoint the real file stands here under the same name."""

from engram_transformers.configuration.configuration_engram import EngramConfig, EngramFormatError, refuse_parts


__all__ = ["EngramConfig", "EngramFormatError", "refuse_parts"]
