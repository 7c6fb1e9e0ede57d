"""Texts of the experiment: entries of FOLDOC to learn, and two other kinds of text that are to stay as they were.

FOLDOC (Debian package dict-foldoc, GNU Free Documentation License 1.1 or later, edited by Denis Howe, foldoc.org) and
the Anarchist FAQ (package anarchism, GPL-2, its Editorial Collective) are fetched by apt into the work folder and stay
out of the repository; nothing is installed. The World Factbook is in examples/data. Promises: the same
windows everywhere from the same packages; entries that are held out share no headword with those that are learned.
"""

import gzip
import html
import random
import re
import shutil
import string
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.build import split_of
from ..entities.corpus import read_entries, shuffled, windows


PACKAGES = ("dict-foldoc", "anarchism")
FOLDOC = "usr/share/dictd/foldoc"
FAQ = "usr/share/doc/anarchism/html"

# Shorter entries are cross-references ("See also ...") and expansions of an acronym.
LEAST_CHARACTERS = 80

# Digits of dictd's index, the most significant first.
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
SAMPLES = ("recall", "held_out", "faq", "factbook")


@dataclass(frozen=True)
class DomainText:
    """Windows of token ids, each of shape `(windows, length)`.

    Args:
        train (`torch.LongTensor`): entries to learn.
        recall (`torch.LongTensor`): a fixed sample of `train`.
        held_out (`torch.LongTensor`): entries of the same dictionary under other headwords.
        faq (`torch.LongTensor`): the Anarchist FAQ.
        factbook (`torch.LongTensor`): the World Factbook.
    """

    train: torch.Tensor
    recall: torch.Tensor
    held_out: torch.Tensor
    faq: torch.Tensor
    factbook: torch.Tensor


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the packages that are not there yet.

    Args:
        folder (`Path`): where they are kept.

    Raises:
        `OSError`: where there is no apt, or it has no such package.
    """
    done = folder / "unpacked"
    if (done / f"{FOLDOC}.index").is_file() and (done / FAQ).is_dir():
        return done
    if not all(shutil.which(name) for name in ("apt-get", "dpkg-deb")):
        raise OSError(
            f"the texts are Debian packages, and apt-get and dpkg-deb are not here: unpack {' and '.join(PACKAGES)} "
            f"elsewhere (dpkg-deb -x) and put the result into '{done}'."
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {', '.join(PACKAGES)}")
    download = ["apt-get", "download", *PACKAGES]
    if answer(download, folder).returncode:
        answer(["apt-get", "update"], folder)  # a machine may have no lists of packages yet
        failed = answer(download, folder)
        if failed.returncode:
            raise OSError(f"apt-get could not download {', '.join(PACKAGES)}:\n{failed.stderr.strip()[-800:]}")
    draft = folder / "unpacking"
    shutil.rmtree(draft, ignore_errors=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(draft)], check=True)
    draft.replace(done)
    return done


def answer(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """What a command of the package system says."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def place_of(text: str) -> int:
    """A number of dictd's index, base 64."""
    value = 0
    for digit in text:
        value = 64 * value + DIGITS.index(digit)
    return value


def foldoc_entries(unpacked: Path) -> Iterator[tuple[str, str]]:
    """Headword and text ("headword: text") of the entries, in the order of the dictionary.

    The text is one line a paragraph, without the braces of cross-references and the date of the last change.
    """
    raw = gzip.decompress((unpacked / f"{FOLDOC}.dict.dz").read_bytes())
    places = set()
    for line in (unpacked / f"{FOLDOC}.index").read_text(encoding="utf-8").splitlines():
        word, begin, length = line.split("\t")
        if not word.startswith("00-database"):
            places.add((place_of(begin), place_of(length)))
    for begin, length in sorted(places):
        head, _, body = raw[begin : begin + length].decode("utf-8", "replace").strip().partition("\n")
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", body)]
        kept = [p for p in paragraphs if p and not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", p)]
        text = re.sub(r"[{}]", "", "\n".join(kept))
        if len(text) >= LEAST_CHARACTERS:
            yield head, f"{head}: {text}"


def faq_texts(unpacked: Path) -> list[str]:
    """The paragraphs of every page of the FAQ, without tags."""
    texts = []
    for path in sorted((unpacked / FAQ).glob("sec*.html")):
        found = re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        paragraphs = [" ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split()) for text in found]
        texts.append("\n".join(text for text in paragraphs if text))
    return [text for text in texts if text]


def load(tokenizer, unpacked: Path, train_tokens: int, sample_tokens: int) -> DomainText:
    """Cuts the texts into windows for a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the donor's.
        unpacked (`Path`): from [`fetch`].
        train_tokens (`int`): tokens to learn.
        sample_tokens (`int`): tokens in each of the four measured samples.
    """
    entries = list(foldoc_entries(unpacked))
    split = {name: shuffled([t for word, t in entries if split_of(word) == name]) for name in ("train", "held_out")}
    train = windows(tokenizer, split["train"], train_tokens)
    wanted = sample_tokens // train.shape[1]
    # A sample of the whole text, not its beginning: what was read last is remembered best.
    chosen = sorted(random.Random(0).sample(range(len(train)), min(wanted, len(train))))
    return DomainText(
        train=train,
        recall=train[chosen],
        held_out=windows(tokenizer, split["held_out"], sample_tokens),
        faq=windows(tokenizer, pages_cut(faq_texts(unpacked)), sample_tokens),
        factbook=windows(tokenizer, shuffled([e["text"] for e in read_entries("factbook.jsonl.gz")]), sample_tokens),
    )


def pages_cut(pages: list[str], characters: int = 4000) -> list[str]:
    """Beginnings of the pages in a fixed order, so that a sample has many pages and not one."""
    return shuffled([page[:characters] for page in pages])
