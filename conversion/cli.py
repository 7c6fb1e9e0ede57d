"""The `engram` command: every verb calls the library and contains no logic.

Promises: progress and errors on stderr, results on stdout; exit code 0 for success, 1 if a check found something wrong,
2 if the command could not be carried out; never a traceback for a user's mistake.
"""

import inspect
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..configuration import PRESETS
from ..inspection.inspect_commands import VERBS as INSPECT_VERBS
from ..knowledge_pack_engram import SUFFIX
from ..serving.serve_command import serve
from .budget_commands import budget
from .cast_commands import cast
from .foreign_commands import export_foreign, import_foreign
from .hub_commands import card, publish
from .pack_commands import app as pack_app
from .recipe_commands import recipes
from .recipes import ENDINGS, graft_arguments, read_recipe
from .surgery_commands import VERBS as SURGERY
from .terminal import check_new_file, load_tokenizer, progress, result, user_errors, visible


app = typer.Typer(
    help="Engram memories for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pack_app, name="pack")
app.command()(serve)
for verb in INSPECT_VERBS:
    app.command()(verb)
app.command("import")(import_foreign)
app.command("export")(export_foreign)
app.command()(cast)
for verb in SURGERY:
    app.command()(verb)
app.command()(recipes)
app.command()(budget)
app.command()(card)
app.command()(publish)


@app.callback()
def engram() -> None:
    """Keeps `engram VERB` even with a single verb."""


def integers(text: str | None, option: str) -> list[int] | None:
    """Parses a list such as "1,10"."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be integers separated by commas, such as 1,10.") from error


def pack_file(out: Path, name: str | None, facts: Path) -> Path:
    """Returns the file of a new pack: `out` itself, or a file in the folder `out`."""
    if out.name.endswith(SUFFIX):
        if name is not None:
            raise ValueError(f"--name {name!r} is for a folder, and '{out}' names the file already: leave one out.")
        return out
    name = facts.name.split(".")[0] if name is None else name
    if not name or Path(name).name != name:
        raise ValueError(f"--name {name!r} must be a name without folders, such as people.")
    return out / f"{name}{SUFFIX}"


def check_device(name: str) -> None:
    """Raises ValueError for a device that is not there."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here ({error}): give another one, such as cpu.") from error


_Donor = Annotated[str, typer.Argument(help="Folder or Hub id of a model, or a recipe (.yaml) that names one.")]


def _donor_options(
    layer_ids: Annotated[str | None, typer.Option(help="Layers that read, counted from 0, such as 1,10.")] = None,
    vocab_size: Annotated[
        str | None,
        typer.Option(help="Least rows of a head, or one number for each order; from the donor's size if left out."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Sizes of a known memory: {', '.join(PRESETS)}.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Values in a row.")] = None,
    n_heads: Annotated[int | None, typer.Option(help="Heads for each order.")] = None,
    max_ngram_size: Annotated[int | None, typer.Option(help="Longest n-gram.")] = None,
    kernel_size: Annotated[int | None, typer.Option(help="Kernel size of the convolution; 0 for none.")] = None,
    gate: Annotated[str | None, typer.Option(help="signed_sqrt, signed_sqrt_or_zero or sigmoid.")] = None,
    table_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, int8 or float8_e4m3fn.")] = None,
    table_parts: Annotated[int | None, typer.Option(help="Parameters for each layer and order.")] = None,
    pad_token_id: Annotated[int | None, typer.Option(help="Id that stands for nothing.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the hash and of the fresh dense weights.")] = None,
    init: Annotated[
        str | None, typer.Option(help="What rows start from: zero, normal, embeddings or corpus; zero if left out.")
    ] = None,
    init_text: Annotated[
        Path | None,
        typer.Option(
            help="Text in UTF-8 whose n-grams embeddings and corpus are for, or over which --init-from is re-addressed."
        ),
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(help="Size of the rows' values; 0.02 for normal, 0.1 for a text if left out.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Folder of another memory, whose table the graft begins with.")
    ] = None,
    init_reader: Annotated[
        bool | None, typer.Option("--init-reader", help="Take that memory's projections too.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id, if the donor has no tokenizer.")] = None,
    text_only: Annotated[
        bool | None,
        typer.Option(
            "--text-only/--whole",
            help="Of a model that also reads images: its text model alone, or the whole; as AutoModelForCausalLM does "
            "if left out.",
        ),
    ] = None,
    max_memory_shard_size: Annotated[str | None, typer.Option(help="Largest memory file; 8GB if left out.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the tokenizer brings.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a donor on the Hub.")] = None,
    token: Annotated[str | None, typer.Option(help="For a private donor, if you are not logged in.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repository the donor is.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
) -> None:
    """Options of `graft` and `plan`, with the names of `EngramConfig` without `engram_`."""


def _takes_donor_options(verb):
    """Gives a verb the options of `_donor_options`, which it gets as keyword arguments."""
    own, shared = inspect.signature(verb), inspect.signature(_donor_options)
    kept = [value for value in own.parameters.values() if value.kind is not inspect.Parameter.VAR_KEYWORD]
    verb.__signature__ = own.replace(parameters=[*kept, *shared.parameters.values()])
    verb.__annotations__ = {**verb.__annotations__, **_donor_options.__annotations__}
    return verb


def _graft_arguments(donor: str, trust_remote_code: bool, token: str | None, cache_dir: Path | None, **options) -> dict:
    """Returns the arguments of `graft` from a recipe or a donor; options that are given go before a recipe's."""
    if sizes := integers(options.pop("vocab_size"), "--vocab-size"):
        options["vocab_size"] = sizes[0] if len(sizes) == 1 else sizes
    options["layer_ids"] = integers(options.pop("layer_ids"), "--layer-ids")
    given = {name: value for name, value in options.items() if value is not None}
    recipe = read_recipe(donor) if donor.endswith(ENDINGS) else {"donor": donor}
    run = {"trust_remote_code": trust_remote_code, "token": token, "cache_dir": cache_dir}
    return graft_arguments(recipe | given) | run


@app.command()
@user_errors
@_takes_donor_options
def graft(
    donor: _Donor,
    out: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    digests: Annotated[bool, typer.Option(help="Write SHA-256 of all files into the receipt.")] = True,
    **options,
) -> None:
    """Give a model a fresh memory; its answers stay the same until the memory is trained.

    Options have the names of `EngramConfig` without `engram_`, and so has a recipe. A run that was killed goes on when
    the same command is given again. For example: engram graft HuggingFaceTB/SmolLM2-135M-Instruct my-graft
    """
    from .graft import graft as graft_donor

    arguments = _graft_arguments(donor, **options)
    progress.print(f"grafting {escape(visible(donor))}", highlight=False)
    folder = graft_donor(out=out, digests=digests, **arguments)
    files = list(folder.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    blocks = [getattr(f.stat(), "st_blocks", None) for f in files]  # Windows does not count them
    taken = "" if None in blocks else f" ({sum(blocks) * 512:,} on disk)"
    progress.print(f"{len(files)} weight files, {size:,} bytes{taken}", highlight=False)
    print(folder)


@app.command()
@user_errors
@_takes_donor_options
def plan(donor: _Donor, **options) -> None:
    """Print what `graft` would read, write and need with the same options; no weight is read or downloaded."""
    from .plan import plan_graft

    arguments = _graft_arguments(donor, **options)
    with progress.status(f"planning {donor}"):
        planned = plan_graft(**arguments)
    for line in planned.lines():
        print(visible(line))


@app.command()
@user_errors
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an Engram checkpoint.")],
    tokenizer: Annotated[str | None, typer.Option(help="Check this tokenizer in place of the checkpoint's.")] = None,
    generation: Annotated[bool, typer.Option(help="Load the model and run it in every way of generating.")] = True,
) -> None:
    """Check a checkpoint's files, hash constants and tokenizer, and that it generates exactly in every way."""
    from ..inspection import verify_checkpoint

    with progress.status(f"verifying {checkpoint}"):
        findings = verify_checkpoint(checkpoint, tokenizer, generation=generation)
    table = Table("section", "result", "detail")
    for finding in findings:
        table.add_row(finding.section, "[green]ok[/green]" if finding.ok else "[red]wrong[/red]", finding.detail)
    for report in (finding.report for finding in findings if finding.report is not None):
        result.print(report.table())
    result.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
@user_errors
def teach(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an Engram checkpoint.")],
    facts: Annotated[Path, typer.Argument(help="JSON lines of facts; docs/packs.md has the layouts.")],
    out: Annotated[Path, typer.Argument(help=f"New file whose name ends with {SUFFIX}, or a folder for it.")],
    name: Annotated[
        str | None, typer.Option(help="The pack's name, if OUT is a folder; that of FACTS if left out.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="General text in UTF-8, besides the package's; n-grams that it holds get no record."),
    ] = None,
    method: Annotated[str, typer.Option(help="train or solve; docs/packs.md says when to use which.")] = "train",
    unseen: Annotated[
        Path | None, typer.Option(help="The same facts in other phrasings, for the report; they are not taught.")
    ] = None,
    expressions: Annotated[
        int, typer.Option(min=0, help="Texts that the model itself writes for each fact in addition.")
    ] = 0,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Passes without a lower loss of --unseen, after which teaching ends.")
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="How often each text is read.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam, over the records.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of texts.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace a pack that is there.")] = False,
) -> None:
    """Write a knowledge pack of facts; the model is not changed.

    Options have the names of the arguments of `model.teach`.
    """
    from .. import EngramForCausalLM
    from ..training import general_english, read_facts, read_lines, report_lines
    from ..training.teaching import check_method

    file = pack_file(out, name, facts)
    check_new_file(file, overwrite)
    read = read_facts(facts)
    lines = general_english() + [line for path in reference or () for line in read_lines(path)]
    asked = [] if unseen is None else read_facts(unseen)
    check_method(method, patience, asked)
    check_device(device)
    given = {"passes": passes, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    given |= {"method": method, "patience": patience}
    tokenizer = load_tokenizer(model)
    with progress.status(f"loading {escape(visible(model))}"):
        loaded = EngramForCausalLM.from_pretrained(model).to(device)
    options = {option: value for option, value in given.items() if value is not None}
    pack = loaded.teach(read, tokenizer, unseen=asked, expressions=expressions, reference_texts=lines, **options)
    pack.save(file)
    for line in report_lines(pack.provenance["report"]):
        progress.print(line, highlight=False, soft_wrap=True)
    print(visible(str(file)))


def main() -> None:
    """Entry point of the `engram` command."""
    app()
