"""Texts of a knowledge pack: its n-grams in words, and the n-grams of a name.

What it chooses: records hold classes of tokens, and not tokens, because tokens that read alike share a class. A class
is shown as what its tokens have in common: lower case, without accents and spaces around it.
Promises: needs no model; a tokenizer with another token map is refused, because its classes would be other words.
Source: docs/packs.md, hash_tokens_engram.py.
"""

from collections.abc import Sequence

from ..hash_tokens_engram import TokenCompressor, appended_from, token_key, token_map_sha256
from ..knowledge_pack_engram import KnowledgePack


class PackTexts:
    """Texts of a pack's n-grams.

    Args:
        pack ([`KnowledgePack`]): whose n-grams are read.
        tokenizer (`PreTrainedTokenizerBase`): of the model that the pack was made for; tokens may have been added.

    Raises:
        `ValueError`: for a tokenizer with another token map.

    Example:

    ```python
    >>> texts = PackTexts(KnowledgePack.load("people.engram-pack.safetensors"), tokenizer)
    >>> texts.words((74, 234))
    ['zor', 'van']
    >>> pack.without(texts.ngrams("Zorvan Kelmir") & pack.ngrams())
    ```"""

    def __init__(self, pack: KnowledgePack, tokenizer):
        token_map = TokenCompressor.from_tokenizer(tokenizer).lookup_table  # (tokens,)
        token_map = token_map[: appended_from(token_map, pack.fits["classes"])]  # without tokens added after the graft
        given = token_map_sha256(token_map), int(token_map.max()) + 1
        if given != (pack.fits["token_map"], pack.fits["classes"]):
            raise ValueError(
                f"this tokenizer gives the token map {given[0][:16]}... with {given[1]} classes, and the pack was made "
                f"with {str(pack.fits['token_map'])[:16]}... and {pack.fits['classes']}: its n-grams would be shown as "
                "other words. Use the tokenizer of the model that the pack was made for."
            )
        self._tokenizer, self._token_map = tokenizer, token_map.tolist()
        self._orders = sorted(pack.records)
        self._example = {own: token for token, own in enumerate(self._token_map)}  # class -> one of its tokens

    def words(self, ngram: Sequence[int]) -> list[str]:
        """Returns the text of each class of an n-gram."""
        return [token_key(self._tokenizer, self._example[own]) for own in ngram]

    def ngrams(self, name: str) -> set[tuple[int, ...]]:
        """Returns the n-grams inside a name, as it is written at the beginning of a text and after a space.

        These are the n-grams that teaching facts about this name gives records.
        """
        found = set()
        for written in (name, " " + name):
            ids = self._tokenizer(written, add_special_tokens=False)["input_ids"]
            classes = [self._token_map[i] if i < len(self._token_map) else -1 for i in ids]
            found |= {tuple(classes[i : i + n]) for n in self._orders for i in range(len(classes) - n + 1)}
        return {gram for gram in found if min(gram) >= 0}
