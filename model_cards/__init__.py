"""Model cards: descriptions of checkpoints and of knowledge packs on their Hub pages."""

from .card import model_card, write_model_card
from .pack_card import pack_card, publish_pack


__all__ = ["model_card", "pack_card", "publish_pack", "write_model_card"]
