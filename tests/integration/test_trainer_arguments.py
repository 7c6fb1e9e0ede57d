"""What EngramTrainer makes of its arguments: rates, optimizers, names in the place of models, tokenizers.

Run: pytest tests/integration/test_trainer_arguments.py
"""

import logging

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from engram_transformers import EngramTrainer, EngramTrainingArguments
from engram_transformers.training import create_optimizer

from ..tiny import GOLDEN


QUIET = {"max_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
DATASET = [{"input_ids": torch.arange(3, 20), "labels": torch.arange(3, 20)}] * 4


@pytest.fixture
def said(monkeypatch):
    """Warnings of the trainer's module."""
    messages = []
    logger = logging.getLogger("engram_transformers.training.trainer")
    monkeypatch.setattr(logger, "warning", lambda message, *_: messages.append(message))
    return messages


def test_the_default_rate_is_the_measured_one_and_another_default_is_said_once(tiny_engram, tmp_path, said):
    def about_rates(args) -> list[str]:
        said.clear()
        EngramTrainer(tiny_engram(), args, train_dataset=DATASET).train()
        return [message for message in said if "learning_rate" in message]

    ours = EngramTrainingArguments(str(tmp_path), **QUIET)
    assert ours.learning_rate == 2e-3
    assert about_rates(ours) == []
    assert about_rates(TrainingArguments(str(tmp_path), learning_rate=1e-3, **QUIET)) == []
    (message,) = about_rates(TrainingArguments(str(tmp_path), **QUIET))
    assert all(part in message for part in ("5e-05", "0.002", "TrainingArguments", "EngramTrainingArguments"))


@pytest.mark.parametrize("mode", ["memory", "tables", "all"])
def test_the_rate_that_is_logged_is_the_one_that_was_asked(mode, tiny_engram, tmp_path):
    args = EngramTrainingArguments(str(tmp_path), logging_steps=1, lr_scheduler_type="constant", **QUIET)
    trainer = EngramTrainer(tiny_engram(), args, train_dataset=DATASET, trainable=mode)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(2e-3)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1), "control: the first group is the tables'"


@pytest.mark.parametrize("chosen", [{"optim": "adafactor"}, {"optim": "sgd"}, {"optim_args": "momentum=0.5"}])
def test_a_choice_of_optimizer_that_would_not_be_used_is_refused(chosen, tiny_engram, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(chosen))}.*would not be used.*table_optimizer"):
        EngramTrainer(tiny_engram(), TrainingArguments(str(tmp_path), **chosen, **QUIET))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs would not be used"):
        EngramTrainer(
            tiny_engram(), EngramTrainingArguments(str(tmp_path)), optimizer_cls_and_kwargs=(torch.optim.SGD, {})
        )
    for same in ("adamw_torch", "adamw_torch_fused"):  # control
        EngramTrainer(tiny_engram(), TrainingArguments(str(tmp_path), optim=same, **QUIET))


def test_what_is_not_a_model_is_refused_by_what_it_is(tiny_engram, tmp_path):
    args = EngramTrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(TypeError, match="not model_init.*pass it as model="):
        EngramTrainer(None, args, model_init=tiny_engram)
    with pytest.raises(TypeError, match="got its name 'my-graft'.*from_pretrained"):
        EngramTrainer("my-graft", args)


def test_tokens_that_were_added_after_the_graft_are_refused_until_they_have_rows(tiny_engram, tiny_donor, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    donor = tiny_donor()
    donor.resize_token_embeddings(len(tokenizer) + 64)  # as padded vocabularies are
    model = tiny_engram(donor=donor)
    args = EngramTrainingArguments(str(tmp_path), **QUIET)
    EngramTrainer(model, args, processing_class=tokenizer)  # control
    before = model.memory.hashing.token_map.clone()
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    size = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"'<\|two\|>'.*no rows.*model\.resize_token_embeddings\({size}\)"):
        EngramTrainer(model, args, processing_class=tokenizer)
    model.resize_token_embeddings(size)
    EngramTrainer(model, args, processing_class=tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<|one|>", "<|two|>"])
    assert added and (model.memory.hashing.token_map[ids] >= 0).all()
    assert model.get_input_embeddings().num_embeddings == size
    known = before >= 0
    assert torch.equal(model.memory.hashing.token_map[known], before[known]), "what was learned stays where it is"


def test_deepspeed_is_refused_wherever_it_is_asked_for(tiny_engram, tmp_path, monkeypatch):
    args = EngramTrainingArguments(str(tmp_path), **QUIET)
    args.deepspeed = {"zero_optimization": {"stage": 2}}  # with the package, transformers takes it at once
    with pytest.raises(ValueError, match="DeepSpeed cannot train a memory.*shard_backbone"):
        EngramTrainer(tiny_engram(), args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed cannot train a memory"):
        create_optimizer(tiny_engram())
