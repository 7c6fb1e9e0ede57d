"""Model cards: the description of a checkpoint on its Hub page."""

from .card import write_model_card


__all__ = ["write_model_card"]
