"""Row gradients of several processes, exchanged once for each optimizer step.

What it chooses: rows and values are gathered from all ranks, each with its own length, and summed in the order of the
ranks, so that all ranks compute identical sums; these are divided by the number of ranks, as in DDP.
Promises: after an exchange every rank holds the same rows and values, bit for bit, and holds rows of a table only if
some rank read them; ranks whose tables or parts differ get an error and no update. Never sends a table.
Source: torch's DistributedDataParallel (mean over ranks); docs/processes.md.
"""

import os
import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from ..backbone_engram import find_decoder_layers
from ..rows_gradient_engram import RowGradient, row_gradient, with_row_gradients
from ..rows_table_engram import TablePart


# Rows of a part whose values are compared between the ranks in every exchange: enough to detect tables that differ, and
# cheap.
COMPARED = 256


class RankPart(TablePart):
    """Rows of a table that only this rank holds (`shard_tables`): their gradients need no exchange."""

    group = None  # the ranks that hold the other rows


def sync_row_gradients(trained, group=None) -> None:
    """Replaces the tables' gradients by their mean over all ranks; does nothing in a single process.

    Call it on every rank, after the last `backward()` of a step and before clipping. [`EngramTrainer`] does.

    Args:
        trained ([`EngramForCausalLM`] or `torch.optim.Optimizer`):
            The model or its optimizer, also as Accelerate, DDP or PEFT wrap them.
        group (`ProcessGroup`, *optional*): the ranks that train together; all if None.

    Raises:
        `ValueError`: if the ranks do not train the same parts of tables, or hold different rows in them.
        `TypeError`: if FSDP has sharded the tables, which does not support row gradients.

    Example:

    ```python
    >>> from engram_transformers.training import sync_row_gradients

    >>> accelerator.backward(model(**batch).loss)
    >>> if accelerator.sync_gradients:
    ...     sync_row_gradients(model)
    ...     accelerator.clip_grad_norm_(model.parameters(), 1.0)
    >>> optimizer.step()
    ```"""
    parts = [part for part in table_parts(trained) if part.requires_grad and not isinstance(part, RankPart)]
    _check_whole(parts)
    if ranks_of(group) == 1:
        _mark_exchanged(parts)
        return
    device = wire_device(parts, group)
    _check_same_parts(parts, device, group)
    if not parts:
        return
    held = [row_gradient(part) for part in parts]
    counts = torch.tensor([0 if gradient is None else len(gradient.rows) for gradient in held], device=device)
    counts = torch.stack(gather(counts, group)).tolist()  # [ranks][parts]
    rows, values = _gather_rows_of_ranks(parts, held, counts, device, group)
    for number, part in enumerate(parts):
        if any(lengths[number] for lengths in counts):
            combined = _mean_of_ranks([(own[number], of[number]) for own, of in zip(rows, values, strict=True)])
            part.grad = RowGradient(part, *(tensor.to(part.device) for tensor in combined))
        elif held[number] is not None:
            part.grad = None  # as on the ranks that read nothing
    check_same_rows(parts, device, group)
    _mark_exchanged(parts)


def _mark_exchanged(parts: list[torch.Tensor]) -> None:
    for part in with_row_gradients(parts):
        part.grad.exchanged = True


def table_parts(trained) -> list[torch.Tensor]:
    """Returns the parts of tables that a model or optimizer holds, in the same order on every rank."""
    trained = getattr(trained, "module", trained)  # DDP's
    if hasattr(trained, "param_groups"):
        return [part for group in trained.param_groups if group.get("rows") for part in group["params"]]
    return list(trained.memory.named_parts().values())


def refuse_unexchanged(parts: Iterable[torch.Tensor]) -> None:
    """Raises RuntimeError if row gradients were not exchanged between the ranks, which would diverge."""
    if ranks_of(None) == 1:
        return
    if any(not getattr(part.grad, "exchanged", False) for part in with_row_gradients(parts)):
        raise RuntimeError(
            f"row gradients were not exchanged between the {ranks_of(None)} processes: call "
            "engram_transformers.training.sync_row_gradients(model) on every rank, after backward() and before "
            "clipping, or use EngramTrainer."
        )


def refuse_deepspeed(args=None) -> None:
    """Raises ValueError with DeepSpeed, whose buckets and partitions do not support row gradients.

    Args:
        args (`TrainingArguments`, *optional*): a trainer's arguments.
    """
    # `accelerate launch` sets the variable.
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "DeepSpeed cannot train a memory: row gradients do not reach its buckets, and the tables would stay as "
            "they are. Use DistributedDataParallel (torchrun), or shard with engram_transformers.training's "
            "shard_backbone and shard_tables."
        )


def agreed(finite: bool, parts: Iterable[torch.Tensor]) -> bool:
    """Whether all ranks found `finite`; asks them only about gradients that differ by rank, those of sharded rows."""
    for part in parts:
        if isinstance(part, RankPart):
            own = torch.tensor([int(finite)], device=wire_device([part], part.group))
            return bool(torch.cat(gather(own, part.group)).min())
    return finite


def ranks_of(group) -> int:
    """Returns the number of processes in a group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def wire_device(parts: list[torch.Tensor], group) -> torch.device:
    """Returns a device from which the group's backend can send; that of the parts if possible."""
    able = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    for part in parts:
        if part.device.type in able:
            return part.device
    index = None if able[0] == "cpu" else getattr(torch, able[0]).current_device()
    return torch.device(able[0], index)


def gather(own: torch.Tensor, group) -> list[torch.Tensor]:
    """Gathers tensors of equal shape from all ranks."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own.contiguous(), group=group)
    return gathered


def _gather_rows_of_ranks(parts, held, counts, device, group) -> tuple[list, list]:
    """Returns rows and values by rank and part, `[ranks][parts]`: `(touched,)` and `(touched, width)`."""
    widths = [part.table_shape[1] for part in parts]
    given = [gradient for gradient in held if gradient is not None]
    rows = torch.cat([g.rows.to(device) for g in given] or [torch.empty(0, dtype=torch.int64, device=device)])
    values = torch.cat([g.row_values.flatten().to(device) for g in given] or [torch.empty(0, device=device)])
    most = max(sum(lengths) for lengths in counts)
    cells = [[length * width for length, width in zip(lengths, widths, strict=True)] for lengths in counts]
    # All ranks send as many as the longest; the padding is cut off.
    all_rows = gather(padded(rows, most), group)
    all_values = gather(padded(values, max(map(sum, cells))), group)
    by_rank = [own[: sum(lengths)].split(lengths) for own, lengths in zip(all_rows, counts, strict=True)]
    values_by_rank = [
        [flat.view(-1, width) for flat, width in zip(own[: sum(sizes)].split(sizes), widths, strict=True)]
        for own, sizes in zip(all_values, cells, strict=True)
    ]
    return by_rank, values_by_rank


def padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Pads a flat tensor with zeros to `length`."""
    return torch.nn.functional.pad(tensor, (0, length - len(tensor)))


def _mean_of_ranks(given: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns unique rows of all ranks, ascending, and the sum of their values divided by the number of ranks.

    Args:
        given (`list[tuple]`): by rank, unique rows `(touched,)` and values `(touched, width)`.
    """
    unique = torch.unique(torch.cat([rows for rows, _ in given]))  # (union,)
    total = given[0][1].new_zeros(len(unique), given[0][1].shape[1])  # (union, width)
    for rows, values in given:
        # A rank's rows are unique, so the order of sums is that of the ranks; one `index_add_` of all would be
        # nondeterministic on some devices.
        total[torch.searchsorted(unique, rows)] += values
    return unique, total.div_(len(given))


def _is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is sharded by FSDP or tensor parallelism."""
    return hasattr(tensor, "full_tensor")


def _check_whole(parts: list[torch.Tensor]) -> None:
    """Raises TypeError for parts that FSDP has sharded."""
    if any(_is_sharded(part) for part in parts):
        raise TypeError(
            "FSDP has sharded the memory's tables, and row gradients do not reach them: leave them out "
            "(engram_transformers.training.shard_backbone(model), or fully_shard(..., ignored_params="
            "set(model.memory.tables.parameters()))); engram_transformers.training.shard_tables(model) shards by row."
        )


def _check_same_parts(parts: list[torch.Tensor], device: torch.device, group) -> None:
    """Raises ValueError, on every rank, if the ranks do not train the same parts."""
    shapes = repr([(*part.table_shape, str(part.dtype)) for part in parts])
    own = torch.tensor([len(parts), zlib.crc32(shapes.encode())], device=device)
    seen = torch.stack(gather(own, group)).tolist()
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise ValueError(
                f"rank {rank} trains {other[0]} parts of tables, rank 0 {seen[0][0]}, or parts of other shapes: give "
                "every rank the same checkpoint, placement (engram_placement) and frozen tables."
            )


def check_same_rows(parts: list[torch.Tensor], device: torch.device, group) -> None:
    """Raises ValueError, on every rank, if rows to be updated differ between the ranks."""
    digests = []
    for part in parts:
        gradient = row_gradient(part)
        rows = torch.empty(0, dtype=torch.int64, device="cpu") if gradient is None else gradient.rows
        chosen = rows[:: max(1, len(rows) // COMPARED)]
        held = part.read(chosen).contiguous().view(torch.uint8).cpu() if len(chosen) else rows
        digests.append(zlib.crc32(held.numpy().tobytes()))
    seen = torch.stack(gather(torch.tensor(digests, device=device), group)).tolist()
    for rank, other in enumerate(seen):
        if other != seen[0]:
            number = next(n for n, pair in enumerate(zip(other, seen[0], strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"rank {rank} holds other rows in part {number} of the tables than rank 0: load the same checkpoint on "
                "every rank, and step every rank's optimizer."
            )


@torch.no_grad()
def clip_grad_norm_(trained, max_norm: float) -> torch.Tensor:
    """`clip_grad_norm_` over everything that an optimizer trains, some of it sharded.

    Torch's own accepts the tables' gradients, but not FSDP weights together with others.

    Args:
        trained ([`EngramForCausalLM`] or `torch.optim.Optimizer`): the model or its optimizer.
        max_norm (`float`): largest norm of all gradients together.

    Returns:
        `torch.Tensor`: the norm before clipping, the same on all ranks.
    """
    if hasattr(trained, "param_groups"):
        parameters = [p for group in trained.param_groups for p in group["params"]]
    else:
        parameters = list(trained.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norms = [norm.full_tensor() if _is_sharded(norm) else norm for norm in norms]
    total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros((), device="cpu")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return total


def shard_backbone(model, mesh=None, **settings):
    """Shards backbone and memory layers with torch's `fully_shard` (FSDP2), and leaves the tables whole.

    Exchange the tables' gradients and clip with the functions of this module.

    Args:
        model ([`EngramForCausalLM`]): changed in place; make the optimizer afterwards.
        mesh (`DeviceMesh`, *optional*): of `fully_shard`.
        settings: further arguments of `fully_shard`.

    Returns:
        The model.
    """
    from torch.distributed.fsdp import fully_shard  # torch 2.7 or newer for `ignored_params`

    tables = set(model.memory.tables.parameters())
    depth = model.config.text_config.num_hidden_layers
    for layer in find_decoder_layers(model.backbone, depth):
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, ignored_params=tables, **settings)
    _check_whole(list(tables))
    return model
