"""Training the memory: rows that were read and nothing else, through transformers' own Trainer.

Run: pytest tests/integration/test_training.py
"""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from engram_transformers import EngramTrainer
from engram_transformers.backbone_engram import find_decoder_layers
from engram_transformers.compat_engram import CHECKPOINTS_RUN_HOOKS
from engram_transformers.rows_gradient_engram import RowGradient
from engram_transformers.training import create_optimizer

from .backbones import BACKBONES


pytestmark = pytest.mark.core


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 300, (24, 20), generator=generator)
    return [{"input_ids": text, "labels": text} for text in texts]


@pytest.fixture
def arguments(tmp_path):
    """Factory of arguments for a short run."""

    def make(**changes):
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return TrainingArguments(str(tmp_path / "run"), **{**settings, **changes})

    return make


def changed(model, before):
    """Names of parameters that differ from a state dict."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_rows_get_gradient_at_step_one_and_projections_from_step_two(tiny_engram, dataset):
    model = tiny_engram(engram_kernel_size=4)
    model.backbone.requires_grad_(False)
    optimizer = create_optimizer(model, lr=1e-2)
    batch = {name: torch.stack([entry[name] for entry in dataset[:4]]) for name in ("input_ids", "labels")}
    projection = model.memory.layers["1"].key_value.weight
    tables = list(model.memory.tables["1"].parameters())
    for step in (1, 2):
        model(**batch).loss.backward()
        assert all(float(table.grad.row_values.norm()) > 0 for table in tables)
        assert (float(projection.grad.norm()) > 0) == (step == 2)
        optimizer.step()
        optimizer.zero_grad()
    assert all(table.grad is None for table in tables)


@torch.no_grad()
def test_ngrams_that_were_never_trained_go_on_contributing_exactly_nothing(tiny_engram, tiny_donor, dataset, arguments):
    model = tiny_engram(engram_vocab_size=50_000, engram_kernel_size=0)
    with torch.enable_grad():
        EngramTrainer(model, arguments(), train_dataset=dataset).train()
    model.eval()
    other = torch.randint(2000, 4000, (2, 12))  # ids that no training text has
    reads = model.memory.read(other, None)
    untouched = (reads.vectors(1) == 0).all(-1) & (reads.vectors(2) == 0).all(-1)
    # The first position's n-grams reach before the text and may collide with nothing else; all others are fresh.
    assert untouched.float().mean() > 0.5
    taught = torch.stack([entry["input_ids"] for entry in dataset[:2]])
    donor = tiny_donor()
    assert not torch.equal(model(taught).logits, donor(taught).logits), "control: what was trained is not silent"
    quiet = other[untouched.all(-1)]
    if len(quiet):
        assert torch.equal(model(quiet).logits, donor(quiet).logits)


def test_trainer_changes_the_memory_and_leaves_the_backbone(tiny_engram, dataset, arguments):
    model = tiny_engram()
    before = clone(model)
    EngramTrainer(model, arguments(), train_dataset=dataset).train()
    names = changed(model, before)
    assert names
    assert all(name.startswith(("memory.tables.", "memory.layers.")) for name in names)
    for layer in ("1", "2"):
        for order in ("order2", "order3"):
            name = f"memory.tables.{layer}.{order}.0"
            rows = (model.state_dict()[name] != before[name]).any(-1)
            assert 0 < int(rows.sum()) < len(rows), "all or none of the rows moved"
    batch = {name: torch.stack([entry[name] for entry in dataset]) for name in ("input_ids", "labels")}
    model.eval()
    with torch.no_grad():
        taught = float(model(**batch).loss)
        with model.disable_memory():
            assert taught < float(model(**batch).loss) - 0.1


def test_train_mode_all_trains_the_backbone_too(tiny_engram, dataset, arguments):
    model = tiny_engram()
    before = clone(model)
    EngramTrainer(model, arguments(), train_dataset=dataset, trainable="all").train()
    assert any(name.startswith("backbone.") for name in changed(model, before))


def test_resuming_continues_bit_for_bit(tiny_engram, dataset, arguments, tmp_path):
    model = tiny_engram()
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    EngramTrainer(model, arguments(**settings), train_dataset=dataset).train()
    resumed = tiny_engram()
    trainer = EngramTrainer(resumed, arguments(**settings), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert not changed(resumed, model.state_dict())


def is_refused(run) -> bool:
    """Runs something that switches checkpointing on; True where this Transformers cannot, and the refusal was given."""
    if not CHECKPOINTS_RUN_HOOKS:
        run()
        return False
    with pytest.raises(RuntimeError, match="needs transformers 5.23 or newer"):
        run()
    return True


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_same(tiny_engram, dataset, arguments, reentrant):
    plain, saving = tiny_engram(), tiny_engram()
    EngramTrainer(plain, arguments(), train_dataset=dataset).train()
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if is_refused(EngramTrainer(saving, arguments(**settings), train_dataset=dataset).train):
        return
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], tensor, rtol=0, atol=1e-6)


def gradients(model):
    """Gradients by name; those of tables, which have rows alone, written out."""
    held = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    for name, gradient in held.items():
        if isinstance(gradient, RowGradient):
            held[name] = torch.zeros(gradient.shape).index_add_(0, gradient.rows, gradient.row_values)
    return held


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("layers", [(0, 1), (1, 2)])
@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2", "deepseek_v4", "falcon_h1"])
def test_gradient_checkpointing_gives_equal_gradients(
    backbone, layers, frozen, reentrant, tiny_donor, tiny_engram, dataset
):
    batch = {name: torch.stack([entry[name] for entry in dataset[:4]]) for name in ("input_ids", "labels")}
    models = [tiny_engram(True, donor=tiny_donor(BACKBONES[backbone]()), layers=layers).train() for _ in range(2)]
    if is_refused(lambda: models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})):
        return
    if reentrant and not frozen:
        models[1].enable_input_require_grads()  # as Trainer does; without it this kind gives the first layer none
    runs = []
    for model in models:
        first_part = next(find_decoder_layers(model.backbone, 3)[layers[1]].children())
        first_part.register_forward_pre_hook(lambda *_: runs.append("backbone"))
        model.memory.layers[str(layers[1])].key_value.register_forward_hook(lambda *_: runs.append("memory"))
        model.backbone.requires_grad_(not frozen)
        torch.manual_seed(0)  # GPT-2 drops out, and what is run a second time must drop out the same
        model(**batch).loss.backward()
    assert runs.count("backbone") == runs.count("memory") == 1 + 2, "control: the second model runs everything twice"
    plain, saving = gradients(models[0]), gradients(models[1])
    assert saving.keys() == plain.keys()
    assert {name for name in plain if name.startswith("memory.")} == {
        name for name, _ in models[0].named_parameters() if name.startswith("memory.")
    }
    assert any(name.startswith("backbone.") for name in plain) != frozen
    for name, gradient in plain.items():
        torch.testing.assert_close(
            saving[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_accumulation_equals_the_larger_batch(tiny_engram, dataset, arguments):
    """Of what the optimizer is given, and not of the weights: the first step of Adam turns a gradient as small as its
    epsilon into a whole one (5e-8 into 0.4), and the last bits of the sum with it (2e-10 into 3e-4)."""
    given = []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        model, steps = tiny_engram(), []
        trainer = EngramTrainer(model, arguments(max_steps=3, **settings), train_dataset=dataset)
        trainer.create_optimizer().register_step_pre_hook(
            lambda *_, model=model, steps=steps: steps.append({n: g.clone() for n, g in gradients(model).items()})
        )
        trainer.train()
        given.append(steps)
    assert len(given[0]) == len(given[1]) == 3
    for whole, pieces in zip(*given, strict=True):
        assert whole.keys() == pieces.keys() and any(".tables." in name for name in whole)
        for name, gradient in whole.items():
            # Measured: 4e-6 of the parameter's largest gradient, at the third step.
            torch.testing.assert_close(pieces[name], gradient, rtol=0, atol=5e-5 * gradient.abs().max().item())
    assert all(gradient.any() for gradient in given[0][-1].values()), "control: everything learns"


@pytest.fixture
def uneven():
    """Texts with 1 to 19 labels each, so that a mean of means is not a mean."""
    generator = torch.Generator().manual_seed(2)
    entries = []
    for index, text in enumerate(torch.randint(3, 300, (24, 20), generator=generator)):
        labels = text.clone()
        labels[: index * 7 % 19] = -100
        entries.append({"input_ids": text, "labels": labels})
    return entries


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_logged_losses_are_the_plain_trainers(accumulated, tiny_engram, tiny_donor, uneven, arguments):
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulated, "max_steps": 3}
    settings["per_device_train_batch_size"] = 4 // accumulated
    losses = []
    for kind, model in ((EngramTrainer, tiny_engram()), (Trainer, tiny_donor())):
        trainer = kind(model, arguments(**settings), train_dataset=uneven)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_accumulated_texts_of_uneven_length_count_by_their_tokens(tiny_engram, uneven, arguments):
    trained = []
    for accumulated in (1, 4):
        model = tiny_engram(trained=True)
        settings = {"max_steps": 2, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
        settings["per_device_train_batch_size"] = 4 // accumulated
        # So large an epsilon that Adam's step is nearly proportional to the gradient, whose scale is what is asked.
        EngramTrainer(model, arguments(**settings, adam_epsilon=1.0), train_dataset=uneven).train()
        trained.append(model.memory.state_dict())
    moved = 0.0
    for name, tensor in tiny_engram(trained=True).memory.state_dict().items():
        torch.testing.assert_close(trained[1][name], trained[0][name], rtol=0, atol=1e-6)
        moved = max(moved, (trained[0][name] - tensor).abs().max().item())
    assert moved > 1e-4, "control: the memory must have been trained"


def test_torchs_own_clipping_scales_rows_and_dense_gradients_together(tiny_engram, dataset):
    model = tiny_engram(trained=True)
    batch = {name: torch.stack([entry[name] for entry in dataset[:4]]) for name in ("input_ids", "labels")}
    model(**batch).loss.backward()

    def values():
        held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: (g.row_values if isinstance(g, RowGradient) else g).clone() for name, g in held.items()}

    before = values()
    expected = torch.sqrt(sum(g.pow(2).sum() for g in before.values()))
    rows = torch.sqrt(sum(g.pow(2).sum() for name, g in before.items() if ".tables." in name))
    assert rows > 0.01 * expected, "control: rows count"
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for name, held in values().items():
        torch.testing.assert_close(held, before[name] * (1e-3 / expected), rtol=1e-4, atol=1e-12)


def test_the_logged_norm_counts_the_rows(tiny_engram, dataset, arguments):
    model = tiny_engram()
    model.memory.layers.requires_grad_(False)  # only rows are left to have a gradient
    trainer = EngramTrainer(model, arguments(max_steps=1), train_dataset=dataset)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_plain_trainer_says_which_optimizer_it_needs_and_trains_alike_with_it(tiny_engram, dataset, arguments):
    model = tiny_engram()
    before = clone(model)
    with pytest.raises(TypeError, match=r"rows alone.*EngramTrainer, or engram_transformers.*create_optimizer"):
        Trainer(model, arguments(max_steps=2), train_dataset=dataset).train()
    assert not changed(model, before)
    settings = {"max_grad_norm": 0.01, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    expected, plain = tiny_engram(), tiny_engram()
    trainers = []
    for kind, trained in ((EngramTrainer, expected), (Trainer, plain)):
        trained.backbone.requires_grad_(False)
        optimizers = {"optimizers": (create_optimizer(trained, 1e-2), None)}
        trainers.append(kind(trained, arguments(**settings), train_dataset=dataset, **optimizers))
        trainers[-1].train()
    assert not changed(plain, expected.state_dict())
    assert any(name.startswith("memory.tables.") for name in changed(plain, before))
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry] for t in trainers]
    assert norms[0] == norms[1] and min(norms[0]) > 0.01, "control: every step was clipped"


def test_what_cannot_be_trained_rightly_is_refused(tiny_engram, tiny_donor, dataset, arguments):
    model = tiny_engram()
    with pytest.raises(TypeError, match="LlamaForCausalLM.*from_backbone"):
        EngramTrainer(tiny_donor(), arguments(), train_dataset=dataset)
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="AdamW cannot write rows"):
        EngramTrainer(model, arguments(), train_dataset=dataset, optimizers=(adam, None))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        create_optimizer(model)
