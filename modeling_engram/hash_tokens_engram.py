"""Token compression: maps token ids that read the same to one class, so that " Apple", "apple" and "APPLE" share rows.

Promises: the map depends only on the tokenizer and is built once, at the graft; a checkpoint stores it as integers, so
loading needs no tokenizer. Never guesses for ids without a tokenizer entry: they are dead (class -1), break the n-gram
and shut the gate.
Source: Engram (arXiv 2601.07372), section 2.1 and appendix C; the demo's CompressedTokenizer.
"""

import hashlib
from collections.abc import Sequence

import torch
from tokenizers import Regex, normalizers


# Class of an id without a tokenizer entry, and of every position that is not text.
DEAD = -1

# A private-use character that protects a text of exactly one space from being stripped.
LONE_SPACE = "\ue000"

NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(LONE_SPACE, " "),
    ]
)


def normalize_text(text: str) -> str:
    """Returns the key under which a decoded token is merged; the text itself if normalisation leaves nothing."""
    return NORMALIZER.normalize_str(text) or text


class TokenCompressor:
    """Map from token ids to classes, in order of first appearance.

    Args:
        lookup_table (`torch.LongTensor` of shape `(tokens,)`):
            Class of every id, 0..size-1, or -1 for a dead id.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from engram_transformers.hash_tokens_engram import TokenCompressor

    >>> compressor = TokenCompressor.from_tokenizer(AutoTokenizer.from_pretrained("gpt2"))
    >>> compressor.size < len(compressor.lookup_table)
    True
    ```"""

    def __init__(self, lookup_table: torch.Tensor):
        self.lookup_table = lookup_table.to(torch.int64)

    @property
    def size(self) -> int:
        """Number of classes."""
        return int(self.lookup_table.max()) + 1

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "TokenCompressor":
        """Builds the map from a tokenizer's own decoding, including special and added tokens.

        It covers all ids up to the tokenizer's highest; ids without a token are dead.
        """
        classes: dict[str, int] = {}
        ids = _token_ids(tokenizer)
        table = torch.full((max(ids, default=-1) + 1,), DEAD, dtype=torch.int64, device="cpu")
        for token_id in ids:
            table[token_id] = classes.setdefault(token_key(tokenizer, token_id), len(classes))
        return cls(table)

    def token_map(self, vocab_size: int) -> torch.Tensor:
        """Returns the map as a checkpoint stores it, `(vocab_size,)` rows of the embedding; -1 for ids without an
        entry.

        Raises:
            `ValueError`: if the tokenizer has more ids than the backbone has embeddings.
        """
        known = len(self.lookup_table)
        if known > vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {known - 1}, but the backbone embeds those up to {vocab_size - 1}: "
                f"tokens were added without resizing. Call donor.resize_token_embeddings({known}) and save the donor "
                "first, or use the tokenizer that the donor came with."
            )
        token_map = torch.full((vocab_size,), DEAD, dtype=torch.int64, device="cpu")
        token_map[:known] = self.lookup_table
        return token_map


def _token_ids(tokenizer) -> list[int]:
    """Returns the ids that have a token, ascending; some tokenizers skip ids."""
    return sorted({*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder})


def token_key(tokenizer, token_id: int) -> str:
    """Returns the key of one token: its normalised text, or its raw form if it is not complete UTF-8."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(token_id))
    return normalize_text(text)


def without_placeholders(token_map: torch.Tensor, placeholders: Sequence[int]) -> torch.Tensor:
    """Returns a token map `(ids,)` in which ids that stand for images and the like are dead; classes keep their
    numbers.
    """
    token_map = token_map.clone()
    token_map[[token for token in placeholders if token < len(token_map)]] = DEAD
    return token_map


def token_map_sha256(token_map: torch.Tensor) -> str:
    """SHA-256 of a token map: entries up to the last live one, little-endian int64, in order of the ids.

    Dead entries at the end do not count, so that a padded vocabulary may be trimmed.
    """
    entries = token_map.to("cpu", torch.int64).numpy()
    live = (entries != DEAD).nonzero()[0]
    entries = entries[: live[-1] + 1] if len(live) else entries[:0]
    return hashlib.sha256(entries.astype("<i8").tobytes()).hexdigest()


def appended_from(token_map: torch.Tensor, compressed_vocab_size: int) -> int:
    """Returns the first id that a resize appended (class at or above V'); the map's length if there is none."""
    added = (token_map.cpu().numpy() >= compressed_vocab_size).nonzero()[0]
    return int(added[0]) if len(added) else len(token_map)


def check_token_map(
    stored: torch.Tensor, tokenizer, compressed_vocab_size: int | None = None, placeholders: Sequence[int] = ()
) -> None:
    """Refuses a tokenizer whose ids do not mean what a memory's rows were trained for.

    `stored` is a checkpoint's token map, `(vocab_size,)`, made at the graft with `compressed_vocab_size` classes. Ids
    that a resize appended are classes by themselves: the tokenizer must have them, but what they read like is not
    compared. `placeholders` are ids that stand for images and the like.

    Raises:
        `ValueError`: naming the first ids that differ.
    """
    given = without_placeholders(TokenCompressor.from_tokenizer(tokenizer).lookup_table, placeholders)
    if compressed_vocab_size is not None:
        first = appended_from(stored, compressed_vocab_size)
        if len(given) >= first:
            given = torch.cat([given[:first], stored[first:].cpu(), given[len(stored) :]])  # (ids,)
    length = max(len(stored), len(given))
    maps = [
        torch.cat([m.cpu(), torch.full((length - len(m),), DEAD, device="cpu")]) for m in (stored, given)
    ]  # (ids,) each
    different = torch.nonzero(maps[0] != maps[1]).flatten().tolist()
    if different:
        ids = set(_token_ids(tokenizer))
        shown = [f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" if i in ids else str(i) for i in different[:5]]
        raise ValueError(
            f"this tokenizer ({len(ids)} ids) gives another token map than the memory's in {len(different)} "
            f"place(s); first ids that differ: {', '.join(shown)}. {_what_to_do(stored, different, length)}"
        )


def _what_to_do(stored: torch.Tensor, different: list[int], length: int) -> str:
    """Returns the advice for a tokenizer of `length` ids that differs from a token map at these ids."""
    live = torch.nonzero(stored != DEAD).flatten()
    if len(live) and different[0] > int(live[-1]):
        return (
            "They were added after the graft and have no rows: texts with them would shut the memory off there. "
            f"model.resize_token_embeddings({length}) gives them rows; then save the model."
        )
    return "Use the tokenizer saved in the checkpoint's folder: with another one n-grams would read other rows."
