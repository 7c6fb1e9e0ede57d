"""LogitLens and CKA against their closed forms.

Run: pytest tests/integration/test_depth.py
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config
from typer.testing import CliRunner

from engram_transformers.conversion.cli import app
from engram_transformers.inspection import cka_map, layer_states, logit_lens, soft_alignment
from engram_transformers.inspection.depth import hsic


TEXTS = ["Alexander the Great", "the Milky Way", "by the way,", "Princess of Wales", "It rained all day."]


def random_gram(n: int) -> torch.Tensor:
    states = torch.randn(n, 3, dtype=torch.float64)
    gram = states @ states.T
    return gram - torch.diag(gram.diagonal())


@pytest.mark.parametrize("n", [4, 6])
def test_hsic_is_the_mean_over_distinct_examples(n):
    """The U-statistic by its definition: over all ordered quadruples of different examples."""
    first, second = random_gram(n), random_gram(n)
    terms = [
        first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
        for i, j, q, r in itertools.permutations(range(n), 4)
    ]
    torch.testing.assert_close(hsic(first, second), sum(terms) / len(terms), rtol=1e-10, atol=1e-12)


def test_cka_of_turned_scaled_and_independent_states():
    states = torch.randn(3, 40, 8)
    turned = 5 * states @ torch.linalg.qr(torch.randn(8, 8)).Q + 2
    torch.testing.assert_close(cka_map([states], [turned]).diagonal(), torch.ones(3).double(), rtol=1e-5, atol=1e-5)
    many = [torch.randn(1, 50, 8) for _ in range(40)]
    assert abs(float(cka_map(many, [torch.randn(1, 50, 8) for _ in many]))) < 0.05
    # Minibatches add up: two halves of equal size are the means of their estimates.
    halves = list(torch.randn(2, 1, 40, 8).unbind())
    other = [half + torch.randn(1, 40, 8) for half in halves]
    expected = sum_of_estimates(halves, other) / torch.sqrt(
        sum_of_estimates(halves, halves) * sum_of_estimates(other, other)
    )
    torch.testing.assert_close(cka_map(halves, other)[0, 0], expected, rtol=1e-5, atol=1e-5)


def sum_of_estimates(first, second) -> torch.Tensor:
    def gram(states):
        product = states[0].double() @ states[0].double().T
        return product - torch.diag(product.diagonal())

    return sum(hsic(gram(one), gram(other)) for one, other in zip(first, second, strict=True))


def test_soft_alignment_is_a_weighted_mean():
    similarity = torch.tensor([[0.0, 0.1], [1.0, 0.2], [3.0, 0.3], [0.0, 0.4]])
    torch.testing.assert_close(soft_alignment(similarity, 2), torch.tensor([1.75, 1.8 / 0.7]))
    assert soft_alignment(torch.eye(7), 1).tolist() == list(range(7))


@torch.no_grad()
def test_the_lens_is_the_last_norm_and_head(tiny_engram, tiny_tokenizer):
    model = tiny_engram(trained=True)
    found = logit_lens(model, tiny_tokenizer, TEXTS)
    total, tokens, llama = torch.zeros(4, dtype=torch.float64), 0, model.backbone
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        last = out.logits[0].log_softmax(-1)
        for layer in range(4):
            stream = out.hidden_states[layer + 1][0]
            # Transformers gives the last layer's stream behind the norm.
            seen = llama.lm_head(stream if layer == 3 else llama.model.norm(stream)).log_softmax(-1)
            total[layer] += float(F.kl_div(seen, last, reduction="sum", log_target=True))
        tokens += ids.shape[1]
    # The memory is added in front of a layer, so Transformers' states and these are the same.
    torch.testing.assert_close(found, total / tokens, rtol=1e-5, atol=1e-5)
    assert found[-1] == pytest.approx(0, abs=1e-6) and bool((found[:-1] > 1e-3).all())


def test_states_are_the_last_tokens_and_leave_nothing(tiny_engram, tiny_donor, tiny_tokenizer):
    model = tiny_engram(trained=True, donor=tiny_donor())
    (states,) = layer_states(model, tiny_tokenizer, TEXTS)
    (off,) = layer_states(model, tiny_tokenizer, TEXTS, model.disable_memory)
    assert states.shape == (4, 5, 32) and torch.equal(states[0], off[0])  # the memory begins in layer 1
    assert not torch.equal(states[1], off[1])
    ids = torch.tensor([tiny_tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        plain = tiny_donor()(ids, output_hidden_states=True).hidden_states
    assert torch.equal(off[1, 1], plain[2][0, -1])
    assert [len(batch[0]) for batch in layer_states(model, tiny_tokenizer, TEXTS * 2, batch_size=6)] == [6, 4]
    assert not any(module._forward_hooks for module in model.backbone.model.layers)


def test_what_the_lens_cannot_show_is_refused(tiny_engram, tiny_donor, tiny_tokenizer):
    capped = Gemma2Config(
        vocab_size=4104, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1, pad_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    model = tiny_engram(donor=tiny_donor(capped), layers=(1,))
    with pytest.raises(ValueError, match="changes its logits"):
        logit_lens(model, tiny_tokenizer, TEXTS)
    model = tiny_engram()
    for call in (lambda: logit_lens(model, tiny_tokenizer, []), lambda: cka_map([], [])):
        with pytest.raises(ValueError, match="give"):
            call()
    with pytest.raises(ValueError, match="no tokens"):
        logit_lens(model, tiny_tokenizer, [""])
    with pytest.raises(ValueError, match="at least 4"):
        cka_map([torch.randn(1, 3, 2)], [torch.randn(1, 3, 2)])


def test_the_verb(tiny_engram, tiny_tokenizer, tmp_path):
    tiny_engram().save_pretrained(tmp_path / "graft")
    tiny_tokenizer.save_pretrained(tmp_path / "graft")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    done = CliRunner().invoke(app, ["depth", str(tmp_path / "graft"), str(tmp_path / "texts.txt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["kl"]["with the memory"] == told["kl"]["without"]  # a fresh memory adds nothing
    assert torch.tensor(told["cka"]).diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "graft")
    assert len(told["alignment"]) == model.config.text_config.num_hidden_layers
