"""EngramOptimizer: AdamW for dense weights, and a rule over the rows that were read for tables.

Promises: tables are updated only at the rows of their gradients, wherever they are, with their own learning rate;
schedulers, Trainer and Accelerate see an ordinary optimizer; its state is plain tensors and numbers, restored
completely or not at all; a step with a non-finite gradient changes nothing and is counted. Never makes a dense gradient
of a table, and no state for a row before it is touched.
Source: Engram (arXiv 2601.07372), section 4.1 and Table 5 (Adam, separate learning rate, no decay on tables).
"""

import re
import weakref

import torch
from torch.optim import AdamW
from transformers.utils import logging

from ..memory_engram import refuse_copied_code
from ..rows_gradient_engram import RowGradient
from ..rows_placement_engram import own_rows
from ..rows_table_engram import TablePart
from .distributed import agreed, ranks_of, refuse_deepspeed, refuse_unexchanged
from .optimizer_state import check_state
from .row_rules import RULES
from .row_state import RowState
from .stochastic_rounding import rounded


logger = logging.get_logger(__name__)


# The best held-out loss of five values on SmolLM2 and FOLDOC (docs/training.md, "What a memory learns of a domain").
# The paper's 5 is for training from scratch and leaves a graft's table nearly empty.
TABLE_LR_MULTIPLIER = 50.0
LEARNING_RATE = 2e-3  # of dense weights, in the same runs
STATE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Names that PEFT inserts before a weight when it wraps its module or keeps a trained copy of it.
PROJECTION = re.compile(r"\.key_value(\.base_layer|\.original_module|\.modules_to_save\.[^.]+)*\.weight$")
ADAPTED = re.compile(r"\.key_value\..*\.")  # any other weight in a projection belongs to an adapter


class EngramOptimizer(AdamW):
    """AdamW for dense parameters, a rule for tables for groups with `rows=True`.

    Row groups have these settings besides torch's: `table_optimizer` (a name in `row_rules.RULES`), `table_state_dtype`
    ("float32" or "bfloat16"), and `l2_sp` (c in `w - lr c (w - start)`, applied at each touch of a row; `start` is the
    row's value when it was first touched, stored for touched rows if c > 0).

    Args:
        params: parameter groups; see [`create_optimizer`].
        lr (`float`, *optional*, defaults to 2e-3): learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): decay of Adam's moments.
        eps (`float`, *optional*, defaults to 1e-8): epsilon of Adam and Adagrad.
        weight_decay (`float`, *optional*, defaults to 0): decoupled; in row groups at each touch of a row.
        seed (`int`, *optional*, defaults to 0): seed of stochastic rounding to bfloat16 and float16.

    `skipped_steps` counts steps that were skipped because a gradient had NaN or inf.
    """

    # Weak reference to the memory that has these tables, from `create_optimizer`; copies and pickles have none.
    memory = None

    def __init__(
        self,
        params,
        lr: float = LEARNING_RATE,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        self.row_states: dict[torch.Tensor, RowState] = {}
        self.names: dict[torch.Tensor, str] = {}
        self.generators: dict[str, torch.Generator] = {}
        self.seed, self.skipped_steps = seed, 0
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter that has a gradient.

        Args:
            closure (`Callable`, *optional*): recomputes the gradients and returns the loss.

        Raises:
            `TypeError`: for a row gradient in a dense group, or a dense one in a row group.
            `RuntimeError`: if row gradients were not exchanged between several processes, or tables were moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refuse_moved()
        held = self.gradients()
        refuse_unexchanged(part for group in self.row_groups() for part in group["params"])
        if self.all_finite(held):
            plain_step = AdamW.step
            if getattr(plain_step, "hooked", False):  # by the first AdamW of this process: hooks would run twice
                plain_step = plain_step.__wrapped__
            plain_step(self)
            for group, part, gradient in held:
                if isinstance(gradient, RowGradient):
                    self.step_rows(group, part, gradient)
        for _, _, gradient in held:
            if isinstance(gradient, RowGradient):
                gradient.applied = True
        return loss

    def refuse_moved(self) -> None:
        """Raises RuntimeError if the model reads other tables than this optimizer updates."""
        memory = None if self.memory is None else self.memory()
        if memory is None:
            return
        read = {id(part) for part in memory.named_parts().values()}
        if any(id(part) not in read for group in self.row_groups() for part in group["params"]):
            raise RuntimeError(
                "the tables were moved after this optimizer was made (model.place_memory, or an offload that was "
                "attached or detached), and it would train rows that nobody reads: make the optimizer after that."
            )

    def step_rows(self, group: dict, part: torch.Tensor, gradient: RowGradient) -> None:
        """Updates the rows of one part of a table."""
        rows, lr, l2_sp = gradient.rows, float(group["lr"]), group["l2_sp"]
        if part not in self.row_states:
            self.row_states[part] = self.new_state(group, part)
        state, generator = self.row_states[part], self.generator(rows.device)
        known = len(state)
        slots = state.slots(rows)
        part.expect(rows)
        directions = RULES[group["table_optimizer"]].directions(state, slots, gradient.row_values, group, generator)
        for piece, direction in directions:
            stored = part.read(rows[piece])  # (piece, width), a copy
            values = stored.float()
            # Decay and l2_sp act on the row before the step, as AdamW's decay does.
            pull = direction.mul_(-lr)
            if group["weight_decay"]:
                pull.add_(values, alpha=-lr * group["weight_decay"])
            if l2_sp:
                own = slots[piece]
                fresh = own >= known
                state.columns["start"].index_copy_(0, own[fresh], stored[fresh])
                pull.add_(values - state.read("start", own), alpha=-lr * l2_sp)
            part.write(rows[piece], rounded(values.add_(pull), stored.dtype, generator))

    def new_state(self, group: dict, part: torch.Tensor) -> RowState:
        """Makes an empty state for a part."""
        columns = RULES[group["table_optimizer"]].columns(part.table_shape[1], STATE_TYPES[group["table_state_dtype"]])
        if group["l2_sp"]:
            columns["start"] = ((part.table_shape[1],), part.dtype)
        return RowState(part.table_shape, columns, part.device)

    def gradients(self) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
        """Returns group, parameter and gradient of each parameter that has one.

        Raises:
            `TypeError`: if the kind of gradient does not fit its group.
        """
        held = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, parameter, gradient in held:
            if isinstance(gradient, RowGradient) != bool(group.get("rows")):
                found, needed = ("rows alone", "rows=True") if not group.get("rows") else ("dense", "no rows=True")
                raise TypeError(
                    f"the gradient of {self.called(parameter)} is {found}: it belongs into a parameter group with "
                    f"{needed}, as engram_transformers.training.create_optimizer(model) makes them. A table learns by "
                    "what reads its rows; a penalty on all of its rows (use l2_sp=) gives a dense gradient."
                )
        return held

    def all_finite(self, held: list) -> bool:
        """Whether the norms of all gradients are finite; if not, counts and logs it."""
        values = [gradient.row_values if isinstance(gradient, RowGradient) else gradient for _, _, gradient in held]
        norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in values]  # cheaper than isfinite
        norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]  # of sharded weights
        together = torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else torch.zeros(0, device="cpu")
        finite = together.isfinite().tolist()
        if self.agree(all(finite)):
            return True
        broken = [
            f"{self.called(parameter)} (group {group.get('name', 'without name')!r})"
            for (group, parameter, _), fine in zip(held, finite, strict=True)
            if not fine
        ]
        self.skipped_steps += 1
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        logger.warning(
            f"NaN, inf or more than float32 can square in the gradient of {', '.join(broken[:3]) or 'another process'}"
            f"{more}: this step is left out and nothing has changed ({self.skipped_steps} skipped so far). If it "
            "happens again and again, lower the learning rate or look at the loss."
        )
        return False

    def agree(self, finite: bool) -> bool:
        """Whether all processes found `finite`."""
        return agreed(finite, (part for group in self.row_groups() for part in group["params"]))

    def called(self, parameter: torch.Tensor) -> str:
        """Returns the name of a parameter in messages."""
        for group in self.param_groups:
            for number, own in enumerate(group["params"]):
                if own is parameter:
                    return self.names.get(parameter, f"parameter {number} of group {group.get('name', '?')!r}")
        return "a parameter"

    def add_param_group(self, param_group: dict) -> None:
        """As for any optimizer. A group with `rows=True` is for tables; maximize and amsgrad are refused."""
        if any(param_group.get(word) for word in ("maximize", "amsgrad")):
            raise ValueError("EngramOptimizer knows neither maximize nor amsgrad: turn the sign of the loss instead.")
        if param_group.get("rows"):
            _check_parts(param_group["params"])
            for name, default in (("table_optimizer", "adam"), ("table_state_dtype", "float32"), ("l2_sp", 0.0)):
                param_group.setdefault(name, default)
            _check_choice("table_optimizer", param_group["table_optimizer"], RULES)
            _check_choice("table_state_dtype", param_group["table_state_dtype"], STATE_TYPES)
            if not 0 <= param_group["l2_sp"] < float("inf"):
                raise ValueError(f"l2_sp={param_group['l2_sp']} must be 0 (off) or positive: a pull per unit of lr.")
        super().add_param_group(param_group)

    def _init_group(self, group, *lists) -> bool:
        return False if group.get("rows") else super()._init_group(group, *lists)

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns the random generator for one kind of device."""
        if device.type not in self.generators:
            self.generators[device.type] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device.type]

    def row_groups(self) -> list[dict]:
        """Returns the parameter groups that hold tables."""
        return [group for group in self.param_groups if group.get("rows")]

    def state_dict(self) -> dict:
        """As for any optimizer; touched rows are stored under the numbers of their parts, random generators and the
        count of skipped steps under "engram".
        """
        packed = super().state_dict()
        for index, parameter in self.numbered():
            if parameter in self.row_states:
                packed["state"][index] = self.row_states[parameter].state_dict()
            if getattr(parameter, "selected", None) is not None:  # rows that may change
                packed["state"].setdefault(index, {})["selected"] = parameter.selected
        generators = {kind: generator.get_state() for kind, generator in self.generators.items()}
        packed["engram"] = {"generators": generators, "skipped_steps": self.skipped_steps}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Restores a `state_dict` completely or, with an error, not at all.

        Raises:
            `ValueError`: if it is of another model, of other settings, of an older version, or damaged.
        """
        check_state(self, state_dict)
        tables = {p: group for group in self.row_groups() for p in group["params"]}
        rows, dense, selected = {}, {}, {}
        numbered = dict(self.numbered())
        for index, state in state_dict["state"].items():
            if numbered[index] not in tables:
                dense[index] = state
                continue
            part = numbered[index]
            state = dict(state)
            if "selected" in state:
                selected[part] = state.pop("selected").to(part.device, copy=True)
            if state:
                rows[part] = self.new_state(tables[part], part)
                rows[part].load_state_dict(state, self.called(part))
        # torch would cast row numbers to the parameter's floating type.
        super().load_state_dict({**{k: v for k, v in state_dict.items() if k != "engram"}, "state": dense})
        self.row_states, self.generators = rows, {}
        for part, own in selected.items():
            part.selected = own
        kept = state_dict.get("engram", {})
        self.skipped_steps = kept.get("skipped_steps", 0)
        for kind, numbers in kept.get("generators", {}).items():
            if any(part.device.type == kind for part in tables):
                self.generator(torch.device(kind)).set_state(numbers.cpu())

    def numbered(self) -> list[tuple[int, torch.Tensor]]:
        """Returns the parameters with their numbers in a state dict."""
        return list(enumerate(parameter for group in self.param_groups for parameter in group["params"]))

    def __getstate__(self) -> dict:
        own = {name: getattr(self, name) for name in ("row_states", "names", "seed", "skipped_steps")}
        numbers = {kind: generator.get_state() for kind, generator in self.generators.items()}
        return {**super().__getstate__(), **own, "numbers": numbers}

    def __setstate__(self, state: dict) -> None:
        numbers = state.pop("numbers", None)
        super().__setstate__(state)
        if numbers is not None:  # copied or unpickled; torch calls this after loading as well
            self.generators = {}
            for kind, held in numbers.items():
                self.generator(torch.device(kind)).set_state(held)


def create_optimizer(
    model,
    lr: float = LEARNING_RATE,
    table_lr_multiplier: float = TABLE_LR_MULTIPLIER,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    table_optimizer: str = "adam",
    table_state_dtype: str = "float32",
    l2_sp: float = 0.0,
    seed: int = 0,
) -> EngramOptimizer:
    """Makes the optimizer for a model with memory, over the parameters that require a gradient.

    A small table that is mapped from its file is copied into memory, which avoids a page fault for each touched row. If
    nothing was chosen (every parameter requires a gradient, no `model.set_trainable(...)`), only the memory is trained.

    Args:
        model ([`EngramForCausalLM`]): the model, also in a PEFT model.
        lr (`float`, *optional*, defaults to 2e-3): learning rate of dense weights.
        table_lr_multiplier (`float`, *optional*, defaults to 50): times `lr`, the learning rate of tables.
        weight_decay (`float`, *optional*, defaults to 0): only for projection matrices and the backbone's matrices.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): decay of Adam's moments.
        eps (`float`, *optional*, defaults to 1e-8): epsilon of Adam and Adagrad.
        table_optimizer (`"adam"`, `"adagrad"` or `"sinkhorn"`, *optional*, defaults to `"adam"`):
            Rule for tables; its state has 2 numbers a value, 1 number, or 1 number a value for each touched row.
        table_state_dtype (`"float32"` or `"bfloat16"`, *optional*, defaults to `"float32"`):
            Type of that state; bfloat16 uses stochastic rounding.
        l2_sp (`float`, *optional*, defaults to 0, which is off):
            c in `w - lr c (w - start)`: at each touch a row is pulled to its value when it was first touched.
        seed (`int`, *optional*, defaults to 0): seed of stochastic rounding.

    Returns:
        [`EngramOptimizer`] with the groups "tables", "projections", "vectors" (norms, biases, convolution) and
        "backbone" (adapters included), if they have parameters.

    Raises:
        `TypeError`: for a model with its checkpoint's own copy of the code.
        `ValueError`: with DeepSpeed, if nothing requires a gradient, for an unknown setting or a negative rate.

    Example:

    ```python
    >>> from engram_transformers.training import create_optimizer

    >>> optimizer = create_optimizer(model, lr=2e-3)
    ```"""
    table_state_dtype = str(table_state_dtype).removeprefix("torch.")
    _check_choice("table_optimizer", table_optimizer, RULES)
    _check_choice("table_state_dtype", table_state_dtype, STATE_TYPES)
    if not 0 <= table_lr_multiplier < float("inf"):
        raise ValueError(
            f"table_lr_multiplier={table_lr_multiplier} must be 0 or positive: tables learn at lr times it."
        )
    refuse_copied_code(model)
    refuse_deepspeed()
    _choose_what_learns(model)
    memory = getattr(model, "memory", None)
    if memory is not None:
        memory.take_back_tables()
        memory.named_parts()  # restores parts that others have replaced
    selection = getattr(memory, "row_selection", None)
    if selection is not None:  # parts are new objects after place_memory or a copy
        selection.apply(model)
    groups: dict[str, list] = {"tables": [], "projections": [], "vectors": [], "backbone": []}
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter, name in names.items():
        groups[group_of(name, parameter)].append(parameter)
    rule = {"rows": True, "table_optimizer": table_optimizer, "table_state_dtype": table_state_dtype, "l2_sp": l2_sp}
    settings = {
        "tables": {"lr": lr * table_lr_multiplier, "lr_multiplier": table_lr_multiplier, "weight_decay": 0.0, **rule},
        "vectors": {"weight_decay": 0.0},
    }
    wanted = [{"name": name, "params": held, **settings.get(name, {})} for name, held in groups.items() if held]
    if not wanted:
        raise ValueError("no parameter requires a gradient: unfreeze the memory (model.memory.requires_grad_(True)).")
    optimizer = EngramOptimizer(wanted, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed)
    optimizer.names = names
    if memory is not None:
        optimizer.memory = weakref.ref(memory)
        if ranks_of(None) == 1:  # several processes share a mapped table's pages until one writes them
            own_rows(memory.tables)
    return optimizer


def _choose_what_learns(model) -> None:
    """Makes only the memory trainable if nothing was chosen."""
    config = getattr(model, "config", None)
    if getattr(config, "engram_trainable", None) or not hasattr(model, "set_trainable"):
        return
    # `set_trainable` says what to do about rows of a quantised table, which never require a gradient.
    if all(each.requires_grad or getattr(each, "is_quantised", False) for each in model.parameters()):
        model.set_trainable("memory")
        logger.warning(
            "every parameter required a gradient: the memory alone is trained now, as by "
            'model.set_trainable("memory"). Choose with model.set_trainable("memory" | "tables" | "reader" | '
            '"memory+lora" | "all").'
        )


def group_of(name: str, parameter: torch.Tensor) -> str:
    """Returns the optimizer group of a parameter by its state-dict name."""
    if "memory.tables." in name:
        return "tables"
    if "memory.layers." in name:
        if PROJECTION.search(name):
            return "projections"
        if not ADAPTED.search(name):
            return "vectors"
    return "backbone" if parameter.ndim > 1 else "vectors"


def _check_parts(params) -> None:
    """Raises TypeError for parameters of a row group that are not parts of a table."""
    for parameter in [params] if isinstance(params, torch.Tensor) else params:
        if not isinstance(parameter, TablePart):
            raise TypeError(
                f"a group with rows=True is for the parts of a memory's tables, got a {type(parameter).__name__} of "
                f"shape {tuple(parameter.shape)}: leave rows=True out for dense weights."
            )


def _check_choice(name: str, value, choices) -> None:
    """Raises ValueError for an unknown value of a setting."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
