"""Checks whether a model with a memory is exact in every mode of running it.

Every mode of `modes.py` is run on the user's model. Its logits are compared with those of the same texts read at once,
one by one, without a cache and without pads, and its tokens with those chosen without a cache. Where they differ, the
plain backbone runs the same way; twice its own difference is allowed. Rounding is measured: the same text is read at
once with the last bit of its embeddings changed.
Promises: a result is exact, explained by rounding or by the backbone, refused by an error, or wrong; a memory that adds
nothing yet is replaced by a random one, because any history would pass with it. Never leaves a changed model, and never
writes a file.
Source: docs/generation.md.
"""

import copy
import io
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_engram import EngramForCausalLM
from .modes import MODES, SEED, Mode, Reading, Subject


# Largest difference of logits that counts as exact.
TOLERANCE = 1e-5

# A larger one is rounding up to this many times the effect of one-bit changes of the embeddings.
ROUNDINGS = 4

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning the Universe was created. This has made a lot of people very angry.",
    "def main():\n    print('hello, world')\n",
)


@dataclass(frozen=True)
class ModeResult:
    """Result of one mode.

    Args:
        mode (`str`): its name.
        status (`str`): "exact"; "rounding" where it differs no more than reading at once does after one-bit changes of
            the embeddings; "backbone's" where it differs no more than twice as much as the plain backbone does;
            "refused" by an error; "not run"; or "wrong".
        difference (`float`, *optional*): largest difference of a logit from reading at once.
        backbone_difference (`float`, *optional*): the plain backbone's, where it was run.
        tokens_equal (`bool`, *optional*): whether the same tokens were chosen; None where none are chosen.
        detail (`str`): the error, or why it was not run.
    """

    mode: str
    status: str
    difference: float | None = None
    backbone_difference: float | None = None
    tokens_equal: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class GenerationReport:
    """Results of all modes; prints as a table.

    Args:
        results (`list[ModeResult]`): in the order of the modes.
        stood_in (`bool`): whether the memory added nothing and was replaced by random rows.
    """

    results: list[ModeResult]
    stood_in: bool

    @property
    def ok(self) -> bool:
        """Whether no mode is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> list[ModeResult]:
        """The wrong results."""
        return [result for result in self.results if result.status == "wrong"]

    def summary(self) -> str:
        """Returns the counts of the statuses, in one line."""
        counts = {}
        for result in self.results:
            counts[result.status] = counts.get(result.status, 0) + 1
        memory = "; the memory adds nothing to the prompts, random rows stood in for it" if self.stood_in else ""
        return ", ".join(f"{count} {status}" for status, count in counts.items()) + memory

    def table(self) -> Table:
        """Returns the report as a table for a terminal."""
        table = Table("mode", "result", "largest logit difference", "plain backbone's", "tokens equal", "detail")
        for result in self.results:
            numbers = ["" if x is None else f"{x:.1e}" for x in (result.difference, result.backbone_difference)]
            tokens = {None: "", True: "yes", False: "no"}[result.tokens_equal]
            table.add_row(result.mode, result.status, *numbers, tokens, result.detail.split("\n")[0][:80])
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.table())
        return text.getvalue() + self.summary()


@torch.no_grad()
def check_generation(
    model: EngramForCausalLM, tokenizer=None, *, new_tokens: int = 4, modes: Iterable[str] | None = None
) -> GenerationReport:
    """Runs a model in every mode of generating and compares each with reading at once.

    Args:
        model ([`EngramForCausalLM`]): in memory; set to evaluation mode meanwhile.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): makes the prompts; random ids if None.
        new_tokens (`int`, *optional*, defaults to 4): tokens to generate from each prompt.
        modes (iterable of `str`, *optional*): names of the modes to run; all if None.

    Returns:
        [`GenerationReport`]

    Raises:
        `TypeError`: if the model is not an Engram model with a language-model head.
        `ValueError`: for an unknown mode.

    Example:

    ```python
    >>> from engram_transformers.inspection import check_generation

    >>> report = check_generation(model, tokenizer)
    >>> report.ok
    True
    >>> print(report)
    ```"""
    if not isinstance(model, EngramForCausalLM):
        raise TypeError(f"check_generation takes an EngramForCausalLM, got {type(model).__name__}.")
    chosen = _chosen_modes(modes)
    prompts = [prompt.to(model.device) for prompt in make_prompts(model, tokenizer)]
    with ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        memory = _adds_something(model, prompts)
        if not memory:
            stack.enter_context(_stand_in_memory(model))
        subject, control = (
            Subject(lm, prompts, new_tokens, pad_id(model), lm is model, model.backbone)
            for lm in (model, model.backbone)
        )
        return GenerationReport([_run_mode(mode, subject, control) for mode in chosen], stood_in=not memory)


def _chosen_modes(names: Iterable[str] | None) -> list[Mode]:
    """Returns modes by their names."""
    if names is None:
        return MODES
    known = {mode.name: mode for mode in MODES}
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown modes {unknown}; there are {list(known)}.")
    return [known[name] for name in names]


def _run_mode(mode: Mode, subject: Subject, control: Subject) -> ModeResult:
    """Runs one mode on the model and, if that is not exact, on its plain backbone."""
    if mode.device is not None and subject.model.device.type != mode.device:
        return ModeResult(mode.name, "not run", detail=f"the model is not on a {mode.device} device")
    if mode.refused is not None:
        return declined(mode, subject)
    try:
        ours = compare(mode, subject)
    except NotImplementedError as error:  # refused for this backbone
        return ModeResult(mode.name, "refused", detail=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - backbones raise anything for a mode that they do not support
        detail = f"{type(error).__name__}: {error}"
        try:
            compare(mode, control)
        except Exception:  # noqa: BLE001
            return ModeResult(mode.name, "refused", detail=detail)
        return ModeResult(mode.name, "wrong", detail=f"the plain backbone does this, but here {detail}")
    if ours.tokens_equal is not False and ours.status is not None:
        return ModeResult(mode.name, ours.status, ours.difference, None, ours.tokens_equal)
    try:
        plain = compare(mode, control)
    except Exception as error:  # noqa: BLE001
        detail = f"the plain backbone raises {type(error).__name__}: {error}"
        return ModeResult(mode.name, "wrong", ours.difference, None, ours.tokens_equal, detail)
    close = ours.status is not None or ours.difference <= 2 * plain.difference
    # Where logits differ as much as the plain backbone's, the plain one may have chosen the same tokens by chance.
    chosen = ours.tokens_equal is not False or plain.tokens_equal is False or ours.gap <= 2 * ours.difference
    status = "backbone's" if close and chosen else "wrong"
    return ModeResult(mode.name, status, ours.difference, plain.difference, ours.tokens_equal)


def declined(mode: Mode, subject: Subject) -> ModeResult:
    """Returns the result of a mode that Engram refuses by design."""
    try:
        mode.run(subject)
    except mode.refused as error:
        return ModeResult(mode.name, "refused", detail=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001
        return ModeResult(mode.name, "wrong", detail=f"{type(error).__name__}: {error}")
    return ModeResult(mode.name, "wrong", detail="it should have been declined")


@dataclass(frozen=True)
class Comparison:
    """Comparison of a mode with reading at once.

    Args:
        difference (`float`): largest difference of a logit.
        status (`str`, *optional*): "exact" or "rounding"; None where the difference is too large for either.
        tokens_equal (`bool`, *optional*): whether the expected tokens were chosen; None where none are.
        gap (`float`): how far apart the logits are, read at once, of the first tokens that are not as expected.
    """

    difference: float
    status: str | None
    tokens_equal: bool | None
    gap: float


def compare(mode: Mode, subject: Subject) -> Comparison:
    """Runs a mode, and reads its texts at once."""
    readings = mode.run(subject)
    at_once = [subject.read(reading.text[None])[0] for reading in readings]  # (length, vocabulary) each
    differences = [
        float((reading.logits.float() - logits[reading.first :][: len(reading.logits)].float()).abs().max())
        for reading, logits in zip(readings, at_once, strict=True)
    ]
    large = [(d, reading.text) for d, reading in zip(differences, readings, strict=True) if not d <= TOLERANCE]
    status = "rounding" if large else "exact"
    if any(not difference <= ROUNDINGS * subject.rounding(text) for difference, text in large):
        status = None
    tokens_equal, gap = None, 0.0
    if mode.expect is not None:
        triples = zip(readings, mode.expect(subject), at_once, strict=True)
        gaps = [(_choice_gap(ours, theirs, logits), ours.text) for ours, theirs, logits in triples]
        gap = max(gap for gap, _ in gaps)
        tokens_equal = all(not gap or gap <= max(TOLERANCE, ROUNDINGS * subject.rounding(text)) for gap, text in gaps)
    return Comparison(max(differences), status, tokens_equal, gap)


def _choice_gap(ours: Reading, theirs: Reading, logits: torch.Tensor) -> float:
    """Returns how far apart the logits of the first tokens are in which two texts differ; 0 for the same text."""
    differ = torch.nonzero(ours.text != theirs.text).flatten()
    if len(differ) == 0:
        return 0.0
    first = int(differ[0])
    one, other = (logits[first - 1, text[first]] for text in (ours.text, theirs.text))
    return abs(float(one - other))


def make_prompts(model: EngramForCausalLM, tokenizer) -> list[torch.Tensor]:
    """Returns three short prompts of different lengths, as ids."""
    if tokenizer is not None:
        return [torch.tensor(tokenizer(prompt)["input_ids"], device="cpu") for prompt in PROMPTS]
    token_map = model.memory.hashing.token_map.cpu()
    text = torch.nonzero(token_map >= 0).flatten()  # (ids that are text,)
    generator = torch.Generator().manual_seed(SEED)
    return [text[torch.randint(len(text), (length,), generator=generator, device="cpu")] for length in (12, 9, 17)]


def pad_id(model: EngramForCausalLM) -> int:
    """Returns a token for padding batches; it is masked, so any will do."""
    pad = getattr(model.config.text_config.get_text_config(), "pad_token_id", None)  # codegen has no such field
    return model.config.engram_pad_token_id if pad is None or pad < 0 else pad


def _adds_something(model: EngramForCausalLM, prompts: list[torch.Tensor]) -> bool:
    """Whether the memory changes any logit, and its convolution, if any, is not zero."""
    if any(layer.kernel_size and not bool(layer.conv.any()) for layer in model.memory.layers.values()):
        return False
    ids = prompts[0][None]
    return float((model(ids).logits - model.backbone(ids).logits).abs().max()) > 100 * TOLERANCE


@contextmanager
def _as_it_was(model: PreTrainedModel):
    """Sets evaluation mode inside the block, and restores mode, generation settings and verbosity."""
    settings = [(lm, copy.deepcopy(lm.generation_config)) for lm in (model, model.backbone)]
    training, verbosity = model.training, logging.get_verbosity()
    model.eval()
    logging.set_verbosity_error()  # `generate` warns of settings that the modes override
    try:
        yield
    finally:
        model.train(training)
        logging.set_verbosity(verbosity)
        for lm, before in settings:
            lm.generation_config = before


class RandomRows:
    """Forward hook of a table: replaces values by a fixed pattern of each row's number."""

    def __call__(self, table: nn.Module, args: tuple, vectors: torch.Tensor) -> torch.Tensor:
        rows = args[0].to(vectors.device)  # (batch, length, orders, heads)
        scale = torch.arange(1, table.width + 1, device=rows.device)
        pattern = torch.sin((rows[..., None] % 9973 + 1) * scale * 0.7)  # (batch, length, orders, heads, width)
        return pattern.flatten(2).to(vectors.dtype)


@contextmanager
def _stand_in_memory(model: EngramForCausalLM):
    """Uses random rows and a random convolution inside the block; no table is written to."""
    generator = torch.Generator().manual_seed(SEED)
    hooks = [table.register_forward_hook(RandomRows()) for table in model.memory.tables.values()]
    kept = []
    for layer in model.memory.layers.values():
        for name, deviation in (("conv", 0.3), ("key_value.weight", None)):
            parameter = dict(layer.named_parameters()).get(name)
            if parameter is not None and (deviation is not None or not bool(parameter.any())):
                kept.append((parameter, parameter.detach().clone()))
                noise = torch.randn(parameter.shape, generator=generator, device="cpu") * (deviation or 0.04)
                parameter.copy_(noise.to(parameter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in kept:
            parameter.copy_(before)
