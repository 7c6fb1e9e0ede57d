"""offload_embedding on big embeddings of other models: outputs and files stay, rows travel in place of tables, undoing
it gives the weight back, and what cannot work is refused.

Bytes are counted on the device of tests/counting_device.
Run: pytest tests/integration/test_embedding_offload.py
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen4ExpTextConfig

from engram_transformers import EngramFormatError
from engram_transformers.embedding_offload import offload_embedding

from ..counting_device import counted, crossing
from .backbones import HEADS, MIXED, gemma3n, qwen4_exp
from .placed import logits, repeating_texts, same


def gemma4_text():
    sizes = {"vocab_size_per_layer_input": 4104, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    return Gemma4TextConfig(**HEADS, **MIXED, **sizes)


def ngrams():
    """With transformers' own n-gram table, in the first layer."""
    config = qwen4_exp().to_dict()
    sizes = {"heads_per_ngram": 2, "ple_embed_dim": 32, "ngram_vocab_size_base": 500}
    config |= {"ple_layer_ids": [1], "make_ngram_vocab_size_divisible_by": 1, **sizes}
    del config["number_of_conv_states"]  # follows from the rest
    return Qwen4ExpTextConfig.from_dict(config)


MODELS = {
    "gemma3n": (gemma3n, "embed_tokens_per_layer"),
    "gemma4_text": (gemma4_text, "embed_tokens_per_layer"),
    "qwen4_exp": (ngrams, "ngram_embedding"),
}


def made(name: str) -> tuple[nn.Module, str]:
    """A model without zero weights, which would leave what it reads unused, and the name of its big embedding."""
    torch.manual_seed(0)
    config, ending = MODELS[name]
    options = {"experts_implementation": "eager"} if name == "qwen4_exp" else {}
    model = AutoModelForCausalLM.from_config(config(), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    (found,) = [name for name, _ in model.named_modules() if name.endswith(ending)]
    return model, found


@pytest.fixture(scope="module", params=MODELS)
def plain(request, tmp_path_factory):
    """A model that tests only read, the name of its big embedding, its checkpoint, and a file with the embedding."""
    model, name = made(request.param)
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if request.param == "qwen4_exp":  # whose checkpoints hold the table in hundreds of pieces
        file = tmp_path_factory.mktemp("table") / "table.safetensors"
        save_file({"weight": model.get_submodule(name).weight.detach()}, file)
    return model, name, folder, file


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return repeating_texts()


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_outputs_files_and_names_stay_and_rows_travel(placement, plain, device, ids, tmp_path):
    plain, name, folder, file = plain
    expected, weight = logits(plain, ids), plain.get_submodule(name).weight.detach()
    model = copy.deepcopy(plain)
    embedding = model.get_submodule(name)
    before = [(key, p.dtype, p.device, p.requires_grad) for key, p in model.named_parameters()]
    assert offload_embedding(embedding, placement, file if placement == "disk" else None) is embedding
    assert [(key, p.dtype, p.device, p.requires_grad) for key, p in model.named_parameters()] == before
    assert embedding.weight.shape == (0, weight.shape[1])
    assert torch.equal(logits(model, ids), expected)

    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in folder.iterdir())

    read = []
    look = plain.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    logits(plain, ids)
    look.remove()
    there, other = ids.to("counting"), copy.deepcopy(plain)
    whole = crossing(lambda: other.to("counting"))[0]
    assert crossing(lambda: model.to("counting"))[0] == whole - weight.nbytes
    alone, (up, down) = crossing(lambda: logits(other, there)), crossing(lambda: logits(model, there))
    unique = read[0].unique().numel()
    assert up - alone[0] == unique * weight.shape[1] * 4 + read[0].numel() * (1 if unique <= 256 else 2)
    assert down - alone[1] == read[0].numel() * 8
    expected_there = logits(other, there)
    assert torch.equal(logits(model, there), expected_there)
    (table,) = embedding._hf_hook.store.tensors()
    if placement == "cpu":
        saved = table.clone()
        table.zero_()
        assert not same(logits(model, there), expected_there), "control: the table is heard"
        table.copy_(saved)

    remove_hook_from_module(model, recurse=True)
    assert torch.equal(embedding.weight, weight) and embedding.weight.is_cpu and embedding.weight.requires_grad
    assert torch.equal(logits(model.to("cpu"), ids), expected)
    assert not embedding._state_dict_hooks and embedding.padding_idx == plain.get_submodule(name).padding_idx
    offload_embedding(embedding, "cpu")  # and again
    assert torch.equal(logits(model, ids), expected)


def test_accelerate_brings_it_whole(plain, device, ids):
    """Control of the count above."""
    plain, name, *_ = plain
    cpu_offload(theirs := copy.deepcopy(plain), "counting:0")
    assert crossing(lambda: logits(theirs, ids.to("counting")))[0] >= plain.get_submodule(name).weight.nbytes


class PassOn(ModelHook):
    """A hook of somebody else's."""


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_others_stay(first, device, ids):
    embedding = nn.Embedding(4104, 8)
    expected = embedding(ids)
    align, other = AlignDevicesHook("counting:0", io_same_device=True), PassOn()
    if first:
        add_hook_to_module(embedding, align)
    offload_embedding(embedding.to("counting"))
    with counted() as block:
        add_hook_to_module(embedding, other if first else align, append=True)
    assert first or block.h2d + block.d2h == 0, "appending a hook carries no table"
    assert embedding.weight.device.type == "counting"
    with torch.no_grad():
        found = embedding(ids)
    assert found.device == ids.device and torch.equal(found, expected)


def test_the_type_and_the_copies_of_a_module_are_its_own(plain, ids):
    plain, name, *_ = plain
    model, halved = copy.deepcopy(plain), copy.deepcopy(plain).bfloat16()
    offload_embedding(model.get_submodule(name))
    twin = copy.deepcopy(model).bfloat16()
    assert torch.equal(logits(twin, ids), logits(halved, ids))
    assert twin.state_dict()[f"{name}.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        twin.get_submodule(name)._hf_hook.store.parts[0].zero_()
    assert not torch.equal(logits(twin, ids), logits(halved, ids))
    assert torch.equal(logits(model, ids), logits(plain, ids))
    remove_hook_from_module(twin.get_submodule(name))
    assert not twin.state_dict()[f"{name}.weight"].any()
    assert torch.equal(model.state_dict()[f"{name}.weight"], plain.state_dict()[f"{name}.weight"])


def test_threads_share_an_embedding():
    embedding = nn.Embedding(1000, 4, padding_idx=7).requires_grad_(False)
    expected = embedding.weight.clone()
    offload_embedding(embedding)
    texts = torch.randint(0, 1000, (200, 50))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(embedding, texts))
    assert all(torch.equal(rows, expected[text]) for rows, text in zip(found, texts, strict=True))
    assert embedding(torch.empty(2, 0, dtype=torch.int32)).shape == (2, 0, 4)
    assert torch.equal(embedding(input=torch.tensor([3])), expected[[3]])
    with pytest.raises(IndexError, match="row 1000 is outside"):
        embedding(torch.tensor([1000]))


def test_a_gradient_that_reaches_it_is_an_error_and_the_rest_learns(plain, ids):
    plain, name, *_ = plain
    model, control = copy.deepcopy(plain), copy.deepcopy(plain)
    offload_embedding(model.get_submodule(name))
    for each in (model.train(), control.train()):
        each.get_submodule(name).requires_grad_(False)
        each(input_ids=ids, labels=ids).loss.backward()
    grads = [{key: p.grad for key, p in each.named_parameters() if p.grad is not None} for each in (model, control)]
    assert list(grads[0]) == list(grads[1])
    assert all(torch.equal(*pair) for pair in zip(grads[0].values(), grads[1].values(), strict=True))
    model.get_submodule(name).requires_grad_(True)
    loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="does not learn: freeze it"):
        loss.backward()
    remove_hook_from_module(model.get_submodule(name))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_submodule(name).weight.grad.any(), "control: undone, it learns"


def test_resizing_and_loading_an_offloaded_embedding_are_errors(ids):
    model, name = made("gemma3n")
    whole, old = model.state_dict(), model.get_submodule(name).weight.detach()
    offload_embedding(model.get_submodule(name))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}.weight"):
        model.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="was resized while it was offloaded"):
        model.resize_token_embeddings(4110, mean_resizing=False)
    with pytest.raises(RuntimeError, match="was replaced while it was offloaded"):
        model(input_ids=ids)
    remove_hook_from_module(model.get_submodule(name))
    assert torch.equal(model.get_submodule(name).weight, old)


def test_a_file_that_is_not_the_weight_s_is_refused_and_one_that_changes_is_an_error(plain, ids, tmp_path):
    plain, name, _, file = plain
    model = copy.deepcopy(plain)
    embedding, tensors = model.get_submodule(name), load_file(file)
    (key,) = [key for key, tensor in tensors.items() if torch.equal(tensor, embedding.weight)]
    wrong = tensors | {key: tensors[key].clone()}
    wrong[key][-1, -1] += 1
    for number, held in enumerate([wrong, tensors | {key: tensors[key].view(torch.int32)}]):
        save_file(held, tmp_path / f"{number}.safetensors")
    for checkpoint in (tmp_path, tmp_path / "0.safetensors"):
        with pytest.raises(ValueError, match="no tensor of .* is the weight"):
            offload_embedding(embedding, "disk", checkpoint)
    assert not hasattr(embedding, "_hf_hook") and embedding.weight.shape == tensors[key].shape
    save_file(tensors, mine := tmp_path / "2.safetensors")
    offload_embedding(embedding, "disk", tmp_path)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    mine.rename(tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path)  # replaces the file that is read
    (tmp_path / "model.safetensors").rename(mine)
    assert torch.equal(logits(model, ids), logits(plain, ids)), "what was opened goes on being read"
    remove_hook_from_module(embedding)
    save_file(tensors, mine)
    offload_embedding(embedding, "disk", mine)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    mine.write_bytes(mine.read_bytes())
    with pytest.raises(EngramFormatError, match="changed while its rows were in use"):
        logits(model, ids)


class Positions(nn.Embedding):
    """An embedding that takes more than ids."""

    def forward(self, ids, offset=2):
        return super().forward(ids + offset)


class Quantised(nn.Parameter):
    """A weight that is not what it looks like."""


def quantised() -> nn.Embedding:
    embedding = nn.Embedding(5, 2)
    embedding.weight = Quantised(embedding.weight.detach())
    return embedding


def patched() -> nn.Embedding:
    embedding = nn.Embedding(5, 2)
    embedding.forward = lambda ids: embedding.weight[ids] * 2
    return embedding


REFUSED = {
    "a model": (TypeError, "Sequential .* is not an nn.Embedding", lambda: nn.Sequential(nn.Embedding(5, 2))),
    "a linear layer": (TypeError, "Linear .* is not an nn.Embedding", lambda: nn.Linear(2, 2)),
    "a bag": (TypeError, "EmbeddingBag", lambda: nn.EmbeddingBag(5, 2)),
    "rows that are changed by reads": (TypeError, "max_norm", lambda: nn.Embedding(5, 2, max_norm=1.0)),
    "other arguments": (TypeError, "Positions.forward must take ids", lambda: Positions(5, 2)),
    "another forward": (TypeError, "Embedding.forward must take ids", patched),
    "not loaded": (ValueError, "not loaded", lambda: nn.Embedding(5, 2, device="meta")),
    "quantised": (TypeError, "weight: Quantised", quantised),
    "twice": (ValueError, "offloaded already", lambda: offload_embedding(nn.Embedding(5, 2))),
}


@pytest.mark.parametrize(("error", "words", "make"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_offloaded_is_refused_and_left_alone(error, words, make):
    module = make()
    before = set(vars(module))
    with pytest.raises(error, match=words):
        offload_embedding(module)
    assert set(vars(module)) == before


def test_a_tied_weight_is_refused_and_an_equal_one_is_not():
    model, name = made("gemma3n")
    with pytest.raises(ValueError, match="tied to a Linear"):
        offload_embedding(model.get_input_embeddings())
    twin = copy.deepcopy(model)
    named = dict(twin.named_parameters())  # who holds a weight without being a module does not matter
    assert offload_embedding(twin.get_submodule(name)).weight is not named[f"{name}.weight"]


def test_a_forward_that_was_replaced_by_a_method_is_run():
    embedding = nn.Embedding(5, 2).requires_grad_(False)
    embedding.forward = MethodType(lambda self, ids: nn.functional.embedding(ids, self.weight) * 2, embedding)
    expected = embedding(torch.arange(5))
    assert torch.equal(offload_embedding(embedding)(torch.arange(5)), expected)


@pytest.mark.parametrize("given", [("gpu",), ("disk",), ("cpu", "model.safetensors")])
def test_a_placement_is_cpu_alone_or_disk_with_a_checkpoint(given):
    with pytest.raises(ValueError, match="give 'cpu' alone, or 'disk' and a checkpoint"):
        offload_embedding(nn.Embedding(5, 2), *given)
