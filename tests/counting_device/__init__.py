"""A device that counts: the tests' own accelerator, to say without a GPU exactly how many bytes cross to one.

    from ..counting_device import counted, load

    device = load()  # `torch.counting`
    with counted() as crossed:
        table.to("counting")
    assert (crossed.h2d, crossed.h2d_copies) == (table.nbytes, 1)

It is ordinary memory behind PyTorch's PrivateUse1 key, and every operator is the CPU's: its speed means nothing.

| number | what it is |
|---|---|
| `h2d`, `d2h` | bytes from host to device and back, by `.to`, `copy_`, `.cpu()`, `item()`, `tolist()` |
| `d2d` | bytes that copies on the device wrote |
| `h2d_copies`, ... | how many copies that were |
| `allocated`, `peak` | device bytes above what there had been: those that stayed, and the most at any time |
| `pinned`, `pinned_peak` | the same of pinned host memory |
| `steps` | copies, operators, events and waits in order, with their streams |

A view counts its own elements, not its storage. A copy that changes the type counts the bytes of the side that is the
device: CUDA converts on the host, either way. What operators do on the device is not a copy. A CPU index of a device
tensor is brought over and counted; any other CPU tensor of more than one number beside a device's is an error, as on
CUDA. `device.late_copies()`, `pinning_fails()` and `total_memory(bytes)` stand for what goes wrong elsewhere.

Once loaded it stays for the life of the process, and `torch.accelerator` finds it. safetensors cannot load to it,
accelerate's "auto" does not know it, and autocast does nothing on it.
"""

from functools import cache

import torch

from . import torch_module
from .build import BuildFailed, NoCompiler, built
from .counters import Counted, Step, attach, counted


__all__ = ["BuildFailed", "Counted", "NoCompiler", "Step", "counted", "load"]


@cache
def register() -> None:
    library = built()
    torch.utils.rename_privateuse1_backend("counting")
    attach(library)
    torch._register_device_module("counting", torch_module)
    torch.utils.generate_methods_for_privateuse1_backend()


def load():
    """`torch.counting`; compiled at the first call on a machine (10 seconds), registered at the first in a process."""
    register()
    # Autograd starts its threads, one for each device there is, at the first backward pass of a process; that may have
    # been before there was this one. Without threads of their own, backward passes also stay on their streams.
    torch._C._set_multithreading_enabled(False)
    return torch_module


def crossing(action) -> tuple[int, int]:
    """Bytes that an action carries to the device and back."""
    with counted() as block:
        action()
    return block.h2d, block.d2h
