"""Text files for the examples: a text a line, or a JSON object a line with the text under "text"; gzipped or not."""

import gzip
import json
from pathlib import Path


DATA = Path(__file__).parent / "data"
WORDNET = DATA / "wordnet_entities.jsonl.gz"  # names with what they are: "Plevna, Pleven: the town was taken ..."
FACTBOOK = DATA / "factbook.jsonl.gz"  # prose about countries


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file, without empty ones."""
    path = Path(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    is_json = ".jsonl" in path.suffixes
    return [json.loads(line)["text"] if is_json else line for line in lines if line]


def windows(tokenizer, texts: list[str], length: int) -> list[dict[str, list[int]]]:
    """Joins texts by blank lines and cuts the tokens into windows, as Trainer takes them."""
    ids = [token for text in texts for token in tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]]
    cuts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not cuts:
        raise ValueError(f"the texts have {len(ids)} tokens, fewer than one window of {length}: --length {len(ids)}.")
    return [{"input_ids": cut, "labels": cut} for cut in cuts]
