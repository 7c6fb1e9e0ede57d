"""One type of model: built at a tiny random size, given a memory, and checked; what came of it is a row.

Promises: an outcome is one of `OUTCOMES`, and what is not exact says why. The control is the plain backbone, in the
same process: it runs before the graft, and in every mode that is not exact.
"""

import resource
import tempfile
import textwrap
import traceback
from dataclasses import dataclass, field

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engram_transformers import EngramForCausalLM
from engram_transformers.inspection import GenerationReport, check_generation
from tests.integration.backbones import unmapped
from tests.tiny import GOLDEN, fill_memory

from .configurations import tiny_configuration


MODES = ("greedy", "beams", "left padding", "static cache", "chunks", "continued cache", "copied cache")
OUTCOMES = {
    "exact": "exact in every way that the plain backbone offers",
    "backbone's": "exact but for ways in which the plain backbone differs from itself (`b`)",
    "refused": "refused by `from_backbone`, with an error that says why",
    "plain fails": "the plain backbone does not run",
    "not built": "a tiny model could not be made here",
    "fails": "wrong, or an error that does not say why",
}
FIELDS = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
MOST_SAID = 320  # characters
CLEAR = (ValueError, TypeError, RuntimeError, NotImplementedError)


@dataclass
class Row:
    """What came of a type.

    Args:
        type (`str`): the model type.
        outcome (`str`): a key of `OUTCOMES`.
        model (`str`): name of the backbone's class.
        modes (`dict[str, str]`): statuses of `check_generation`, by mode.
        said (`str`): why it is not exact.
        transformers (`str`): the version.
    """

    type: str
    outcome: str
    model: str = ""
    modes: dict[str, str] = field(default_factory=dict)
    said: str = ""
    transformers: str = ""


def send_row(model_type: str, sender, most_bytes: int) -> None:
    """Checks a type in a process of its own, which may not take more than `most_bytes`."""
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(checked(model_type))


def _in_one_line(said: str | Exception) -> str:
    """Returns the beginning of an error."""
    text = said if isinstance(said, str) else f"{type(said).__name__}: {said}"
    return textwrap.shorten(text, MOST_SAID, placeholder=" ...")


def _on_purpose(error: BaseException) -> bool:
    """Whether this package raised an error on purpose."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, CLEAR) and frame.f_globals["__name__"].startswith("engram_transformers.")


def checked(model_type: str) -> Row:
    """Builds a type and checks it with a memory."""
    row = Row(model_type, "not built")
    try:
        torch.manual_seed(0)
        donor = AutoModelForCausalLM.from_config(tiny_configuration(model_type)).eval()
        row.model, row.outcome = type(donor).__name__, "plain fails"
        ids = torch.randint(3, 4000, (2, 12))
        with torch.no_grad():
            plain = donor(ids, use_cache=False).logits
        if not plain.isfinite().all():
            raise ArithmeticError("its logits are not finite")
    except Exception as error:  # noqa: BLE001 - another package raises anything
        row.said = _in_one_line(error)
        return row
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    try:
        model = EngramForCausalLM.from_backbone(donor, tokenizer, [0, 1], **FIELDS)
    except Exception as error:  # noqa: BLE001
        row.outcome, row.said = "refused" if _on_purpose(error) else "fails", _in_one_line(error)
        return row
    try:
        _check_memory(row, fill_memory(model), ids, plain)
    except Exception as error:  # noqa: BLE001
        row.outcome, row.said = "fails", _in_one_line(error)
    return row


@torch.no_grad()
def _check_memory(row: Row, model: EngramForCausalLM, ids: torch.Tensor, plain: torch.Tensor) -> None:
    """Checks a memory and fills in the row.

    Args:
        ids (`torch.LongTensor` of shape `(batch, length)`): texts without pads.
        plain (`torch.Tensor` of shape `(batch, length, vocabulary)`): the backbone's logits.
    """
    with model.disable_memory():
        disabled = model(ids, use_cache=False).logits
    report = check_generation(model, modes=MODES)
    loaded = unmapped(_saved_and_loaded(model))
    logits = unmapped(model)(ids, use_cache=False).logits
    row.modes = {result.mode: result.status for result in report.results}
    problems = {
        ", ".join(f"{result.mode}: {result.detail or result.difference}" for result in report.wrong): not report.ok,
        "the memory changes nothing": torch.allclose(logits, plain, atol=1e-2),
        "with its memory disabled, it differs from the plain backbone": not torch.equal(disabled, plain),
        "saved and loaded, it gives other logits": not torch.equal(loaded(ids, use_cache=False).logits, logits),
    }
    if any(problems.values()):
        row.outcome, row.said = "fails", "; ".join(said for said, is_so in problems.items() if is_so)
        return
    row.outcome = "backbone's" if "backbone's" in row.modes.values() else "exact"
    row.said = "; ".join(f"{said} ({', '.join(modes)})" for said, modes in _refusals(report).items())


def _refusals(report: GenerationReport) -> dict[str, list[str]]:
    """Returns the errors of modes that are refused, with those modes."""
    found = {}
    for result in report.results:
        if result.status == "refused":
            found.setdefault(_in_one_line(result.detail), []).append(result.mode)
    return found


def _saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model from the checkpoint that it makes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()
