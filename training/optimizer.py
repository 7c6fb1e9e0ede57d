"""EngramAdamW: one optimizer for dense weights and for tables.

Promises: tables are updated at the rows that their gradients name and nowhere else, with a learning rate of their own
and no weight decay; schedulers and Trainer see an ordinary optimizer; its state is plain tensors. Never makes a dense
gradient of a table.
Source: Engram (arXiv 2601.07372), section 4.1 and Table 5 (Adam, separate learning rate, no decay on tables).
"""

import torch

from ..gradient_engram import with_row_gradients
from .rows import RowMoments


# Measured on SmolLM2 and WordNet entities (docs/design.md, "Settings of the demo"). The paper's 5 is for training from
# scratch and leaves a graft's table nearly empty.
TABLE_LR_MULTIPLIER = 40.0


class EngramAdamW(torch.optim.AdamW):
    """AdamW for dense parameters, lazy row-wise Adam for groups with `rows=True`.

    Args:
        params: parameter groups; see [`engram_optimizer`].
        kwargs: arguments of `torch.optim.AdamW`.
    """

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.row_moments: dict[torch.Tensor, RowMoments] = {}

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.row_groups():
            for parameter in with_row_gradients(group["params"]):
                gradient = parameter.grad
                if parameter not in self.row_moments:
                    self.row_moments[parameter] = RowMoments(parameter.shape[1], parameter.device)
                direction = self.row_moments[parameter].adam(
                    gradient.rows, gradient.row_values, group["betas"], group["eps"]
                )
                parameter.index_add_(0, gradient.rows, direction.mul_(-group["lr"]).to(parameter.dtype))
                gradient.applied = True
        return loss

    def _init_group(self, group, *lists) -> bool:
        return False if group.get("rows") else super()._init_group(group, *lists)

    def row_groups(self) -> list[dict]:
        """Parameter groups that hold tables."""
        return [group for group in self.param_groups if group.get("rows")]

    def state_dict(self) -> dict:
        packed = super().state_dict()
        for index, parameter in self.numbered():
            if parameter in self.row_moments:
                packed["state"][index] = self.row_moments[parameter].state_dict()
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        # torch would cast row numbers to the parameter's floating type.
        rows = {index: state for index, state in state_dict["state"].items() if "rows" in state}
        dense = {index: state for index, state in state_dict["state"].items() if index not in rows}
        super().load_state_dict({**state_dict, "state": dense})
        tables = {parameter for group in self.row_groups() for parameter in group["params"]}
        self.row_moments = {}
        for index, parameter in self.numbered():
            if index not in rows:
                continue
            state = rows[index]
            fits = parameter in tables and state["exp_avg"].shape[1] == parameter.shape[1]
            if not fits or (len(state["rows"]) and int(state["rows"][-1]) >= len(parameter)):
                raise ValueError(
                    f"optimizer state {index} is for rows of width {state['exp_avg'].shape[1]}, the parameter there "
                    f"has shape {tuple(parameter.shape)}: this state belongs to another model."
                )
            self.row_moments[parameter] = RowMoments.from_state_dict(state, parameter.device)

    def numbered(self) -> list[tuple[int, torch.Tensor]]:
        """Parameters under the numbers that a state dict gives them."""
        return list(enumerate(parameter for group in self.param_groups for parameter in group["params"]))


def engram_optimizer(
    model,
    lr: float = 2e-3,
    table_lr_multiplier: float = TABLE_LR_MULTIPLIER,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> EngramAdamW:
    """Makes the optimizer for a model with memory, over the parameters that require a gradient.

    Args:
        model ([`EngramForCausalLM`]): the model.
        lr (`float`, *optional*, defaults to 2e-3): learning rate of dense weights.
        table_lr_multiplier (`float`, *optional*, defaults to 40): times `lr`, the learning rate of tables.
        weight_decay (`float`, *optional*, defaults to 0): for projection matrices and the backbone's matrices alone.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): decay of the moments.
        eps (`float`, *optional*, defaults to 1e-8): Adam's epsilon.

    Returns:
        [`EngramAdamW`] with the groups "tables", "projections", "vectors" (norms, biases, convolution) and "backbone",
        as far as they have parameters.

    Raises:
        `ValueError`: if nothing requires a gradient.

    Example:

    ```python
    >>> from engram_transformers.training import engram_optimizer

    >>> optimizer = engram_optimizer(model, lr=2e-3)
    ```"""
    groups: dict[str, list] = {"tables": [], "projections": [], "vectors": [], "backbone": []}
    for name, parameter in learnable(model):
        if parameter.requires_grad:
            groups[group_of(name, parameter)].append(parameter)
    settings = {
        "tables": {"lr": lr * table_lr_multiplier, "weight_decay": 0.0, "rows": True},
        "vectors": {"weight_decay": 0.0},
    }
    wanted = [{"name": name, "params": held, **settings.get(name, {})} for name, held in groups.items() if held]
    if not wanted:
        raise ValueError("no parameter requires a gradient: unfreeze the memory (model.memory.requires_grad_(True)).")
    return EngramAdamW(wanted, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def learnable(model) -> list[tuple[str, torch.Tensor]]:
    """A model's parameters by name, and those parts of its tables that are in host memory."""
    memory = getattr(model, "memory", None)
    away = [] if memory is None else memory.named_host_parts()
    return [*model.named_parameters(), *away]


def group_of(name: str, parameter: torch.Tensor) -> str:
    """Optimizer group of a parameter by its state-dict name."""
    if "memory.tables." in name:
        return "tables"
    if "memory.layers." in name:
        return "projections" if name.endswith("key_value.weight") else "vectors"
    return "backbone" if parameter.ndim > 1 else "vectors"
