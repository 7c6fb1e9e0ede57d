"""Pictures of what a text reads and of how a corpus uses rows; needs matplotlib (the extra "demo").

Promises: figures show the numbers that they are given, and nothing is smoothed. Never loads a model.
Source: docs/inspection.md.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from .text_reads import TextReads


COLUMNS = 96  # characters on a line
BLUES = "Blues"


def _pyplot():
    """Returns matplotlib without a window."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "engram-transformers[demo]".') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _placed(tokens: Iterable[str]) -> list[tuple[int, int, str]]:
    """Returns line, column and text of each token, broken into lines of fixed-width characters."""
    line = column = 0
    placed = []
    for token in tokens:
        shown = "".join(c if c.isprintable() else " " for c in token)
        if column and column + len(shown) > COLUMNS:
            line, column, shown = line + 1, 0, shown.lstrip()
        placed.append((line, column, shown[:COLUMNS]))
        column += len(shown[:COLUMNS])
    return placed


def save_reads_picture(reads: TextReads, path: str | Path, stream: int = 0) -> None:
    """Writes a picture of a text, coloured by the gate of each Engram layer.

    Args:
        reads ([`TextReads`]): from [`read_text`].
        path (`str` or `Path`): the new file; its ending chooses the format, such as .png.
        stream (`int`, *optional*, defaults to 0): residual stream whose gates are shown.
    """
    pyplot = _pyplot()
    placed = _placed(reads.tokens)
    lines = placed[-1][0] + 1
    height = len(reads.layer_ids) * (0.27 * lines + 0.55)
    figure, axes = pyplot.subplots(len(reads.layer_ids), 1, figsize=(11, height), squeeze=False, layout="constrained")
    colours = pyplot.get_cmap(BLUES)
    for axis, layer, gates in zip(axes[:, 0], reads.layer_ids, reads.gates[:, :, stream].tolist(), strict=True):
        for (line, column, shown), gate in zip(placed, gates, strict=True):
            box = pyplot.Rectangle((column, line), len(shown), 0.9, color=colours(0.8 * gate), linewidth=0)
            axis.add_patch(box)
            for place, character in enumerate(shown):
                given = {"family": "DejaVu Sans Mono", "fontsize": 9, "ha": "center", "va": "center"}
                # A dollar sign would begin a formula.
                axis.text(column + place + 0.5, line + 0.45, character.replace("$", r"\$"), **given)
        axis.set(xlim=(0, COLUMNS), ylim=(lines, 0), title=f"layer {layer}: gate from 0 (white) to 1 (blue)")
        axis.axis("off")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_use_picture(use: Iterable[Mapping], path: str | Path) -> None:
    """Writes a picture of how often rows are read, by rank, and of how many heads an n-gram shares.

    Args:
        use (`list[dict]`): from [`row_use`].
        path (`str` or `Path`): the new file.
    """
    pyplot = _pyplot()
    figure, (reads, collide) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for one in use:
        name = f"layer {one['layer']}, order {one['order']}"
        reads.loglog(list(one["reads"]), list(one["reads"].values()), marker=".", label=name)
        collide.plot(range(len(one["collide"])), one["collide"], marker=".", label=name)
    reads.set(title="Reads of a row", xlabel="rank of the row", ylabel="reads in the corpus")
    collide.set(title="N-grams that are not alone", xlabel="heads with another n-gram", ylabel="share of n-grams")
    collide.set_ylim(0, 1)
    reads.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
