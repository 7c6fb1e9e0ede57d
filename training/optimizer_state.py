"""Checks of a saved optimizer state before any of it is restored.

Promises: an error names what was found, what is needed and what to do; the optimizer is unchanged then.
"""

DENSE = {"step", "exp_avg", "exp_avg_sq"}


def check_state(optimizer, state_dict: dict) -> None:
    """Checks groups, dense states and completeness; rows are checked as they are restored.

    Args:
        optimizer ([`EngramOptimizer`]): the optimizer to load the state into.
        state_dict (`dict`): from `EngramOptimizer.state_dict`.

    Raises:
        `ValueError`: if it does not belong to this optimizer.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError('this is not an optimizer state: needed is a dict with "state" and "param_groups".')
    mine, saved = optimizer.param_groups, state_dict["param_groups"]
    if [_outline(group) for group in mine] != [_outline(group) for group in saved]:
        raise ValueError(
            f"the optimizer state is for parameter groups {_describe_groups(saved)}, this optimizer has "
            f"{_describe_groups(mine)}: it was saved with another choice of what is trained, or another model. Choose "
            "as then (model.set_trainable), or go on without its state."
        )
    for own, other in zip(mine, saved, strict=True):
        if own.get("rows"):
            _check_rule(own, other)
    numbered = dict(optimizer.numbered())
    tables = {p for group in optimizer.row_groups() for p in group["params"]}
    strange = [index for index in state_dict["state"] if index not in numbered]
    if strange:
        raise ValueError(
            f"the optimizer state has entries {strange[:3]}, which none of its groups holds: the file is damaged. Take "
            "an older checkpoint, or go on without optimizer state."
        )
    for index, state in state_dict["state"].items():
        if numbered[index] not in tables:
            _check_dense(optimizer.called(numbered[index]), numbered[index], state)
    if "engram" not in state_dict and any(numbered[index] in tables for index in state_dict["state"]):
        raise ValueError(
            'the optimizer state has rows and no "engram" (random numbers, skipped steps): it was made by an older '
            "version, or something took it apart. Go on without optimizer state."
        )


def _outline(group: dict) -> tuple:
    """Returns what must be equal in a group: its name, whether it holds tables, and the number of parameters."""
    return group.get("name"), bool(group.get("rows")), len(group["params"])


def _describe_groups(groups: list[dict]) -> str:
    """Describes groups in an error."""
    return ", ".join(f"{group.get('name', 'without name')} ({len(group['params'])})" for group in groups)


def _check_rule(own: dict, other: dict) -> None:
    """Raises ValueError if tables were trained by another rule."""
    for name in ("table_optimizer", "table_state_dtype", "l2_sp"):
        missing = name not in other
        # The strength of l2_sp may change, as a learning rate may; whether it is used determines the stored columns.
        differs = not missing and (
            bool(own[name]) != bool(other[name]) if name == "l2_sp" else own[name] != other[name]
        )
        if missing or differs:
            found = "nothing (an older version)" if missing else repr(other[name])
            raise ValueError(
                f"the optimizer state was made with {name}={found}, this optimizer has {own[name]!r}: make it with the "
                "setting of then, or go on without its state."
            )


def _check_dense(called: str, parameter, state: dict) -> None:
    """Raises ValueError if a dense state is not AdamW's for this parameter."""
    if set(state) != DENSE:
        raise ValueError(
            f"optimizer state of {called} has {', '.join(sorted(state))}; needed is {', '.join(sorted(DENSE))}: it was "
            "made by another optimizer. Go on without its state."
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"optimizer state of {called}: {name} has shape {tuple(state[name].shape)}, needed is "
                f"{tuple(parameter.shape)}: this state belongs to another model. Load the model that it was saved with."
            )
