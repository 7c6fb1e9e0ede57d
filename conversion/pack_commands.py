"""The group `engram pack`: knowledge packs are shown, merged, compared, published, and records are removed, all
without a model.

Promises: everything is checked before a file is written, and a file is written whole or not at all; no file is
overwritten unless an option says so. Texts from packs and tokenizers cannot control the terminal. Never loads a model.
Source: docs/packs.md.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..adapters import PackTexts, compare_packs, merge_packs
from ..knowledge_pack_engram import KnowledgePack
from ..model_cards import publish_pack
from .terminal import check_new_file, load_tokenizer, progress, result, user_errors, visible


app = typer.Typer(help="Knowledge packs: show, merge, compare, remove records, publish.", no_args_is_help=True)

_Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the tokenizer that the pack's model has; shows texts.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, with all records.")]
_Limit = Annotated[int, typer.Option(min=0, help="Most n-grams to print.")]
_Overwrite = Annotated[bool, typer.Option(help="Replace a file that is there.")]


@app.command()
@user_errors
def show(
    file: Annotated[Path, typer.Argument(help="A pack's file.")],
    tokenizer: _Tokenizer = None,
    limit: _Limit = 20,
    as_json: _Json = False,
) -> None:
    """Print what a pack is: its mode, the memory that it fits, its size, provenance and n-grams."""
    pack = KnowledgePack.load(file)
    texts = _texts(pack, tokenizer)
    sizes = {"records": len(pack), "bytes": pack.nbytes}
    ngrams = sorted(pack.ngrams(), key=_by_order)
    if as_json:
        told = {"file": str(file), "mode": pack.mode, "fits": pack.fits, **sizes, "provenance": pack.provenance}
        print(json.dumps({**told, "ngrams": _listed(ngrams, texts)}))
        return
    for part, values in {"": {"mode": pack.mode, **sizes}, "fits ": pack.fits, "provenance ": pack.provenance}.items():
        for name, value in values.items():
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            print(f"{part}{visible(str(name))}: {visible(said)}")
    _print_ngrams({"": ngrams}, texts, limit)


@app.command()
@user_errors
def merge(
    files: Annotated[list[Path], typer.Argument(help="Packs, in the order in which a model would read them.")],
    out: Annotated[Path, typer.Option(help="New file.")],
    conflicts: Annotated[
        str, typer.Option(help="An n-gram of several packs: refuse, sum (vectors are added) or later (the last one's).")
    ] = "refuse",
    overwrite: _Overwrite = False,
) -> None:
    """Write one pack with the records of several."""
    check_new_file(out, overwrite)
    merged = merge_packs([KnowledgePack.load(file) for file in files], conflicts=conflicts)
    merged.save(out)
    progress.print(f"{len(files)} packs, {len(merged):,} records, {merged.nbytes:,} bytes", highlight=False)
    print(visible(str(out)))


@app.command()
@user_errors
def diff(
    first: Annotated[Path, typer.Argument(help="A pack's file.")],
    second: Annotated[Path, typer.Argument(help="Another one, for the same memory.")],
    tokenizer: _Tokenizer = None,
    limit: _Limit = 20,
    as_json: _Json = False,
) -> None:
    """Print the records in which two packs differ; exit with 1 if there are any, as `diff` does."""
    one, other = KnowledgePack.load(first), KnowledgePack.load(second)
    found = compare_packs(one, other)
    texts = _texts(one, tokenizer)
    changed = sorted(found.changed, key=_by_order)
    if as_json:
        told = {
            "modes": list(found.modes),
            "only_first": _listed(found.only_first, texts),
            "only_second": _listed(found.only_second, texts),
            "changed": [
                {**entry, "largest_difference": found.changed[gram]}
                for gram, entry in zip(changed, _listed(changed, texts), strict=True)
            ],
        }
        print(json.dumps(told))
    else:
        if found.modes[0] != found.modes[1]:
            result.print(f"modes: {' and '.join(found.modes)}")
        by_place = {"only in the first": found.only_first, "only in the second": found.only_second, "changed": changed}
        for place, ngrams in by_place.items():
            result.print(f"{place}: {len(ngrams):,} records", highlight=False)
        _print_ngrams(by_place, texts, limit)
    if found:
        raise typer.Exit(1)


@app.command()
@user_errors
def remove(
    file: Annotated[Path, typer.Argument(help="A pack's file.")],
    subject: Annotated[
        list[str] | None, typer.Option(help="A name, all of whose n-grams go; needs --tokenizer.")
    ] = None,
    ngrams: Annotated[list[str] | None, typer.Option(help='Token classes of one n-gram, such as "74 234".')] = None,
    tokenizer: _Tokenizer = None,
    partly: Annotated[bool, typer.Option("--partly", help="Also a name that the pack holds in part.")] = False,
    out: Annotated[Path | None, typer.Option(help="New file for what remains.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace FILE by what remains.")] = False,
    overwrite: _Overwrite = False,
) -> None:
    """Write a pack without some records, and read it again to see that they are gone.

    A record that two names share goes with either of them.
    """
    out = _target(file, out, in_place, overwrite)
    pack = KnowledgePack.load(file)
    texts = _texts(pack, tokenizer)
    gone = {_parsed(text, pack) for text in ngrams or ()} | _named(subject or (), pack, texts, partly)
    if not gone:
        raise ValueError("nothing to remove was named: give --ngrams, or --subject and --tokenizer.")
    pack.without(gone).save(out)
    left = KnowledgePack.load(out)
    found = compare_packs(pack, left)
    if set(found.only_first) != gone or found.only_second or found.changed:
        raise OSError(f"'{out}' does not hold what was written to it: check the disk, and remove again.")
    _print_ngrams({"": sorted(gone, key=_by_order)}, texts, len(gone))
    print(f"{len(gone):,} records are gone, {len(left):,} remain in {visible(str(out))}")


@app.command()
@user_errors
def publish(
    file: Annotated[Path, typer.Argument(help="A pack's file.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as me/people; made if it is missing.")],
    base_model: Annotated[str, typer.Option(help="Hub id of the graft that reads the pack.")],
    license: Annotated[str | None, typer.Option(help="As the Hub names it, such as cc0-1.0.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    token: Annotated[str | None, typer.Option(help="If you are not logged in.")] = None,
) -> None:
    """Upload a pack and a card that says what it knows; `load_memory("me/people")` reads it then."""
    with progress.status(f"publishing {visible(str(file))}"):
        print(publish_pack(file, repo, base_model=base_model, license=license, private=private, token=token))


def _target(file: Path, out: Path | None, in_place: bool, overwrite: bool) -> Path:
    """Returns where to write what remains of a pack."""
    if in_place == (out is not None):
        raise ValueError("say where to write what remains: --out NEW, or --in-place for the same file.")
    if in_place:
        return file
    if file.exists() and out.exists() and os.path.samefile(file, out):
        raise ValueError(f"'{out}' is the pack itself: --in-place replaces it.")
    check_new_file(out, overwrite)
    return out


def _texts(pack: KnowledgePack, tokenizer: str | None) -> PackTexts | None:
    """Returns the texts of a pack, if a tokenizer is given."""
    return None if tokenizer is None else PackTexts(pack, load_tokenizer(tokenizer))


def _parsed(text: str, pack: KnowledgePack) -> tuple[int, ...]:
    """Returns the n-gram that a user wrote as numbers."""
    try:
        gram = tuple(int(part) for part in text.replace(",", " ").strip(" ()").split())
    except ValueError as error:
        raise ValueError(
            f'--ngrams {text!r} must be token classes with spaces between them, such as "74 234".'
        ) from error
    if len(gram) not in pack.records:
        raise ValueError(
            f"--ngrams {text!r} has {len(gram)} classes, and the pack has n-grams of {sorted(pack.records)}."
        )
    if not all(0 <= own < pack.fits["classes"] for own in gram):
        raise ValueError(f"--ngrams {text!r} is not in the vocabulary: classes are 0 to {pack.fits['classes'] - 1}.")
    return gram


def _named(subjects: Iterable[str], pack: KnowledgePack, texts: PackTexts | None, partly: bool) -> set[tuple[int, ...]]:
    """Returns the n-grams of a pack that are inside these names."""
    held, found = pack.ngrams(), set()
    for subject in subjects:
        if texts is None:
            raise ValueError(f"--subject {subject!r} needs --tokenizer: records hold token classes and no text.")
        own = texts.ngrams(subject)
        if not own & held:
            raise ValueError(f"the pack holds no record of {subject!r}: nothing was removed.")
        if own - held and not partly:
            raise ValueError(
                f"the pack holds {len(own & held)} of the {len(own)} n-grams of {subject!r}. They may be another "
                "name's, or general text kept the others out. Nothing was removed; --partly removes them."
            )
        found |= own & held
    return found


def _by_order(ngram: tuple[int, ...]) -> tuple:
    return len(ngram), ngram


def _listed(ngrams: Iterable[tuple[int, ...]], texts: PackTexts | None) -> list[dict]:
    """Returns n-grams for JSON."""
    return [{"classes": list(gram), **({} if texts is None else {"text": texts.words(gram)})} for gram in ngrams]


def _print_ngrams(by_place: dict[str, list[tuple[int, ...]]], texts: PackTexts | None, limit: int) -> None:
    """Prints the first n-grams of each place as a table."""
    table = Table(*(["records"] if len(by_place) > 1 else []), "token classes")
    if texts is not None:
        table.add_column("text", overflow="fold")
    for place, ngrams in by_place.items():
        where = [place] if len(by_place) > 1 else []
        for gram in ngrams[:limit]:
            words = [] if texts is None else [" ".join(f'"{visible(word)}"' for word in texts.words(gram))]
            table.add_row(*where, " ".join(map(str, gram)), *map(Text, words))
        if len(ngrams) > limit:
            table.add_row(*where, f"and {len(ngrams) - limit:,} more: --limit or --json shows them")
    if table.row_count:
        result.print(table)
