"""The verbs `engram inspect`, `lookup`, `occupancy`, `ablate` and `depth`: what a memory does, seen and measured.

Promises: results on stdout or in the files that were named, progress on stderr; texts cannot control the terminal; a
place for a file is checked before the model is loaded, and a file appears whole. Never changes a checkpoint.
Source: docs/inspection.md.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..conversion.terminal import check_new_file, load_tokenizer, progress, result, user_errors, visible


_Model = Annotated[str, typer.Argument(help="Folder or Hub id of an Engram checkpoint.")]
_Placement = Annotated[str, typer.Option(help="Where the tables are while they are read: auto, device, cpu or disk.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, with everything.")]
_Overwrite = Annotated[bool, typer.Option(help="Replace files that are there.")]


def _load(model: str, placement: str):
    """Loads a model and its tokenizer, and checks that they belong together."""
    from .. import EngramForCausalLM

    tokenizer = load_tokenizer(model)
    with progress.status(f"loading {escape(visible(model))}"):
        loaded = EngramForCausalLM.from_pretrained(model, engram_placement=placement).eval()
    loaded.check_tokenizer(tokenizer)
    return loaded, tokenizer


def _texts(path: Path) -> list[str]:
    """Reads texts: each line that is not empty; of a .jsonl file, the field "text" of each line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["text"] for line in lines]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' must hold an object with a \"text\" on each line ({error}).") from error
    if not lines:
        raise ValueError(f"'{path}' holds no text: give a file with a text on each line.")
    return lines


def inspect(
    model: _Model,
    text: Annotated[str | None, typer.Option(help="The text to look at.")] = None,
    file: Annotated[Path | None, typer.Option(help="The same as a file in UTF-8.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Texts, one on each line or JSON lines with a text: who else reads the rows.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="New page that shows everything.")] = None,
    png: Annotated[Path | None, typer.Option(help="New picture of the text, coloured by the gates.")] = None,
    as_json: _Json = False,
    placement: _Placement = "auto",
    overwrite: _Overwrite = False,
) -> None:
    """Show where a text opens the gates, what was added there, and which rows were read.

    Example: engram inspect my-graft --text "Diana, Princess of Wales" --html reads.html
    """
    from .corpus_use import CorpusNgrams, sharers
    from .page import reads_page
    from .text_reads import read_text

    if (text is None) == (file is None):
        raise ValueError("give either --text or --file.")
    for new in (html, png):
        if new is not None:
            check_new_file(new, overwrite)
    text = file.read_text(encoding="utf-8") if text is None else text
    told = None if corpus is None else _texts(corpus)
    loaded, tokenizer = _load(model, placement)
    reads = read_text(loaded, tokenizer, text)
    shared = None
    if told is not None:
        with progress.status(f"reading {escape(visible(str(corpus)))}"):
            shared = sharers(CorpusNgrams(loaded, tokenizer, told), reads)
    if html is not None:
        html.write_text(reads_page(reads, shared), encoding="utf-8")
    if png is not None:
        from .pictures import save_reads_picture

        save_reads_picture(reads, png)
    if as_json:
        held = {" ".join(map(str, row)): ngrams for row, ngrams in (shared or {}).items()}
        print(json.dumps({**reads.to_dict(), "sharers": held}))
    elif html is None and png is None:
        result.print(_reads_table(reads))
    for new in (html, png):
        if new is not None:
            print(visible(str(new)))


def _reads_table(reads) -> Table:
    """Returns a row for each token: gate and norm of what was added, by layer, and the rows that hold something."""
    table = Table("token", *(f"layer {layer}: gate, added, rows with values" for layer in reads.layer_ids))
    for place, token in enumerate(reads.tokens):
        cells = []
        for number in range(len(reads.layer_ids)):
            gates = " ".join(f"{gate:.2f}" for gate in reads.gates[number, place].tolist())
            added = " ".join(f"{norm:.2f}" for norm in reads.added[number, place].tolist())
            filled = reads.filled[number, place]
            cells.append(f"{gates}  {added}  {int(filled.sum())}/{filled.numel()}")
        marks = "".join(f" [{pack}]" for pack, _ in reads.records[place])
        table.add_row(Text(visible(token) + visible(marks)), *cells)
    return table


def lookup(
    model: _Model,
    text: Annotated[str, typer.Argument(help="The n-grams that end with this text are looked up.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Texts, one on each line or JSON lines with a text: who else reads the rows.")
    ] = None,
    as_json: _Json = False,
    placement: _Placement = "auto",
) -> None:
    """Show the rows and records of an n-gram, the rows most like them, and what they do to the next token.

    Example: engram lookup my-graft "Princess of Wales"
    """
    from .corpus_use import CorpusNgrams
    from .lookup import look_up

    told = None if corpus is None else _texts(corpus)
    loaded, tokenizer = _load(model, placement)
    with progress.status("looking it up"):
        held = None if told is None else CorpusNgrams(loaded, tokenizer, told)
        found = look_up(loaded, tokenizer, text, held)
    if as_json:
        rows = [vars(row) for row in found.rows]
        print(json.dumps({"rows": rows, "next_tokens": found.next_tokens, "kl": found.kl}))
        return
    table = Table("layer", "order", "n-gram", "head", "row", "norm", "most like it (cosine)", "in the corpus")
    last = len(found.reads.tokens) - 1
    for row in found.rows:
        near = ", ".join(f"{other} ({cosine:.2f})" for other, cosine in row.neighbours)
        ngram = Text(visible(found.reads.ngram(last, row.order)))
        numbers = str(row.head), str(row.row), f"{row.norm:.3f}"
        table.add_row(str(row.layer), str(row.order), ngram, *numbers, near, Text(visible(" | ".join(row.sharers))))
    result.print(table)
    for pack, ngram in found.reads.records[-1]:
        result.print(Text(f"record of {visible(pack)} for the classes {ngram}"))
    for name, tokens in found.next_tokens.items():
        words = ", ".join(f"{word!r} {probability:.1%}" for word, probability in tokens)
        kl = f" (KL {found.kl[name]:.4f})" if name in found.kl else ""
        result.print(Text(f"next token {name}: {visible(words)}{kl}"))


def occupancy(
    model: _Model,
    corpus: Annotated[Path, typer.Argument(help="Texts, one on each line, or JSON lines with a text.")],
    png: Annotated[Path | None, typer.Option(help="New picture: reads by rank, and shared rows.")] = None,
    as_json: _Json = False,
    hot: Annotated[int, typer.Option(min=0, help="Most frequent rows to name, for each layer and order.")] = 5,
    overwrite: _Overwrite = False,
) -> None:
    """Show how a corpus uses the rows: occupancy, n-grams that share rows, and the most frequent rows.

    No table is loaded. Example: engram occupancy my-graft corpus.txt --png use.png
    """
    from .corpus_use import CorpusNgrams, row_use

    if png is not None:
        check_new_file(png, overwrite)
    told = _texts(corpus)
    loaded, tokenizer = _load(model, "none")
    with progress.status(f"reading {escape(visible(str(corpus)))}"):
        use = row_use(CorpusNgrams(loaded, tokenizer, told), hot)
    if png is not None:
        from .pictures import save_use_picture

        save_use_picture(use, png)
    if as_json:
        print(json.dumps(use))
        return
    table = Table("layer", "order", "n-grams", "rows", "occupied", "most on a row", "alone in all heads", "in none")
    for one in use:
        shares = f"{one['collide'][0]:.1%}", f"{one['collide'][-1]:.1%}"
        counts = f"{one['ngrams']:,}", f"{one['rows']:,}", f"{one['occupancy']:.1%}", f"{one['most_ngrams']:,}"
        table.add_row(str(one["layer"]), str(one["order"]), *counts, *shares)
    result.print(table)
    for one in use:
        for row in one["hot"]:
            where = f"layer {one['layer']}, order {one['order']}, head {row['head']}, row {row['row']}"
            result.print(Text(f"{where}: {row['reads']:,} reads: " + visible(" | ".join(row["ngrams"]))))
    if png is not None:
        print(visible(str(png)))


def ablate(
    model: _Model,
    texts: Annotated[Path, typer.Argument(help="Texts, one on each line, or JSON lines with a text.")],
    seed: Annotated[int, typer.Option(help="Of the permutation, and of the n-gram whose row all get.")] = 0,
    as_json: _Json = False,
    placement: _Placement = "auto",
) -> None:
    """Print what the loss of texts becomes without the memory, with one layer alone, with other rows or gates.

    Example: engram ablate my-graft texts.txt
    """
    from .ablation import ablate as ablated
    from .ablation import ablation_lines

    told = _texts(texts)
    loaded, tokenizer = _load(model, placement)
    with progress.status(f"measuring {len(told)} texts"):
        found = ablated(loaded, tokenizer, told, seed)
    if as_json:
        print(json.dumps(found))
        return
    for line in ablation_lines(found):
        print(line)


def depth(
    model: _Model,
    texts: Annotated[Path, typer.Argument(help="Texts, one on each line, or JSON lines with a text.")],
    as_json: _Json = False,
    placement: _Placement = "auto",
) -> None:
    """Print how soon layers predict what the last one does, with the memory and without it.

    The last column says to which layer without the memory each layer with it is most alike, at the last token of each
    text (names and set phrases are good texts). Example: engram depth my-graft texts.txt
    """
    from .depth import cka_map, depth_lines, layer_states, logit_lens, soft_alignment

    told = _texts(texts)
    loaded, tokenizer = _load(model, placement)
    with progress.status(f"measuring {len(told)} texts"):
        kl = {"with the memory": logit_lens(loaded, tokenizer, told)}
        with loaded.disable_memory():
            kl["without"] = logit_lens(loaded, tokenizer, told)
        off = layer_states(loaded, tokenizer, told, loaded.disable_memory)
        alike = cka_map(off, layer_states(loaded, tokenizer, told))
    alignment = soft_alignment(alike)
    if as_json:
        lenses = {name: values.tolist() for name, values in kl.items()}
        print(json.dumps({"kl": lenses, "cka": alike.tolist(), "alignment": alignment.tolist()}))
        return
    for line in depth_lines(kl, alignment):
        print(line)


VERBS = tuple(user_errors(verb) for verb in (inspect, lookup, occupancy, ablate, depth))
