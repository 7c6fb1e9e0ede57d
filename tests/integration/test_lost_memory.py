"""A pass never leaves the memory out because something could not be found: it is right, or it is an error.

Each test has the backbone's logits as its control: "silently off" would be equal to them. Compiled code runs with the
backend "eager", which traces as the others do; logits then differ by rounding alone (1e-5 in float32).
Run: pytest tests/integration/test_lost_memory.py
"""

import copy
import threading

import pytest
import torch
from accelerate.utils import compile_regions
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from engram_transformers.compat_engram import CHECKPOINTS_RUN_HOOKS


pytestmark = pytest.mark.core

IDS = torch.arange(24, device="cpu").view(2, 12) * 7 + 5
TOLERANCE = 1e-5


@pytest.fixture
def model(tiny_engram):
    torch._dynamo.reset()
    return tiny_engram(trained=True)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


@torch.no_grad()
def donors(model, ids=IDS):
    with model.disable_memory():
        return model(ids, use_cache=False).logits


def same(found, wanted) -> bool:
    return bool((found - wanted).abs().max() < TOLERANCE)


def compile_layers(model):
    for layer in model.backbone.model.layers:
        layer.compile(backend="eager")
    return model


def compile_module(name):
    def compiled(model):
        model.get_submodule(name).compile(backend="eager")
        return model

    return compiled


COMPILED = {
    "regions": lambda model: compile_regions(model, backend="eager"),
    "every layer": compile_layers,
    "backbone": compile_module("backbone"),
    "base model": compile_module("backbone.model"),
    "whole": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


def refused_by_the_backbone_too(how, model, plain) -> bool:
    """Whether these versions of torch and Transformers cannot compile the plain model in this way; ours then raises."""
    alone = {"backbone": plain, "base model": plain.model}.get(how, plain)
    if how in ("backbone", "base model"):
        alone.compile(backend="eager")
    else:
        plain = torch.compile(plain, backend="eager", fullgraph=True)
    try:
        logits(plain)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises
        with pytest.raises(type(error)):
            logits(COMPILED[how](model))
        return True
    return False


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_that_is_compiled_in_part_or_whole_reads_its_memory(how, model, tiny_donor):
    if how in ("backbone", "base model", "whole") and refused_by_the_backbone_too(
        how, copy.deepcopy(model), tiny_donor()
    ):
        return
    torch._dynamo.reset()
    wanted, plain = logits(model), donors(model)
    assert not same(wanted, plain), "control: the memory must be seen"
    compiled = COMPILED[how](model)
    if how == "regions" and CHECKPOINTS_RUN_HOOKS:  # layers of Transformers before 5.23, compiled, may run no hooks
        try:
            logits(compiled)
        except RuntimeError as error:
            assert "was not added" in str(error)
            return
    for _ in range(2):
        assert same(logits(compiled), wanted)
    with model.disable_memory():
        assert same(logits(compiled), plain)
    assert same(logits(compiled), wanted)


@pytest.mark.parametrize("how", ["every layer", "whole"])
def test_threads_on_one_compiled_model_get_their_own_results(how, model, tiny_donor):
    if how == "whole" and refused_by_the_backbone_too(how, copy.deepcopy(model), tiny_donor()):
        return
    torch._dynamo.reset()
    texts = [IDS, IDS.flip(1), IDS + 9]
    wanted = [logits(model, text) for text in texts]
    compiled, found = COMPILED[how](model), [None] * len(texts)
    logits(compiled)  # compiled before the threads begin, which torch does one at a time

    def run(number):
        found[number] = [logits(compiled, texts[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, wanted, strict=True):
        assert all(same(result, expected) for result in results)


def test_a_pass_inside_a_pass_leaves_the_outer_one_its_reads(model):
    wanted, other, inner = logits(model), logits(model, IDS.flip(1)), []

    def read_another(*_):
        handle.remove()
        inner.extend([logits(model, IDS.flip(1)), donors(model)])

    handle = model.backbone.model.layers[0].register_forward_pre_hook(read_another)
    assert same(logits(model), wanted)
    assert same(inner[0], other) and same(inner[1], donors(model))


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_checkpointing_from_outside_of_a_layer_is_an_error(kind, model):
    model.set_trainable("all").train()
    layers = tuple(model.backbone.model.layers)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda layer: checkpoint_wrapper(layer, checkpoint_impl=kind),
        check_fn=lambda module: any(module is layer for layer in layers),
    )
    loss = model(IDS, labels=IDS, use_cache=False).loss
    with pytest.raises(RuntimeError, match="runs outside of its model's forward pass"):
        loss.backward()


def replica_of(model):
    """A copy as nn.DataParallel makes it: parameters are plain attributes. Its own function wants two GPUs."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = copies[child]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(twin, name, None if tensor is None else tensor.detach())
    return copies[model]


def test_a_replica_of_data_parallel_is_refused(model):
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*torchrun"):
        logits(replica_of(model))
    with pytest.raises(RuntimeError, match="lost their parameters"):
        _ = replica_of(model).memory.placement


def test_a_decoder_layer_by_itself_is_an_error_and_runs_without_memory_where_that_is_said(model):
    layer, stream = model.backbone.model.layers[1], torch.randn(1, 12, 32)
    positions = model.backbone.model.rotary_emb(stream, torch.arange(12)[None])
    with pytest.raises(RuntimeError, match="LlamaDecoderLayer 1 has an Engram memory and runs outside"):
        layer(stream, position_embeddings=positions)
    with model.disable_memory():
        layer(stream, position_embeddings=positions)
    logits(model.backbone)  # leaves no permission behind
    with pytest.raises(RuntimeError, match="runs outside"):
        layer(stream, position_embeddings=positions)


def test_a_layer_that_was_copied_by_itself_is_an_error(model):
    layers = model.backbone.model.layers
    layers[1] = copy.deepcopy(layers[1])
    with pytest.raises(RuntimeError, match="copied alone"):
        logits(model)


def test_a_layer_that_lost_its_hook_is_an_error(model):
    model.backbone.model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match=r"decoder layers \[2\] was not added"):
        logits(model)
    assert donors(model).shape == (2, 12, 4104)


def test_a_layer_that_runs_twice_in_a_pass_is_an_error(model):
    layers = model.backbone.model.layers
    layers[3] = layers[1]
    with pytest.raises(RuntimeError, match="runs a second time in one forward pass"):
        logits(model)


def test_a_backbone_that_fails_by_itself_leaves_no_permission_behind(model):
    handle = model.backbone.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model.backbone)
    handle.remove()
    assert model.reads_in_flight.current is None
