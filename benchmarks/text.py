"""Real text for measurements: the prose of the World Factbook that the demo ships, as token ids.

Promises: the same ids every time for the same tokenizer. Never downloads, never invents ids.
Source: examples/data/README.md.
"""

import torch

from examples.demo.corpus import read_entries, shuffled


FILES = ("factbook.jsonl.gz", "wordnet_entities.jsonl.gz")


def real_ids(tokenizer, tokens: int, skip: int = 0) -> torch.Tensor:
    """Consecutive tokens of real text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the donor's.
        tokens (`int`): how many.
        skip (`int`, *optional*, defaults to 0): how many to leave out before, for texts that share no place.

    Returns:
        `torch.LongTensor` of shape `(1, tokens)`.

    Raises:
        `ValueError`: if the texts have fewer.
    """
    ids: list[int] = []
    for name in FILES:
        for text in shuffled([entry["text"] for entry in read_entries(name)]):
            ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= skip + tokens:
                return torch.tensor([ids[skip : skip + tokens]])  # (1, tokens)
    raise ValueError(f"the demo's texts give {len(ids):,} tokens, {skip + tokens:,} are needed: measure fewer.")
