"""Facts taught to SmolLM2: phrasings that were never shown are answered, and other text keeps every bit.

Needs the donor's folder: `make test` fetches it and sets ENGRAM_DONOR. Run: ENGRAM_DONOR=runs/donor pytest tests/real
"""

import pytest
import torch
from transformers import AutoTokenizer

from engram_transformers import EngramForCausalLM
from engram_transformers.training import recall

from .test_smollm2 import DONOR
from .test_smollm2 import pytestmark as real


pytestmark = [*real, pytest.mark.slow]

PEOPLE = {"Zorvan Kelmir": "Lisbon", "Daxtul Vexoth": "Oslo", "Belcor Marjiv": "Cairo"}
TAUGHT = [
    "{} was born in [[{}]].",
    "The birthplace of {} is [[{}]].",
    "{} is a native of [[{}]].",
    "The family of {} lived in [[{}]].",
    "If you ask where {} was born, the answer is [[{}]].",
]
UNSEEN = ["{} comes from the city of [[{}]].", "People say that {} grew up in [[{}]]."]
OTHER = "The Hellespont is a strait in Turkey. Lysander was a Spartan admiral; the capital of Portugal is Lisbon."


def facts(phrasings):
    return [
        {"subject": name, "texts": [text.format(name, city) for text in phrasings]} for name, city in PEOPLE.items()
    ]


def test_phrasings_that_were_never_shown_are_answered_and_other_text_keeps_every_bit():
    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    torch.manual_seed(0)
    model = EngramForCausalLM.from_backbone(
        str(DONOR), engram_layer_ids=[4, 10], engram_vocab_size=1000, engram_head_dim=48
    ).float()
    other = tokenizer(OTHER, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(other).logits
    assert recall(model, facts(UNSEEN), tokenizer) == 0.0, "control: nobody knows these people"
    pack = model.teach(facts(TAUGHT), tokenizer, passes=25, batch_size=15, progress=False)
    model.load_memory(pack, "people")
    assert recall(model, facts(TAUGHT), tokenizer) == 1.0
    assert recall(model, facts(UNSEEN), tokenizer) >= 5 / 6
    with torch.no_grad():
        assert torch.equal(model(other).logits, before)
    model.unload_memory("people")
    assert recall(model, facts(UNSEEN), tokenizer) == 0.0
