"""Model cards: descriptions of checkpoints and of knowledge packs on their Hub pages."""

from .card import write_model_card
from .pack_card import pack_card, publish_pack


__all__ = ["pack_card", "publish_pack", "write_model_card"]
