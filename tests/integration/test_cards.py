"""Model cards: filled in from evidence alone, read by huggingface_hub's own parser; the committed examples are current.

`ModelCard.validate` asks the Hub, so cards are parsed here and not validated.
Run: pytest tests/integration/test_cards.py
"""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from engram_transformers import graft
from engram_transformers.conversion.cli import app
from engram_transformers.inspection.verify import Finding
from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.model_cards import model_card, pack_card
from engram_transformers.model_cards.evidence import NOT_MEASURED

from ..packs import pack_of
from .composites import composite_donor, needs_whole_composites


EXAMPLES = Path(__file__).parents[2] / "model_cards" / "examples"
LOG = [{"loss": 9.0, "step": 1}, {"eval_loss": 8.5, "step": 2}, {"loss": 7.25, "step": 4}, {"train_runtime": 3.0}]


def engram(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def number(cell: str) -> int:
    """The number that a cell of a table begins with."""
    return int(re.match(r"[\d,]*\d", cell)[0].replace(",", ""))


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture
def grafted(donor, tmp_path):
    sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4, "engram_table_dtype": "bfloat16"}
    return graft(donor, tmp_path / "grafted", [1, 2], **sizes)


def test_what_was_not_measured_is_said_to_be_so(grafted):
    (grafted / "engram_graft.json").unlink()
    card = model_card(grafted)
    assert "{{" not in card
    data = ModelCard(card).data.to_dict()
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["engram", "llama"]}
    assert section(card, "Checks").strip() == NOT_MEASURED
    for said in ("Training log: not measured", "Data: not said", "The graft: not said", "| backbone | not said |"):
        assert said in card, said
    assert f"{NOT_MEASURED}\n\nKnowledge packs: none" in section(card, "Results")


def test_evidence_of_the_folder_is_in_the_card(grafted, tiny_engram):
    (grafted / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 0.5, "log_history": LOG}))
    pack = pack_of(tiny_engram(), [(74, 234)])
    side = {"right": 0.5, "texts": 4, "before": {"right": 0.0}}
    general = {"a|b": {"texts": 1, "loss": 1, "loss_before": 2, "texts_identical": 1}}
    pack.provenance = {"report": {"taught": side, "other_texts": general}}
    pack.save(grafted / "people.engram-pack.safetensors")
    results = grafted / "results.md"
    results.write_text("| mine |\n| --- |\n| {{ name }} |")
    told = ["--license", "mit", "--base-license", "gpl-3.0", "--data", "my notes (mine)", "--results", results]
    done = engram("card", grafted, "--base-model", "me/donor", "--name", "me/graft", *told)
    assert done.exit_code == 0 and done.stdout.strip() == str(grafted / "README.md"), done.output
    card = ModelCard.load(grafted / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == ("me/donor", "finetune", "mit")
    made = section(card.text, "How it was made")
    assert "| donor | donor |" in made and "| donor\\_files | reused |" in made and "transformers 5" in made
    assert "4 steps, up to epoch 0.5." in made and "| training loss | 9.0000 (step 1) | 7.2500 (step 4) |" in made
    assert "| evaluation loss | 8.5000 (step 2) | not measured |" in made and "Data: my notes (mine)" in made
    found = section(card.text, "Results")
    assert "| {{ name }} |" in found and "`people.engram-pack.safetensors`: 1 records" in found
    assert "| taught phrasings | 4 | 50.0% right | 0.0% right |" in found and "| a\\|b | 1 |" in found
    checks = section(card.text, "Checks")
    assert checks.count("| ok |") == 3 and "generation" not in checks
    assert 'from_pretrained("me/graft")' in card.text and "| backbone | gpl-3.0 |" in card.text


def test_needs_are_the_bytes_of_the_files(grafted):
    table = sum(path.stat().st_size for path in grafted.glob("engram-memory-*.safetensors"))
    dense = sum(path.stat().st_size for path in grafted.glob("model-*.safetensors"))
    rows = [line.strip("| ").split(" | ") for line in model_card(grafted).splitlines() if line.startswith('| "')]
    needed = {row[0]: row[1:] for row in rows}
    assert list(needed) == ['"device"', '"cpu"', '"disk"', '"none", the backbone alone']
    device, host = number(needed['"device"'][0]), number(needed['"cpu"'][1])
    assert 0 < dense + table - device < 20_000 and 0 < table - host < 2000, "but for the headers"
    assert [number(needed[place][0]) for place in ('"cpu"', '"disk"')] == [device - host] * 2
    assert number(needed['"disk"'][2]) == host
    read = 2 * 2 * 2 * 4 * 2  # layers, orders, heads, values, bytes
    assert [number(needed[place][3]) for place in list(needed)[:3]] == [read] * 3
    assert needed['"disk"'][3] == f"{read}, in at most 8 reads"


@needs_whole_composites
def test_a_model_that_reads_images_says_so(tiny_tokenizer, tmp_path):
    composite_donor("gemma3").save_pretrained(tmp_path / "donor")
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    card = model_card(graft(tmp_path / "donor", tmp_path / "out", [1], engram_vocab_size=200))
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text" and "AutoModelForImageTextToText" in card


def test_a_mistake_is_one_message_and_nothing_is_written(grafted, tmp_path):
    def refused(says: str, *arguments):
        done = engram("card", *arguments)
        assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output

    refused("has no config.json", tmp_path)
    refused("'nowhere.md' is not a file", grafted, "--results", "nowhere.md")
    (grafted / "trainer_state.json").write_text("{")
    refused("trainer_state.json' is not JSON that can be read", grafted)
    (grafted / "trainer_state.json").write_text("[]")
    refused("must hold a JSON object, and holds a list", grafted)
    assert not (grafted / "README.md").exists()
    (grafted / "README.md").write_text("mine")
    refused("is there already: --overwrite replaces it", grafted)
    assert (grafted / "README.md").read_text() == "mine"


def example_cards() -> dict[str, str]:
    """The committed examples as they would be written now, from the files beside them."""
    folder, base = EXAMPLES / "checkpoint", "HuggingFaceTB/SmolLM2-135M-Instruct"
    findings = [Finding(**found) for found in json.loads((folder / "checks.json").read_text())]
    told = {"license": "apache-2.0", "base_license": "Apache 2.0", "data": "WordNet named entities (WordNet License)"}
    checkpoint = model_card(folder, base, name="me/my-graft", findings=findings, **told)
    file = next((EXAMPLES / "pack").glob("*.safetensors"))
    pack = pack_card(KnowledgePack.load(file), file.name, "me/people", "me/my-graft", "cc0-1.0")
    return {"checkpoint": checkpoint, "pack": pack}


@pytest.mark.parametrize("kind", ["checkpoint", "pack"])
def test_the_committed_examples_are_what_would_be_written_now(kind):
    written = (EXAMPLES / kind / "README.md").read_text(encoding="utf-8")
    assert written == example_cards()[kind], "python -m tests.integration.test_cards writes it again"
    assert ModelCard(written).data.library_name in ("transformers", "engram-transformers")


if __name__ == "__main__":
    for name, text in example_cards().items():
        (EXAMPLES / name / "README.md").write_text(text, encoding="utf-8")
