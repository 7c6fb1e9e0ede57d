"""One text's reads as a page: self-contained HTML, coloured by the gate.

Promises: what comes from the text or a corpus enters the page as text and never as markup; the page runs no script but
its own and asks the network for nothing (its content security policy forbids both). Never loads a model.
Source: docs/inspection.md.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .text_reads import TextReads


_HERE = Path(__file__).parent


def reads_page(reads: TextReads, shared: Mapping[tuple[int, int, int], list[str]] | None = None) -> str:
    """Returns a page that shows what a text read.

    Args:
        reads ([`TextReads`]): from [`read_text`].
        shared (`dict`, *optional*): from [`sharers`]: who else reads the rows.

    Example:

    ```python
    >>> Path("reads.html").write_text(reads_page(read_text(model, tokenizer, "Alexander the Great")), encoding="utf-8")
    ```"""
    parts = {name: (_HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    values = {
        "policy": f"default-src 'none'; style-src {_digest(parts['css'])}; script-src {_digest(parts['js'])}; "
        "base-uri 'none'; form-action 'none'",
        "style": parts["css"],
        "data": json_in_page(_page_data(reads, shared)),
        "script": parts["js"],
    }
    before, *rest = parts["html"].split("{{ ")
    page = [before]
    for piece in rest:  # in one pass, so that what a value holds is never taken for a place
        name, after = piece.split(" }}", 1)
        page += [values[name], after]
    return "".join(page)


def json_in_page(value: object) -> str:
    """Returns JSON that ends no element of a page: `<`, `>`, `&` and line separators are escaped."""
    told = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        told = told.replace(character, f"\\u{ord(character):04x}")
    return told


def _digest(source: str) -> str:
    """Returns the source expression by which a content security policy allows an inline element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _page_data(reads: TextReads, shared: Mapping[tuple[int, int, int], list[str]] | None) -> dict:
    """Returns what the page's script reads; every n-gram of a corpus is written once."""
    data = reads.to_dict()
    data["filled"] = [
        [["".join(map(str, heads)) for heads in orders] for orders in tokens] for tokens in data["filled"]
    ]
    data["records"] = [[(pack, str(ngram)) for pack, ngram in found] for found in reads.records]
    ngrams: dict[str, int] = {}
    data["sharers"] = {
        f"{layer} {order} {row}": [ngrams.setdefault(ngram, len(ngrams)) for ngram in found]
        for (layer, order, row), found in (shared or {}).items()
    }
    return {**data, "ngrams": list(ngrams), "has_corpus": shared is not None}
