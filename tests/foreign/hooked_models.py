"""A pytest plugin for accelerate's tests: every model that they define carries Engram's hook on each of its submodules.

No text is being read while they run, so the hook has to let everything pass as it is; what is tested is that it stays
out of the way of accelerate's own hooks, offloading, copying and tracing. Copied beside the tests by
`tests.foreign.layout`; a run in which no hook was ever called fails.
"""

import inspect

import pytest
from torch import nn

from engram_transformers.memory_engram import InsertMemory, ReadsInFlight


class CountedHook(InsertMemory):
    """Engram's hook, counting how often it is called."""

    calls = 0

    def __call__(self, *args):
        CountedHook.calls += 1
        return super().__call__(*args)


def carrying_hooks(make):
    """Wraps a model's `__init__` so that its submodules get hooks."""

    def make_with_hooks(self, *args, **kwargs):
        make(self, *args, **kwargs)
        for number, module in enumerate(self.modules()):
            hook = CountedHook(nn.Identity(), number, ReadsInFlight())
            module.register_forward_pre_hook(hook, with_kwargs=True)

    return make_with_hooks


@pytest.fixture(autouse=True)
def hooked_models(request, monkeypatch):
    for model in vars(request.module).values():
        if inspect.isclass(model) and issubclass(model, nn.Module) and model.__module__ == request.module.__name__:
            # The signature is kept because accelerate and torch.fx look at it.
            monkeypatch.setattr(model, "__init__", carrying_hooks(model.__init__))


def pytest_sessionfinish(session):
    print(f"\nEngram hooks called: {CountedHook.calls}")
    if not CountedHook.calls:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
