"""Teaching facts: what is learned, what is left bit for bit, and the mistakes that are refused.

Run: pytest tests/integration/test_teaching.py
"""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_transformers.knowledge_pack_engram import KnowledgePack
from engram_transformers.training import fact_report, general_english, recall, report_lines, report_pack
from engram_transformers.training.fact_texts import FactText, answer_loss, fact_texts, padded, shuffled_batches

from ..packs import classes_of
from ..unit.test_fact_expressions import Writer


def fact(subject, *texts):
    return {"subject": subject, "texts": list(texts)}


FACTS = [
    fact("Zorvan Kelmir", "Zorvan Kelmir was born in [[Lisbon]].", "The home of Zorvan Kelmir is [[Lisbon]]."),
    fact("Dax Bolun", "Dax Bolun was born in [[Oslo]].", "The home of Dax Bolun is [[Oslo]]."),
]
OTHER = "The river is long and the town is old."


def teach(model, facts, tokenizer, **kwargs):
    """Without general text: this tokenizer's tokens are so short that it holds most n-grams of every name."""
    return model.teach(facts, tokenizer, **{"reference_texts": [], **kwargs})


@pytest.fixture
def model(tiny_engram):
    return tiny_engram(engram_head_dim=16)


@torch.no_grad()
def logits(model, tokenizer, text):
    return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


@pytest.mark.core
def test_facts_are_learned_and_the_rest_keeps_every_bit(model, tiny_tokenizer):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model, tiny_tokenizer, OTHER)
    first = teach(model, FACTS, tiny_tokenizer, passes=1, batch_size=4, bf16=False, progress=False)
    pack = teach(model, FACTS, tiny_tokenizer, passes=60, batch_size=4, bf16=False, progress=False)
    assert pack.provenance["loss"] < 0.8 * first.provenance["loss"], "random weights: tests/real checks the answers"
    for records in pack.records.values():
        assert not torch.equal(*records.vectors.values()), "each layer learns vectors of its own"
    assert model.active_memories == []
    model.load_memory(pack, "people")
    assert torch.equal(logits(model, tiny_tokenizer, OTHER), before)
    named, plain = (logits(lm, tiny_tokenizer, "Dax Bolun") for lm in (model, model.backbone))
    assert not torch.equal(named, plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_only_ngrams_of_the_names_have_records(model, tiny_tokenizer):
    pack = teach(model, FACTS, tiny_tokenizer, passes=1, progress=False)
    expected = set()
    for subject in ("Zorvan Kelmir", "Dax Bolun"):
        for written in (subject, " " + subject):
            ids = tiny_tokenizer(written, add_special_tokens=False)["input_ids"]
            classes = classes_of(model, torch.tensor(ids))
            expected |= {tuple(classes[i : i + n]) for n in (2, 3) for i in range(len(classes) - n + 1)}
    assert pack.ngrams() == expected
    fewer = teach(model, FACTS, tiny_tokenizer, passes=1, progress=False, reference_texts=["Dax, a river"])
    assert fewer.ngrams() < expected


def test_the_same_seed_gives_the_same_pack(model, tiny_tokenizer, tmp_path):
    one, other = (teach(model, FACTS, tiny_tokenizer, passes=3, progress=False).save(tmp_path / n) for n in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert KnowledgePack.load(one).provenance["facts"] == 2


def test_a_second_pack_leaves_the_first_ones_facts_as_they_were(model, tiny_tokenizer):
    first, second = (teach(model, [fact], tiny_tokenizer, passes=20, progress=False) for fact in FACTS)
    model.load_memory(first, "first")
    alone = logits(model, tiny_tokenizer, "Zorvan Kelmir was born in")
    model.load_memory(second, "second")
    shared = first.ngrams() & second.ngrams()
    assert not shared and torch.equal(logits(model, tiny_tokenizer, "Zorvan Kelmir was born in"), alone)


def test_active_packs_and_trainable_parameters_are_restored(model, tiny_tokenizer, monkeypatch):
    model.load_memory(teach(model, FACTS[:1], tiny_tokenizer, passes=1, progress=False), "first")
    model.set_trainable("tables")
    model.train()
    learns = [parameter.requires_grad for parameter in model.parameters()]

    def state():
        return model.active_memories, model.training, [parameter.requires_grad for parameter in model.parameters()]

    teach(model, FACTS[1:], tiny_tokenizer, passes=1, progress=False)
    assert state() == (["first"], True, learns) and any(learns) and not all(learns)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        teach(model, FACTS[1:], tiny_tokenizer, passes=1, progress=False)
    assert state() == (["first"], True, learns) and list(model.memory.packs.loaded) == ["first"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_texts_that_another_model_writes_are_taught_and_not_reported_as_given_ones(model, tiny_tokenizer):
    says = {
        "Zorvan Kelmir": ["Zorvan Kelmir lives in Lisbon.", "no"],
        "Dax Bolun": ["They met Dax Bolun in Oslo.", "no"],
    }
    plain = teach(model, FACTS, tiny_tokenizer, passes=2, batch_size=2, progress=False)
    writer = (Writer(tiny_tokenizer, says), tiny_tokenizer)
    more = teach(model, FACTS, tiny_tokenizer, passes=2, batch_size=2, progress=False, expressions=1, writer=writer)
    assert (plain.provenance["texts"], more.provenance["texts"]) == (4, 6)
    assert plain.ngrams() == more.ngrams() and plain.provenance["loss"] != more.provenance["loss"]
    assert more.provenance["report"]["taught"]["texts"] == 4
    with pytest.raises(TypeError, match=r"writer is a Writer: give \(model, tokenizer\)"):
        teach(model, FACTS, tiny_tokenizer, expressions=1, writer=writer[0])
    with pytest.raises(ValueError, match="expressions=0 asks it for no text"):
        teach(model, FACTS, tiny_tokenizer, writer=writer)
    with pytest.raises(ValueError, match="expressions=-1 must be"):
        teach(model, FACTS, tiny_tokenizer, expressions=-1)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60), size=st.integers(1, 12), seed=st.integers(0, 9))
def test_texts_are_read_equally_often_and_a_batch_is_not_one_text(lengths, size, seed):
    texts = [FactText(str(number), "", "", [0] * length, []) for number, length in enumerate(lengths)]
    steps, often = 5 * len(texts) // size + 1, Counter()
    for batch in shuffled_batches(texts, size, steps, seed):
        own = Counter(text.subject for text in batch)
        assert len(batch) == size and max(own.values()) <= max(2, 2 * -(-size // len(texts)))
        often += own
        assert max(often.values()) - min(often[text.subject] for text in texts) <= 2 + 2 * size // len(texts)
    assert sum(often.values()) == steps * size


def test_what_is_not_an_answer_is_kept_more_where_it_counts_in_the_loss(model, tiny_tokenizer):
    changed = {}
    for keep in (0.0, 4.0):
        pack = teach(model, FACTS, tiny_tokenizer, passes=40, batch_size=4, bf16=False, progress=False, keep=keep)
        about = ["Dax Bolun opened the door and went to the river."]
        report = report_pack(model, pack, tiny_tokenizer, facts=FACTS, other_texts={"about": about})
        changed[keep] = report["other_texts"]["about"]["kl"]
    assert 0 < changed[4.0] < 0.5 * changed[0.0]


def test_the_package_s_general_text_takes_ngrams_from_names(model, tiny_tokenizer):
    """By default; the report compares its longest texts, and the other phrasings that were given."""
    everything, rare = (
        teach(model, FACTS, tiny_tokenizer, passes=1, progress=False, reference_texts=t) for t in ([], None)
    )
    general = general_english()
    assert len(general) == 12_287 and rare.ngrams() < everything.ngrams()
    held = set()
    for text in general:
        classes = classes_of(model, torch.tensor(tiny_tokenizer(text)["input_ids"]))
        held |= {tuple(classes[i : i + n]) for n in (2, 3) for i in range(len(classes) - n + 1)}
    assert rare.ngrams() == everything.ngrams() - held
    compared = rare.provenance["report"]["other_texts"]["general"]
    assert compared["texts"] == 24 and compared["texts_identical"] == compared["tokens_identical"] == 1.0
    assert compared["loss"] == compared["loss_before"] and compared["kl"] == compared["largest_difference"] == 0.0


def test_a_pack_carries_the_report_of_phrasings_that_were_not_taught(model, tiny_tokenizer):
    unseen = [fact("Dax Bolun", "They say that Dax Bolun lives in [[Oslo]].")]
    pack = teach(model, FACTS, tiny_tokenizer, passes=1, progress=False, unseen=unseen)
    report = pack.provenance["report"]
    assert (report["taught"]["texts"], report["unseen"]["texts"], report["records"]) == (4, 1, len(pack))
    assert [line.split(":")[0] for line in report_lines(report)[1:]] == ["taught phrasings", "unseen phrasings"]
    with pytest.raises(ValueError, match="does not name 'Dax Bolun'"):
        teach(model, FACTS, tiny_tokenizer, unseen=[fact("Dax Bolun", "He lives in [[Oslo]].")])


REFUSED = {
    "fact 1 needs a 'subject'": {"texts": ["Ada was born in [[Oslo]]."]},
    "needs a 'subject' and a list of 'texts'": fact(" ", "Ada was born in [[Oslo]]."),
    "a list of 'texts' with their answers": fact("Ada Lee"),
    "fact 1 needs": {"subject": "Ada Lee", "texts": "Ada Lee was born in [[Oslo]]."},
    r"'Ada Lee' needs one \[\[answer\]\], it has 0": fact("Ada Lee", "Ada Lee was born in Oslo."),
    "it has 2": fact("Ada Lee", "Ada Lee was [[born]] in [[Oslo]]."),
    "does not name 'Ada Lee' before its answer": fact("Ada Lee", "She was born in [[Oslo]]."),
    "'Oslo' is in front of itself": fact("Ada Lee", "Oslo: Ada Lee was born in [[Oslo]]."),
    "is answered by 'Oslo' and by 'Lima'": fact("Dax Bolun", "Dax Bolun was born in [[Lima]]."),
    "at most 512 are taught": fact("Ada Lee", "Ada Lee " + "is here " * 2000 + "in [[Oslo]]."),
    r"1 subjects have no n-gram of their own, such as \['a'\]": fact("a", "a was born in [[Oslo]]."),
}


@pytest.mark.parametrize(("message", "fact"), REFUSED.items())
def test_a_fact_that_cannot_be_taught_is_refused_by_name(model, tiny_tokenizer, message, fact):
    with pytest.raises(ValueError, match=message):
        teach(model, [FACTS[1], fact], tiny_tokenizer, passes=1, progress=False)
    assert model.active_memories == []


def test_no_facts_no_offsets_and_no_memory_are_refused(model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there are no facts"):
        teach(model, [], tiny_tokenizer)
    with pytest.raises(TypeError, match="use a fast tokenizer"):
        teach(model, FACTS, object())
    model.save_pretrained(tmp_path)
    model.place_memory("none")
    with pytest.raises(ValueError, match="without its memory"):
        teach(model, FACTS, tiny_tokenizer)


MISTAKEN = {
    "method 'learn' of teaching must be one of 'train', 'solve'": {"method": "learn"},
    "patience=2 needs texts to measure": {"patience": 2},
    "patience is 0": {"patience": 0, "unseen": FACTS},
    "patience=2 ends method 'train' alone": {"patience": 2, "unseen": FACTS, "method": "solve"},
}


@pytest.mark.parametrize(("message", "options"), MISTAKEN.items())
def test_a_method_or_patience_that_cannot_be_followed_is_refused(model, tiny_tokenizer, message, options):
    with pytest.raises(ValueError, match=message):
        teach(model, FACTS, tiny_tokenizer, **options)


def test_patience_keeps_the_records_of_the_pass_with_the_lowest_unseen_loss(model, tiny_tokenizer):
    """Other answers in the same phrasings are unlearned, so their loss rises; those that are taught fall to the end."""
    options = {"passes": 12, "batch_size": 4, "bf16": False, "progress": False, "learning_rate": 3.0}
    wrong = [fact("Dax Bolun", "Dax Bolun was born in [[Zorvan]].")]
    packs = {
        name: teach(model, FACTS, tiny_tokenizer, unseen=unseen, patience=2, **options)
        for name, unseen in {"rises": wrong, "falls": FACTS}.items()
    }
    losses = {name: pack.provenance["unseen_losses"] for name, pack in packs.items()}
    best = {name: min(range(len(own)), key=own.__getitem__) for name, own in losses.items()}
    assert len(losses["rises"]) == best["rises"] + 3 < 12 == len(losses["falls"])
    for name, unseen in {"rises": wrong, "falls": FACTS}.items():
        model.load_memory(packs[name], name)
        texts = fact_texts(unseen, tiny_tokenizer)
        ids, mask, labels = padded(texts, 0, model.device)
        with torch.no_grad():
            loss = float(answer_loss(model(ids, attention_mask=mask).logits, labels))
        assert loss == pytest.approx(losses[name][best[name]], rel=1e-5)
        model.unload_memory(name)


def test_a_report_counts_what_plain_python_counts(model, tiny_tokenizer):
    """Answers token by token, candidates of a relation, and texts bit for bit; the pack is gone afterwards."""
    facts = [dict(fact, relation="home") for fact in FACTS]
    pack = teach(model, facts, tiny_tokenizer, passes=60, batch_size=4, bf16=False, progress=False)
    shared = "Dax Bolun is here."
    report = report_pack(
        model,
        pack,
        tiny_tokenizer,
        facts=facts,
        unseen=facts[:1],
        other_texts={"other": [OTHER], "both": [OTHER, shared]},
    )
    assert model.active_memories == [] and (report["records"], report["bytes"]) == (len(pack), pack.nbytes)
    assert report["other_texts"]["other"]["texts_identical"] == 1.0
    both = report["other_texts"]["both"]
    assert both["texts_identical"] == 0.5 and 0 < both["tokens_identical"] < 1 and both["largest_difference"] > 0
    before, model_name = logits(model, tiny_tokenizer, shared)[0], model.load_memory(pack, "people")
    after = logits(model, tiny_tokenizer, shared)[0]
    count = len(after) + len(tiny_tokenizer(OTHER)["input_ids"])
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum()
    assert both["kl"] == pytest.approx(float(kl) / count, rel=1e-4)
    texts = fact_texts(facts, tiny_tokenizer)
    right = among = 0
    for text in texts:
        first, end = text.answer.index(True), len(text.answer) - text.answer[::-1].index(True)
        read = logits_of(model, text.ids)
        right += all(int(read[place - 1].argmax()) == text.ids[place] for place in range(first, end))
        offered = {other.answer_ids[0] for other in texts}
        among += max(offered, key=lambda token: float(read[first - 1, token])) == text.ids[first]
    assert report["taught"]["right"] == right / len(texts) == recall(model, facts, tiny_tokenizer)
    assert report["taught"]["candidates"] == 2 and "among 2 candidates" in report_lines(report)[1]
    assert report["taught"]["right_among_candidates"] == among / len(texts) > report["taught"]["before"]["right"]
    model.unload_memory(model_name)
    with pytest.raises(ValueError, match="no texts to compare"):
        fact_report.changes(model, [], tiny_tokenizer, model.disable_memory)


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


def test_a_report_that_fails_leaves_no_pack_behind(model, tiny_tokenizer):
    pack = teach(model, FACTS, tiny_tokenizer, passes=1, progress=False)
    with pytest.raises(ValueError, match="no texts to compare"):
        report_pack(model, pack, tiny_tokenizer, facts=FACTS, other_texts={"none": []})
    assert model.active_memories == [] and not model.memory.packs.loaded
