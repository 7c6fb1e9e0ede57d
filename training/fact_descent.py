"""Descent: parameters that a model reads learn the answers of fact texts, and to leave everything else as it was.

Promises: only the given parameters change; the loss is the answers' cross-entropy, and the KL divergence from the model
without the parameters on all other tokens of a quarter of each batch. Never decides which parameters or texts.
Source: docs/packs.md, "Teaching facts".
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .fact_texts import IGNORED, FactText, answer_loss, divergence, padded


_ASKED_AT_ONCE = 64  # unseen texts in a pass


class EarlyStop:
    """Keeps the parameters with the lowest loss on texts that are not taught.

    Args:
        model ([`EngramForCausalLM`]): reads the parameters.
        texts (`list[FactText]`): that are not taught.
        pad (`int`): an id for places that the mask hides.
        bf16 (`bool`): as in the passes.
        patience (`int`): passes without a lower loss, after which learning ends.
        steps (`float`): of a pass.
    """

    def __init__(self, model, texts: list[FactText], pad: int, bf16: bool, patience: int, steps: float):
        self.model, self.texts, self.pad, self.bf16 = model, texts, pad, bf16
        self.patience, self.steps = patience, steps
        self.losses: list[float] = []  # after each pass
        self.step, self.best = 0, []

    def ends(self, learned: list[nn.Parameter]) -> bool:
        """Counts a step, measures after each pass, and returns whether learning has to end."""
        self.step += 1
        if self.step // self.steps == (self.step - 1) // self.steps:
            return False
        self.losses.append(self._loss())
        best = self.losses.index(min(self.losses))
        if best == len(self.losses) - 1:
            self.best = [rows.detach().clone() for rows in learned]
        return len(self.losses) - 1 - best >= self.patience

    @torch.no_grad()
    def restore(self, learned: list[nn.Parameter]) -> None:
        """Gives parameters the values of the lowest loss."""
        for rows, best in zip(learned, self.best, strict=True):
            rows.copy_(best)

    @torch.no_grad()
    def _loss(self) -> float:
        """Returns the mean loss of the answers' tokens."""
        total = count = 0
        for first in range(0, len(self.texts), _ASKED_AT_ONCE):
            ids, mask, labels = padded(self.texts[first : first + _ASKED_AT_ONCE], self.pad, self.model.device)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
            tokens = int((labels != IGNORED).sum())
            total, count = total + tokens * float(answer_loss(logits, labels)), count + tokens
        return total / count


@dataclass
class Descent:
    """How parameters learn; the settings are those of [`teach`].

    Args:
        model ([`EngramForCausalLM`]): reads the parameters; its weights are frozen.
        bar (`tqdm`): moves by one in each step.
        pad (`int`): an id for places that the mask hides.
        learning_rate (`float`): of Adam; warm-up, then linear decay.
        keep (`float`): weight of the divergence.
        bf16 (`bool`): autocast of the passes.
        stop ([`EarlyStop`], *optional*): may end learning.
    """

    model: nn.Module
    bar: tqdm
    pad: int
    learning_rate: float
    keep: float
    bf16: bool
    stop: EarlyStop | None = None

    def learn(
        self,
        learned: list[nn.Parameter],
        batches: Iterable[list[FactText]],
        steps: int,
        without: Callable[[], AbstractContextManager],
    ) -> float:
        """Lets parameters learn from batches.

        Args:
            learned (`list[nn.Parameter]`): what learns.
            batches (iterable of `list[FactText]`): one for each step.
            steps (`int`): their number.
            without (`Callable`): gives a context in which the model does not read the parameters.

        Returns:
            `float`: the answers' last loss, in nats.
        """
        optimizer = torch.optim.Adam(learned, lr=self.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 5) * max(0.05, 1 - step / steps)
        )
        with _attention_for_short_texts(self.model.device):
            for batch in batches:
                with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, changed = self._losses(batch, without)
                (loss + self.keep * changed).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                shown = {"loss": f"{float(loss.detach()):.3f}", "changed": f"{float(changed.detach()):.3f}"}
                self.bar.set_postfix(shown, refresh=False)
                self.bar.update()
                if self.stop is not None and self.stop.ends(learned):
                    break
        if self.stop is not None:
            self.stop.restore(learned)
        return float(loss.detach())

    def _losses(
        self, texts: list[FactText], without: Callable[[], AbstractContextManager]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the answers' loss, and how much a quarter of the texts changes elsewhere, both in nats a token."""
        ids, mask, labels = padded(texts, self.pad, self.model.device)
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
        few = -(-len(texts) // 4)
        with torch.no_grad(), without():
            before = self.model(ids[:few], attention_mask=mask[:few], use_cache=False).logits
        return answer_loss(logits, labels), divergence(before, logits[:few], labels[:few], mask[:few])


def _attention_for_short_texts(device: torch.device) -> AbstractContextManager:
    """Returns a context in which attention on a CPU is plain matrix products.

    The fused kernel's backward pass takes a quarter of a whole step there, because texts are short.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
