"""lm-eval on a graft: by its command, with the folder's own code and with the package, and around a model in memory.

Log-likelihoods equal those of a forward pass of each text alone to 1e-4 in float32 (lm-eval batches and pads).
Run: pytest tests/integration/test_lm_eval.py
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import GOLDEN, engram_on
from .forked import Forked


lm_eval = pytest.importorskip("lm_eval", reason="of the extra dev, and of whoever evaluates")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


TOLERANCE = 1e-4
QUESTIONS = [
    {"question": "the sea is", "choices": ["deep and blue", "a ship", "no word of it"], "answer": 0},
    {"question": "the town was taken by", "choices": ["the Turks", "the sea after a long siege"], "answer": 1},
]
TEXTS = [{"text": "the sea is deep and blue"}, {"text": "the town was taken by the Turks after a siege"}]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PROSE = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """Folder `my-graft`, and `tasks` beside it."""
    folder = tmp_path_factory.mktemp("evaluated") / "my-graft"
    config = LlamaConfig(
        vocab_size=4104,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.2,
    )
    engram_on(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    tasks = folder.parent / "tasks"
    tasks.mkdir()
    for name, task, rows in (("choice", CHOICE, QUESTIONS), ("prose", PROSE, TEXTS)):
        data = tasks / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, rows)))
        source = f"{{data_files: {data}, cache_dir: {folder.parent / 'cache'}}}"
        given = f"task: {name}\ndataset_path: json\ndataset_kwargs: {source}\ntest_split: train"
        (tasks / f"{name}.yaml").write_text(given + task)
    return folder


@pytest.fixture(scope="module")
def model(graft):
    return AutoModelForCausalLM.from_pretrained(graft)


@pytest.fixture(scope="module")
def tokenizer(graft):
    return AutoTokenizer.from_pretrained(graft)


@pytest.fixture
def evaluate(graft, monkeypatch):
    """`evaluate(lm)`: what lm-eval says of both tasks, as `likelihoods` does."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", id)  # runs pip, which takes seconds

    def run(lm):
        manager = TaskManager(include_path=str(graft.parent / "tasks"), include_defaults=False)
        found = lm_eval.simple_evaluate(lm, tasks=["choice", "prose"], task_manager=manager, bootstrap_iters=0)
        return {name: in_order(rows) for name, rows in found["samples"].items()}

    return run


def in_order(samples: list[dict]) -> list[float]:
    """Log-likelihoods of all answers of a task."""
    answers = [answer for row in sorted(samples, key=lambda row: row["doc_id"]) for answer in row["filtered_resps"]]
    return [float(answer[0] if isinstance(answer, (list, tuple)) else answer) for answer in answers]


@torch.no_grad()
def likelihood(model, context: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([context + answer]), use_cache=False).logits[0]  # (L, V)
    scores = logits[len(context) - 1 : -1].log_softmax(-1)  # (answer, V)
    return float(scores.gather(1, torch.tensor(answer)[:, None]).sum())


def likelihoods(model, tokenizer) -> dict[str, list[float]]:
    """The same without lm-eval, every text alone."""

    def ids(text):
        return tokenizer(text)["input_ids"]

    asked = [
        (ids(row["question"]), ids(f"{row['question']} {answer}")) for row in QUESTIONS for answer in row["choices"]
    ]
    return {
        "choice": [likelihood(model, context, whole[len(context) :]) for context, whole in asked],
        "prose": [likelihood(model, [tokenizer.bos_token_id], ids(row["text"])) for row in TEXTS],
    }


def difference(first: dict, second: dict) -> float:
    """The smaller of the two tasks' largest differences."""
    assert first.keys() == second.keys() == {"choice", "prose"}
    return min(max(abs(a - b) for a, b in zip(first[name], second[name], strict=True)) for name in first)


def equal(first: dict, second: dict) -> bool:
    return all(first[name] == pytest.approx(second[name], abs=TOLERANCE) for name in ("choice", "prose"))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_in_memory_is_evaluated_with_its_memory(batch, evaluate, model, tokenizer):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    assert lm.max_length == model.backbone.config.max_position_embeddings
    found = evaluate(lm)
    assert equal(found, likelihoods(model, tokenizer))
    with model.disable_memory():
        off = evaluate(lm)
        assert equal(off, likelihoods(model.backbone, tokenizer))
    assert difference(found, off) > 0.1, "control: without memory"


def test_a_folder_is_evaluated_with_its_tables_on_disk(evaluate, graft, model, tokenizer):
    lm = HFLM(pretrained=str(graft), device="cpu", batch_size=4, engram_placement="disk")
    assert lm.model.memory.placement == "disk"
    assert equal(evaluate(lm), likelihoods(model, tokenizer))


def test_packs_of_a_model_in_memory_are_read(evaluate, model, tokenizer):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    without = evaluate(lm)
    ids = tokenizer("the sea is deep and blue", return_tensors="pt").input_ids[0]
    model.load_memory(pack_of(model, ngrams_in(classes_of(model, ids))), name="sea")
    found, expected = evaluate(lm), likelihoods(model, tokenizer)
    model.unload_memory("sea")
    assert equal(found, expected) and difference(found, without) > 0.1
    assert equal(evaluate(lm), without), "control: the pack is gone"


SCRIPT = """
import sys
code, *arguments = sys.argv[1:]
exec(code)
sys.argv = ["lm_eval", *arguments]
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
ABSENT = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "engram_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
WAYS = {
    "the folder's own code": (ABSENT, ",trust_remote_code=True"),
    "the package": ("import engram_transformers", ""),
}


WITHOUT_PIP = "import lm_eval.evaluator, lm_eval.models.huggingface; lm_eval.evaluator.add_env_info = id"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Forked(WITHOUT_PIP, HF_HOME=home, HF_HUB_OFFLINE=1) as forked:
        yield forked


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_command_evaluates_a_folder(way, command, graft, model, tokenizer, tmp_path):
    code, more = WAYS[way]
    arguments = f"--model hf --model_args pretrained={graft}{more} --device cpu --tasks choice,prose --log_samples"
    where = ["--include_path", graft.parent / "tasks", "--output_path", tmp_path / "out"]
    done = command.run(SCRIPT, code, *arguments.split(), *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {name: next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")) for name in ("choice", "prose")}
    found = {name: in_order(list(map(json.loads, path.open()))) for name, path in lines.items()}
    assert equal(found, likelihoods(model, tokenizer))
    with model.disable_memory():
        assert difference(found, likelihoods(model, tokenizer)) > 0.1, "control: without memory"
