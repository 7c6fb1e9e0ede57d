"""Trainer around a PeftModel with a memory: both learn, checkpoints hold both, and a run that is resumed ends as if it
had not been stopped, bit for bit.

Run: pytest tests/integration/test_peft_training.py
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from engram_transformers import EngramTrainer
from engram_transformers.adapters.memory_delta import named_parts
from engram_transformers.training import create_optimizer

from .adapted import logits, lora
from .placed import loaded


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

PLACES = ["device", "cpu", "disk"]


@pytest.fixture
def dataset():
    texts = torch.randint(3, 300, (24, 20), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": text, "labels": text} for text in texts]


@pytest.fixture
def arguments(tmp_path):
    """Factory of arguments for a short run."""

    def make(name="run", **changes):
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return TrainingArguments(str(tmp_path / name), **{**settings, **changes})

    return make


def made(saved, place="device", **settings):
    """A PeftModel whose memory and adapter learn."""
    torch.manual_seed(0)
    model = get_peft_model(loaded(saved, place), lora(**settings))
    model.set_trainable("memory+lora")
    return model


def weights(model) -> dict[str, torch.Tensor]:
    """Everything that a model holds, tables that are away included."""
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name.replace("base_model.model.", ""): tensor for name, tensor in held.items()}


def kinds_that_differ(before, after) -> set[str]:
    """What changed: "tables", "layers", "adapter", "backbone"."""
    kinds = {"memory.tables": "tables", "memory.layers": "layers", "lora_": "adapter"}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {next((kind for part, kind in kinds.items() if part in name), "backbone") for name in changed}


@pytest.mark.parametrize("place", PLACES)
def test_memory_and_adapter_learn_and_the_backbone_does_not(place, saved, dataset, arguments):
    model = made(saved, place)
    before = weights(model)
    EngramTrainer(model, arguments(), train_dataset=dataset).train()
    assert kinds_that_differ(before, weights(model)) == {"tables", "layers", "adapter"}


def test_without_a_word_a_model_with_adapters_trains_both(saved, dataset, arguments):
    model = get_peft_model(loaded(saved), lora())
    before = weights(model)
    EngramTrainer(model, arguments(), train_dataset=dataset).train()
    assert kinds_that_differ(before, weights(model)) == {"tables", "layers", "adapter"}


def test_a_frozen_memory_stays_as_it_was(saved, dataset, arguments):
    model = get_peft_model(loaded(saved), lora())
    before = weights(model)
    Trainer(model, arguments(), train_dataset=dataset).train()
    assert kinds_that_differ(before, weights(model)) == {"adapter"}


@pytest.mark.parametrize("place", PLACES)
def test_the_optimizer_finds_every_group_in_a_peft_model(place, saved):
    model = made(saved, place)
    groups = {group["name"]: group["params"] for group in create_optimizer(model).param_groups}
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert {id(p) for p in groups["tables"]} == {id(p) for p in named_parts(model.get_base_model()).values()}
    assert {id(p) for p in groups["backbone"]} == adapters
    assert len(groups["projections"]) == 2


def test_projections_with_an_adapter_of_their_own_are_in_their_group(saved):
    model = made(saved, target_modules=["key_value", "q_proj"])
    groups = {group["name"]: group["params"] for group in create_optimizer(model).param_groups}
    own = [layer.key_value.get_base_layer().weight for layer in model.memory.layers.values()]
    assert {id(p) for p in own} <= {id(p) for p in groups["projections"]}
    every = [id(p) for params in groups.values() for p in params]
    assert len(every) == len(set(every)), "each once"


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(place, saved, dataset, arguments):
    straight = made(saved, place)
    EngramTrainer(straight, arguments("straight"), train_dataset=dataset).train()
    settings = arguments("stopped", save_strategy="steps", save_steps=3)
    EngramTrainer(made(saved, place), settings, train_dataset=dataset).train()
    checkpoint = f"{settings.output_dir}/checkpoint-3"
    resumed = made(saved, place)
    EngramTrainer(resumed, settings, train_dataset=dataset).train(resume_from_checkpoint=checkpoint)
    ends, expected = weights(resumed), weights(straight)
    assert ends.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ends[name], expected[name])] == []
    assert kinds_that_differ(weights(made(saved, place)), expected) == {"tables", "layers", "adapter"}, "control"


def test_a_checkpoint_of_a_run_is_an_adapters_folder_with_its_memory(saved, dataset, arguments):
    model = made(saved)
    settings = arguments(save_strategy="steps", save_steps=6)
    EngramTrainer(model, settings, train_dataset=dataset).train()
    folder = f"{settings.output_dir}/checkpoint-6"
    model.eval()
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(saved), folder)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


@pytest.mark.parametrize("place", ["device", "disk"])
def test_the_best_model_comes_back_with_its_memory(place, saved, dataset, arguments):
    model = made(saved, place)
    settings = arguments(
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint is called the best
    )
    trainer = EngramTrainer(model, settings, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("-2"), "control: not the last"
    expected = PeftModel.from_pretrained(loaded(saved, place), best)
    assert torch.equal(logits(model.eval()), logits(expected))


def test_a_run_of_a_fresh_graft_says_what_to_do_before_it_saves(tiny_engram, dataset, arguments, tmp_path):
    model = get_peft_model(tiny_engram(), lora())
    model.set_trainable("memory+lora")
    settings = arguments(save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="in no folder.*save_pretrained"):
        EngramTrainer(model, settings, train_dataset=dataset).train()
    graft = tiny_engram()
    graft.save_pretrained(tmp_path / "graft")
    model = get_peft_model(graft, lora())
    model.set_trainable("memory+lora")
    EngramTrainer(model, settings, train_dataset=dataset).train()
    found = AutoModelForCausalLM.from_pretrained(f"{settings.output_dir}/checkpoint-6")
    assert torch.equal(logits(found), logits(model.eval()))


def test_trainer_of_transformers_trains_both_with_our_optimizer(saved, dataset, arguments):
    model = made(saved, "cpu")
    before = weights(model)
    settings = arguments(save_strategy="steps", save_steps=6)
    Trainer(model, settings, train_dataset=dataset, optimizers=(create_optimizer(model, lr=1e-2), None)).train()
    assert kinds_that_differ(before, weights(model)) == {"tables", "layers", "adapter"}
    folder = f"{settings.output_dir}/checkpoint-6"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model.eval()))
