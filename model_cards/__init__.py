"""Model cards: what is told about a checkpoint on its page."""

from .card import write_model_card


__all__ = ["write_model_card"]
