"""TRL's SFTTrainer trains a memory: alone and beside LoRA, packed and padded, saved and loaded again.

Losses and gradients equal those of a plain forward pass to 1e-5 in float32, those of a packed batch those of separate
documents; weights that must not change, and what is loaded again, are compared bit by bit.
Run: pytest tests/integration/test_trl.py
"""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engram_transformers import EngramForCausalLM
from engram_transformers.adapters import load_memory_delta, save_changes, save_memory_delta
from engram_transformers.rows_gradient_engram import RowGradient, row_gradient
from engram_transformers.training import EngramTrainerMixin, EngramTrainingArguments, create_optimizer, select_rows

from .test_generation import TOLERANCE


trl = pytest.importorskip("trl", reason="TRL is an extra: pip install engram-transformers[trl]")
datasets = pytest.importorskip("datasets", reason="comes with the trl extra")

TEXTS = ["the sea is deep and blue", "a ship", "the town was taken by the Turks after a siege", "no word of it"]


class EngramSFTTrainer(EngramTrainerMixin, trl.SFTTrainer):
    pass


@dataclass
class EngramSFTConfig(trl.SFTConfig, EngramTrainingArguments):
    pass


@pytest.fixture
def arguments(tmp_path):
    """Factory of arguments for a short run in float32; what TRL does by default is given by name."""

    def make(kind=trl.SFTConfig, **changes):
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return kind(str(tmp_path / "run"), **{**settings, **changes})

    return make


@pytest.fixture
def texts():
    return datasets.Dataset.from_dict({"text": TEXTS})


def lora(**changes) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **changes)


def clone(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before) -> set[str]:
    """Parts of a model that differ from a state dict: "tables", "layers", "lora", "backbone"."""
    names = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = ("memory.tables.", "memory.layers.", ".lora_", "backbone.")
    return {next(kind for kind in kinds if kind in name).strip("._").split(".")[-1] for name in names}


def one_batch(trainer) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


# The plain SFTTrainer, with our optimizer.


@pytest.mark.parametrize("defaults", [False, True])
def test_the_memory_alone_is_trained_by_the_plain_trainer(defaults, texts, arguments, tiny_engram, tiny_tokenizer):
    model = tiny_engram().set_trainable("memory")
    before = clone(model)
    args = arguments(gradient_checkpointing=defaults, bf16=defaults)  # both are on in TRL
    optimizer = create_optimizer(model, lr=1e-2)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=texts, processing_class=tiny_tokenizer, optimizers=(optimizer, None)
    )
    trainer.train()
    assert changed(model, before) == {"tables", "layers"}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_loss_is_the_models_own(packing, adapters, texts, arguments, tiny_engram, tiny_tokenizer):
    model = tiny_engram(trained=True)
    args = arguments(packing=packing, max_length=64)
    config = lora(init_lora_weights=False) if adapters else None
    trainer = trl.SFTTrainer(model, args, train_dataset=texts, processing_class=tiny_tokenizer, peft_config=config)
    batch = one_batch(trainer)
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
        own = float(trainer.model(**batch, use_cache=False).loss)
        with model.disable_memory():
            off = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert loss == pytest.approx(own, abs=TOLERANCE)
    assert abs(loss - off) > 0.01, "control: without memory"


def test_the_base_model_gives_hidden_states_with_memory(tiny_engram):
    model, ids = tiny_engram(trained=True), torch.randint(3, 4000, (2, 9))
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits, rtol=0, atol=TOLERANCE)
        with model.disable_memory():
            donors = model.base_model(ids, use_cache=False).last_hidden_state
        assert torch.equal(donors, model.backbone.base_model(ids, use_cache=False).last_hidden_state)
    assert (hidden - donors).abs().max() > 0.1, "control: the backbone's own"
    assert model.base_model.config is model.backbone.config


def test_rows_are_clipped_with_everything_else(texts, arguments, tiny_engram, tiny_tokenizer):
    def norms(most: float) -> tuple[float, float]:
        model, seen = tiny_engram(trained=True).set_trainable("memory"), []
        optimizer = create_optimizer(model, lr=1e-3)

        def look(optimizer, args, kwargs):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            values = [g.row_values if isinstance(g := p.grad, RowGradient) else g for p in held if p.grad is not None]
            rows = [p.grad.row_values for p in held if row_gradient(p) is not None]
            seen.append((float(torch.nn.utils.get_total_norm(values)), float(torch.nn.utils.get_total_norm(rows))))

        optimizer.register_step_pre_hook(look)
        args = arguments(max_grad_norm=most, max_steps=1)
        trl.SFTTrainer(
            model, args, train_dataset=texts, processing_class=tiny_tokenizer, optimizers=(optimizer, None)
        ).train()
        return seen[0]

    free, clipped = norms(0.0), norms(0.01)
    assert free[0] > 0.1, "control: without clipping"
    assert clipped[0] == pytest.approx(0.01, rel=1e-4)
    assert clipped[1] == pytest.approx(free[1] * 0.01 / free[0], rel=1e-4)


def test_without_our_optimizer_the_first_step_says_what_to_use(texts, arguments, tiny_engram, tiny_tokenizer):
    model = tiny_engram().set_trainable("memory")
    trainer = trl.SFTTrainer(model, arguments(), train_dataset=texts, processing_class=tiny_tokenizer)
    with pytest.raises(TypeError, match="use EngramTrainer, or engram_transformers.training.create_optimizer"):
        trainer.train()


# Grafts that TRL loads by their folder, in float32 as it does by default.


@pytest.fixture
def named(tiny_engram, tiny_tokenizer, tmp_path):
    """`named(trainable)`: folder of a graft in bfloat16, whose configuration says what is trained."""

    def make(trainable: str) -> str:
        model = tiny_engram(trained=True, engram_table_dtype="bfloat16").set_trainable(trainable)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "graft")
        tiny_tokenizer.pad_token = tiny_tokenizer.pad_token or tiny_tokenizer.convert_ids_to_tokens(2)
        tiny_tokenizer.save_pretrained(tmp_path / "graft")
        return str(tmp_path / "graft")

    return make


def types_of(model) -> tuple[set, set]:
    """Types of the tables, and of everything else."""
    tables = {part.dtype for part in model.memory.named_parts().values()}
    return tables, {p.dtype for name, p in model.named_parameters() if "memory.tables." not in name}


AS_LOADED = ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
@pytest.mark.parametrize(("trainable", "parts"), [("tables", {"tables"}), ("memory", {"tables", "layers"})])
def test_a_folder_is_trained_as_its_configuration_says(placement, trainable, parts, texts, arguments, named, tmp_path):
    args = arguments(save_strategy="steps", save_steps=3, model_init_kwargs={"engram_placement": placement})
    trainer = EngramSFTTrainer(named(trainable), args, train_dataset=texts)
    model = trainer.model
    assert model.memory.placement == placement and types_of(model) == AS_LOADED
    before = clone(model)
    trainer.train()
    assert model.memory.placement == placement and types_of(model) == AS_LOADED
    assert changed(model, before) == parts
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3", dtype=torch.float32)
    assert types_of(saved) == AS_LOADED and changed(saved, clone(model)) == set()


def test_a_folder_is_loaded_by_the_plain_trainer_which_trains_adapters_alone(texts, arguments, named):
    trainer = trl.SFTTrainer(named("memory"), arguments(), train_dataset=texts, peft_config=lora())
    assert isinstance(trainer.model.get_base_model(), EngramForCausalLM)
    before = clone(trainer.model)
    trainer.train()
    assert changed(trainer.model, before) == {"lora"}


def test_a_folder_without_a_memory_is_refused(donor, texts, arguments):
    with pytest.raises(TypeError, match="trains models with a memory, got LlamaForCausalLM"):
        EngramSFTTrainer(str(donor), arguments(), train_dataset=texts)


# Packed documents.


def gradients(model) -> tuple[dict, dict]:
    rows = {name: row_gradient(part) for name, part in model.memory.named_parts().items()}
    dense = {name: p.grad for name, p in model.memory.layers.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in rows.items() if gradient is not None}, dense


def documents_of(batch: dict) -> list[torch.Tensor]:
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    return [batch["input_ids"][:, start:end] for start, end in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_documents_have_the_gradients_of_separate_ones(settings, texts, arguments, tiny_engram, tiny_tokenizer):
    packed = tiny_engram(trained=True).set_trainable("memory")
    args = arguments(per_device_train_batch_size=4, **settings)
    trainer = trl.SFTTrainer(packed, args, train_dataset=texts, processing_class=tiny_tokenizer)
    batch = one_batch(trainer)
    documents = documents_of(batch)
    assert len(documents) == len(TEXTS) and "attention_mask" not in batch
    count = sum(text.shape[1] - 1 for text in documents)
    trainer.compute_loss(packed.train(), dict(batch), num_items_in_batch=count).backward()

    separate = tiny_engram(trained=True).set_trainable("memory").train()
    for text in documents:
        separate(text, labels=text, use_cache=False, num_items_in_batch=count).loss.backward()

    (rows, dense), (expected_rows, expected_dense) = gradients(packed), gradients(separate)
    assert rows.keys() == expected_rows.keys() and dense.keys() == expected_dense.keys()
    for name, gradient in rows.items():
        assert torch.equal(gradient.rows, expected_rows[name].rows)
        torch.testing.assert_close(gradient.row_values, expected_rows[name].row_values, rtol=1e-4, atol=TOLERANCE)
    for name, gradient in dense.items():
        torch.testing.assert_close(gradient, expected_dense[name], rtol=1e-4, atol=TOLERANCE)

    unparted = tiny_engram(trained=True).set_trainable("memory").train()
    unparted(batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    assert any(not torch.equal(g.rows, rows[name].rows) for name, g in gradients(unparted)[0].items()), "control"


# LoRA and memory.


def test_a_peft_model_that_was_made_before_is_trained_by_the_plain_trainer(
    texts, arguments, tiny_engram, tiny_tokenizer
):
    model = get_peft_model(tiny_engram(), lora())
    model.set_trainable("memory+lora")
    before = clone(model)
    optimizer = create_optimizer(model, lr=1e-2)
    trl.SFTTrainer(
        model, arguments(), train_dataset=texts, processing_class=tiny_tokenizer, optimizers=(optimizer, None)
    ).train()
    assert changed(model, before) == {"tables", "layers", "lora"}


@pytest.mark.parametrize("defaults", [False, True])
@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_peft_config_and_memory_in_one_trainer(
    placement, defaults, texts, arguments, tiny_engram, tiny_tokenizer, tmp_path
):
    tiny_engram().save_pretrained(tmp_path / "graft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "graft", engram_placement=placement)
    trainer = EngramSFTTrainer(
        model,
        arguments(EngramSFTConfig, table_lr_multiplier=3.0, gradient_checkpointing=defaults, bf16=defaults),
        train_dataset=texts,
        processing_class=tiny_tokenizer,
        peft_config=lora(),
        trainable="memory+lora",
    )
    assert isinstance(trainer.model, PeftModel)
    before = clone(trainer.model)
    trainer.train()
    assert changed(trainer.model, before) == {"tables", "layers", "lora"}
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["tables"] == pytest.approx(3e-2) and rates["backbone"] == pytest.approx(1e-2)


def test_without_a_word_for_the_memory_peft_freezes_it(texts, arguments, tiny_engram, tiny_tokenizer):
    trainer = trl.SFTTrainer(
        tiny_engram(), arguments(), train_dataset=texts, processing_class=tiny_tokenizer, peft_config=lora()
    )
    before = clone(trainer.model)
    trainer.train()
    assert changed(trainer.model, before) == {"lora"}


def test_what_was_trained_is_saved_with_the_adapter_and_loaded_again(
    texts, arguments, tiny_engram, tiny_tokenizer, tmp_path
):
    tiny_engram().save_pretrained(tmp_path / "graft")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "graft"), torch.randint(3, 4000, (2, 9))
    trainer = EngramSFTTrainer(
        model,
        arguments(),
        train_dataset=texts,
        processing_class=tiny_tokenizer,
        peft_config=lora(),
        trainable="memory+lora",
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "graft")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, trained)
        with loaded.disable_memory():
            assert not torch.equal(loaded(ids).logits, trained), "control: the adapter alone"


def test_a_run_is_resumed_bit_for_bit(texts, arguments, tiny_engram, tiny_tokenizer, tmp_path):
    tiny_engram().save_pretrained(tmp_path / "graft")

    def run(steps: int, resume: bool):
        trainer = EngramSFTTrainer(
            AutoModelForCausalLM.from_pretrained(tmp_path / "graft"),
            arguments(max_steps=steps, save_strategy="steps", save_steps=2, packing=True, max_length=24),
            train_dataset=texts,
            processing_class=tiny_tokenizer,
            peft_config=lora(),
            trainable="memory+lora",
        )
        trainer.train(resume_from_checkpoint=resume)
        return clone(trainer.model)

    whole = run(4, resume=False)
    half = run(2, resume=False)
    resumed = run(4, resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(half[name], tensor) for name, tensor in whole.items()), "control: half of the run"


def test_a_selection_of_rows_holds_in_sft(texts, arguments, tiny_engram, tiny_tokenizer):
    model = tiny_engram()
    selection = select_rows(model, TEXTS[:1], reference_texts=TEXTS[1:], tokenizer=tiny_tokenizer).apply(model)
    before = {name: part.detach().clone() for name, part in model.memory.named_parts().items()}
    EngramSFTTrainer(
        model,
        arguments(max_length=64, packing=True),
        train_dataset=texts,
        processing_class=tiny_tokenizer,
        peft_config=lora(),
        trainable="memory+lora",
    ).train()
    for name, part in model.memory.named_parts().items():
        touched = (part != before[name]).any(dim=1).nonzero().flatten()
        assert len(touched) > 0 and set(touched.tolist()) <= set(selection.rows[name].tolist())


class EngramDPOTrainer(EngramTrainerMixin, trl.DPOTrainer):
    pass


@pytest.fixture
def pairs():
    return datasets.Dataset.from_list([{"prompt": "the sea is", "chosen": " deep and blue", "rejected": " a ship"}] * 4)


def test_preferences_train_a_folder_whose_reference_stays(pairs, arguments, named):
    trainer = EngramDPOTrainer(named("memory"), args=arguments(trl.DPOConfig), train_dataset=pairs)
    before = clone(trainer.model)
    assert types_of(trainer.model) == types_of(trainer.ref_model) == AS_LOADED
    trainer.train()
    assert changed(trainer.model, before) == {"tables", "layers"} and changed(trainer.ref_model, before) == set()


def test_a_reference_that_would_learn_with_the_model_is_refused(pairs, arguments, tiny_engram, tiny_tokenizer):
    tiny_tokenizer.pad_token = tiny_tokenizer.pad_token or tiny_tokenizer.convert_ids_to_tokens(2)

    def trainer(**changes):
        model = get_peft_model(tiny_engram(trained=True), lora(task_type="CAUSAL_LM"))
        given = {"train_dataset": pairs, "processing_class": tiny_tokenizer, "trainable": "memory+lora"}
        return EngramDPOTrainer(model, args=arguments(trl.DPOConfig, **changes), **given)

    with pytest.raises(ValueError, match="has no ref_model.*the reference would move with the model"):
        trainer()
    fixed = trainer(precompute_ref_log_probs=True)
    before = clone(fixed.engram)
    fixed.train()  # the control: trains both where the reference is worked out before
    assert {"tables", "lora"} <= changed(fixed.engram, before)


class EngramGRPOTrainer(EngramTrainerMixin, trl.GRPOTrainer):
    pass


def letters(completions, **_) -> list[float]:
    """A reward that has nothing to do with sense."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.fixture
def by_reward(arguments, tiny_tokenizer):
    """Factory of trainers by rewards, whose reference TRL loads by itself."""
    tiny_tokenizer.pad_token = tiny_tokenizer.pad_token or tiny_tokenizer.convert_ids_to_tokens(2)
    prompts = datasets.Dataset.from_dict({"prompt": ["the sea is", "a ship"] * 4})

    def make(model, reference="device", **changes):
        settings = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "beta": 0.1}
        where = {"model_init_kwargs": {"engram_placement": reference}}
        args = arguments(trl.GRPOConfig, **settings, **where, **changes)
        given = {"train_dataset": prompts, "processing_class": tiny_tokenizer, "trainable": "memory"}
        return EngramGRPOTrainer(model, args, reward_funcs=letters, **given)

    return make


@pytest.mark.parametrize("sync", [False, True])
def test_a_reference_that_was_loaded_is_the_model_and_follows_it_where_it_should(
    sync, by_reward, tiny_engram, tmp_path
):
    tiny_engram(trained=True).save_pretrained(tmp_path / "graft")
    model = EngramForCausalLM.from_pretrained(tmp_path / "graft", engram_placement="device")
    trainer = by_reward(model, sync_ref_model=sync, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    before = clone(trainer.ref_model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    trainer.train()
    assert changed(model, before) == {"tables", "layers"}
    assert changed(trainer.ref_model, before) == ({"tables", "layers"} if sync else set())
    assert not sync or all(torch.equal(clone(model)[name], tensor) for name, tensor in clone(trainer.ref_model).items())


@pytest.mark.parametrize("places", [("disk", "disk"), ("cpu", "cpu"), ("disk", "device"), ("device", "disk")])
def test_a_reference_that_would_follow_without_its_tables_is_refused(places, by_reward, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "graft")
    model = EngramForCausalLM.from_pretrained(tmp_path / "graft", engram_placement=places[0])
    assert by_reward(model, places[1]).ref_model is not None, "the control: a reference that stays"
    with pytest.raises(ValueError, match=f"the model's are on '{places[0]}', the reference's on '{places[1]}'"):
        by_reward(model, places[1], sync_ref_model=True)


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_reference_that_was_loaded_without_a_pack_is_refused(place, by_reward, tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "graft")
    model.memory.tables["1"].order2[0].data[5:9] += 1
    save_memory_delta(model, tmp_path / "delta", base=tmp_path / "graft")
    model = EngramForCausalLM.from_pretrained(tmp_path / "graft", engram_placement=place)
    assert by_reward(model, place).ref_model is not None, "the control"
    load_memory_delta(model, tmp_path / "delta")
    with pytest.raises(ValueError, match="loaded its reference from '.*graft', and that is not the model"):
        by_reward(model, place)
    save_changes(model, tmp_path / "changes")
    model = EngramForCausalLM.from_pretrained(tmp_path / "changes", engram_placement=place)
    reference = by_reward(model, place).ref_model  # loaded by the folder of the delta
    assert all(torch.equal(clone(model)[name], tensor) for name, tensor in clone(reference).items())


def test_rewards_train_a_folder(by_reward, named):
    trainer = by_reward(named("memory"))
    before = clone(trainer.model)
    trainer.train()
    assert types_of(trainer.model) == AS_LOADED
    assert changed(trainer.model, before) == {"tables", "layers"} and changed(trainer.ref_model, before) == set()


def test_rewards_train_with_answers_that_were_batched_continuously(by_reward, named):
    few = {"num_blocks": 16, "max_batch_tokens": 64}  # by default the pages take most of the free memory
    batched = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": few}
    trainer = by_reward(named("memory"), **batched)
    before = clone(trainer.model)
    trainer.train()
    assert changed(trainer.model, before) == {"tables", "layers"}
