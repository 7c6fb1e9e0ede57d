"""A memory that was trained travels with the adapter's folder, by every way in and out, and is never lost in silence.

What is loaded is compared bit for bit with what was saved, and with the same adapter without its memory, which is the
control.

Run: pytest tests/integration/test_peft_memory.py
"""

import json
import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from engram_transformers import EngramForCausalLM, EngramFormatError
from engram_transformers.adapters.memory_delta import DELTA_NAME, named_parts, read_delta_header
from engram_transformers.files_atomic_engram import checkpoint_in

from .adapted import adapted, logits, lora, stir
from .backbones import HEADS
from .placed import loaded


PLACES = ["device", "cpu", "disk"]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@torch.no_grad()
def train(model, amount: float = 1.0, row: int = 7):
    """Stands for training a memory: one row of every part, and all dense weights."""
    for part in named_parts(model).values():
        rows = torch.tensor([row, part.table_shape[0] - 1])
        part.write(rows, part.read(rows) + amount)
    for weight in model.memory.layers.parameters():
        weight.mul_(1 + amount / 4)
    return model


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory):
    """An adapter's folder with a trained memory, and what its model says; tests only read it."""
    model = adapted(loaded(saved))
    train(model.get_base_model())
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model)


def by_peft(saved, folder, place):
    return PeftModel.from_pretrained(loaded(saved, place), folder)


def by_load_adapter_of_peft(saved, folder, place):
    model = adapted(loaded(saved, place), seed=3)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model.eval()


def by_load_adapter(saved, folder, place):
    model = loaded(saved, place)
    model.load_adapter(str(folder))
    return model


def by_auto_class(saved, folder, place):
    return AutoModelForCausalLM.from_pretrained(folder, engram_placement=place)


def by_our_class(saved, folder, place):
    return EngramForCausalLM.from_pretrained(
        saved, engram_placement=place, adapter_kwargs={"_adapter_model_path": str(folder)}
    )


def by_auto_class_of_peft(saved, folder, place):
    return AutoPeftModelForCausalLM.from_pretrained(folder, engram_placement=place)


ROUTES = [by_peft, by_load_adapter_of_peft, by_load_adapter, by_auto_class, by_our_class, by_auto_class_of_peft]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_every_way_of_loading_brings_the_memory_back(route, place, saved, trained, tmp_path):
    folder, expected = trained
    assert torch.equal(logits(route(saved, folder, place)), expected)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / DELTA_NAME).unlink()
    drop_key(bare)
    assert not torch.equal(logits(route(saved, bare, place)), expected), "control: the delta is what brings it"


def drop_key(folder):
    """Takes the delta out of an adapter's settings."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["engram_memory_delta"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("place", PLACES)
def test_a_memory_is_saved_where_it_changed_or_learns(place, saved, tmp_path):
    model = adapted(loaded(saved, place))
    model.save_pretrained(tmp_path / "frozen")
    assert not (tmp_path / "frozen" / DELTA_NAME).exists()
    assert "engram_memory_delta" not in (tmp_path / "frozen" / "adapter_config.json").read_text()

    model.set_trainable("memory+lora")
    model.save_pretrained(tmp_path / "learning")
    assert read_delta_header(tmp_path / "learning").rows == {}

    train(model.get_base_model())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.save_pretrained(tmp_path / "changed")
    assert set(read_delta_header(tmp_path / "changed").rows.values()) == {2}
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(saved, place), tmp_path / "changed")), logits(model))


def test_settings_say_twice_that_a_memory_belongs_to_an_adapter_and_only_while_it_does(saved, trained, tmp_path):
    """PEFT drops the one that it does not know, and keeps `auto_mapping` for a checkpoint's own copy of the code."""
    folder, _ = trained
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["engram_memory_delta"] == settings["auto_mapping"]["engram_memory_delta"] == DELTA_NAME
    model = by_peft(saved, folder, "disk")
    assert model.peft_config["default"].auto_mapping["engram_memory_delta"] == DELTA_NAME
    for part in named_parts(model.get_base_model()).values():
        part.store.clear()  # the graft's memory again
    model.memory.layers.load_state_dict(loaded(saved).memory.layers.state_dict())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / DELTA_NAME).exists()
    assert "engram_memory_delta" not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_one_changed_row_is_enough(place, saved, tmp_path):
    model = adapted(loaded(saved, place))
    name, part = next(iter(named_parts(model.get_base_model()).items()))
    rows = torch.tensor([part.table_shape[0] - 1])
    part.write(rows, part.read(rows) + 1)
    model.save_pretrained(tmp_path)
    assert read_delta_header(tmp_path).rows == {name: 1}


def test_one_changed_dense_weight_is_enough(saved, tmp_path):
    model = adapted(loaded(saved))
    with torch.no_grad():
        model.get_base_model().memory.layers["2"].key_norm[0, 3] += 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / DELTA_NAME).exists()


@pytest.mark.parametrize("learns", [True, False])
def test_an_older_checkpoint_in_an_adapters_folder_is_not_taken_for_its_base(learns, saved, tmp_path):
    other = loaded(saved)
    for weight in other.backbone.parameters():
        weight.data.mul_(1.5)
    train(other).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    model = adapted(loaded(saved), seed=4)
    if learns:
        train(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert (tmp_path / "notes.txt").exists()


def test_an_adapter_in_the_folder_of_its_base_leaves_that_a_whole_checkpoint(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    model = adapted(loaded(tmp_path), seed=4)
    train(model.get_base_model()).requires_grad_(True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / DELTA_NAME).exists() and checkpoint_in(tmp_path) == "whole"


def test_an_older_adapter_in_a_checkpoints_folder_is_not_put_on_top(saved, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    model = loaded(saved)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_pack_that_an_adapters_settings_do_not_name_is_an_error(saved, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    drop_key(tmp_path)
    with pytest.raises(EngramFormatError, match="lies beside an adapter whose settings do not name it"):
        loaded(saved).load_adapter(tmp_path)


def test_an_older_pack_does_not_stay_beside_a_newer_adapter(saved, trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained[0], folder)
    model = adapted(loaded(saved), seed=4)
    model.save_pretrained(folder)
    assert not (folder / DELTA_NAME).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(saved), folder)), logits(model))


def test_other_processes_write_nothing(saved, tmp_path):
    model = adapted(loaded(saved))
    train(model.get_base_model())
    model.save_pretrained(tmp_path / "there", is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_belongs_together_is_told_to_processes_that_do_not_know_the_package(saved, trained):
    folder, expected = trained
    with pytest.warns(UserWarning, match="engram_memory_delta"):
        PeftConfig.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        assert torch.equal(logits(by_peft(saved, folder, "device")), expected)


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_an_adapter_with_a_memory_is_refused_by_a_model_without_one(second, trained, tmp_path):
    donor = AutoModelForCausalLM.from_config(LlamaConfig(**HEADS))
    model = get_peft_model(donor, lora()) if second else donor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def load(folder, **where):
        if second:
            return model.load_adapter(folder, "second", **where)
        return PeftModel.from_pretrained(model, folder, **where)

    for folder, where in ((trained[0], {}), (trained[0].parent, {"subfolder": trained[0].name})):
        with pytest.raises(ValueError, match=r"together with a memory, which this model has not: load it with AutoMod"):
            load(folder, **where)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    donors = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**HEADS)), lora()).save_pretrained(donors)
    load(donors)  # control: any other is loaded


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_a_pack_that_is_named_and_not_there_is_an_error(route, saved, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "adapter")
    (tmp_path / "adapter" / DELTA_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"was saved with a memory, and memory_delta\.safetensors is not there"):
        route(saved, tmp_path / "adapter", "device")


@pytest.mark.parametrize("fields", [{"engram_seed": 1}, {"engram_head_dim": 8}], ids=["constants", "sizes"])
def test_the_memory_of_another_graft_is_refused_and_nothing_is_changed(
    fields, tiny_engram, tiny_donor, trained, tmp_path
):
    donor = tiny_donor(LlamaConfig(**HEADS))
    tiny_engram(trained=True, seed=9, donor=donor, **fields).save_pretrained(tmp_path)
    before = logits(loaded(tmp_path))
    for route in (by_peft, by_load_adapter):
        model = loaded(tmp_path)
        with pytest.raises(EngramFormatError):
            if route is by_peft:
                PeftModel.from_pretrained(model, trained[0])
            else:
                model.load_adapter(str(trained[0]))
        assert torch.equal(logits(model), before)
        assert not any("lora" in name for name, _ in model.named_modules())


def test_a_memory_whose_base_is_gone_is_refused_by_another_base(saved, tiny_engram, tiny_donor, tmp_path):
    donor = tiny_donor(LlamaConfig(**HEADS))
    tiny_engram(trained=True, seed=9, donor=donor).save_pretrained(tmp_path / "base")
    model = adapted(loaded(tmp_path / "base"))
    train(model.get_base_model()).set_trainable("memory+lora")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(EngramFormatError, match="has other rows or weights"):
        PeftModel.from_pretrained(loaded(saved), tmp_path / "adapter")
    found = PeftModel.from_pretrained(loaded(tmp_path / "moved"), tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model)), "control: the same base elsewhere will do"


def test_a_damaged_pack_is_refused(saved, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "adapter")
    delta = tmp_path / "adapter" / DELTA_NAME
    delta.write_bytes(delta.read_bytes()[:-100])
    with pytest.raises(EngramFormatError):
        by_peft(saved, tmp_path / "adapter", "device")


def test_every_adapter_of_a_model_is_saved_with_its_one_memory(saved, tmp_path):
    model = adapted(loaded(saved))
    model.add_adapter("second", lora())
    stir(model, 1, "second")
    train(model.get_base_model())
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / DELTA_NAME).read_bytes() == (tmp_path / "second" / DELTA_NAME).read_bytes()
    again = PeftModel.from_pretrained(loaded(saved), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    assert torch.equal(logits(again.eval()), second)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(saved), tmp_path / "second")), second), "or alone"


def test_a_second_memory_is_refused_and_the_first_stays(saved, trained, tmp_path):
    folder, expected = trained
    other = adapted(loaded(saved), seed=2)
    train(other.get_base_model(), amount=0.5, row=3)
    other.save_pretrained(tmp_path)
    model = by_peft(saved, folder, "device")
    with pytest.raises(ValueError, match="brings another memory than 'default'"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), expected)
    native = by_load_adapter(saved, folder, "device")
    with pytest.raises(ValueError, match="brings another memory than 'default'"):
        native.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(native), expected)


def test_loading_an_adapter_again_brings_its_memory_back_whole(saved, trained):
    folder, expected = trained
    model = by_peft(saved, folder, "device")
    train(model.get_base_model(), amount=2.0, row=5)
    stir(model, 8)
    assert not torch.equal(logits(model), expected), "control"
    model.load_adapter(folder, "default")
    assert torch.equal(logits(model), expected), "row 5 is the graft's again"


def test_an_adapter_without_a_memory_leaves_it_as_it_is(saved, tmp_path):
    plain = adapted(loaded(saved))
    plain.save_pretrained(tmp_path)
    model = train(loaded(saved))
    expected = logits(train(adapted(loaded(saved)).get_base_model()))
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path)), expected)


def test_a_trained_graft_that_is_in_no_folder_is_not_saved_in_part(tiny_engram, tmp_path):
    model = adapted(tiny_engram(trained=True))
    with pytest.raises(ValueError, match=r"graft that is in no folder.*merge_and_unload"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapted(tiny_engram()).save_pretrained(tmp_path / "fresh")  # nothing to lose
    assert not (tmp_path / "fresh" / DELTA_NAME).exists()
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded(tmp_path / "whole")), logits(whole))


def test_a_graft_that_was_saved_first_is_the_base_of_its_adapters(tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "graft")
    model = adapted(model)
    train(model.get_base_model())
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "graft")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.native_peft
def test_a_model_that_carries_its_adapter_itself_saves_the_memory_beside_it(saved, trained, tmp_path):
    model = by_load_adapter(saved, trained[0], "cpu")
    train(model, amount=0.5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / DELTA_NAME).exists()
    for route in (by_peft, by_load_adapter, by_auto_class):
        assert torch.equal(logits(route(saved, tmp_path, "device")), logits(model))


def test_a_memory_that_is_not_loaded_waits_and_is_not_lost(saved, trained, tmp_path):
    folder, expected = trained
    for model in (by_auto_class(saved, folder, "none"), by_peft(saved, folder, "none")):
        assert not torch.equal(logits(model), expected), "control: it runs as its donor"
        with pytest.raises(ValueError, match="a save would lose it"):
            model.save_pretrained(tmp_path / "lost")
        model.place_memory("disk")
        assert torch.equal(logits(model), expected)


def test_lora_on_the_projections_and_their_training_are_kept_apart(saved, tmp_path):
    model = adapted(loaded(saved), config=lora(target_modules=["key_value", "v_proj"]))
    model.set_trainable("memory+lora")
    train_only_memory = [p for n, p in model.get_base_model().memory.layers.named_parameters() if "lora_" not in n]
    with torch.no_grad():
        for weight in train_only_memory:
            weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    names = (tmp_path / DELTA_NAME).read_bytes()[:4000]
    assert b"memory.layers.1.key_value.weight" in names
    assert b"lora" not in names
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(saved), tmp_path)), logits(model))


def test_an_adapter_on_the_hub_brings_its_memory(saved, trained, tmp_path):
    folder, expected = trained
    repository = tmp_path / "models--someone--adapter"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    model = PeftModel.from_pretrained(loaded(saved), "someone/adapter", cache_dir=str(tmp_path))
    assert torch.equal(logits(model), expected)
