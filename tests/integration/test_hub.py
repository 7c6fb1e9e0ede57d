"""Against a stand-in for the Hub: what a push sends, what a graft fetches, and that no token is kept.

Run: pytest tests/integration/test_hub.py
"""

import json
import shutil
from base64 import b64decode

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from ..packs import classes_of, ngrams_in, pack_of
from .hub_server import COMMIT, TOKEN


SCRIPT = """
import sys
import engram_transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
if sys.argv[2] == "push":
    model.push_to_hub("me/memory", token="hf_stand_in")
else:
    model.save_pretrained(sys.argv[3], push_to_hub=True, repo_id="me/memory", token="hf_stand_in")
"""


@pytest.mark.parametrize("way", ["push", "save"])
def test_a_push_sends_every_file_and_says_the_bytes_first(way, hub, with_hub, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    done = with_hub(SCRIPT, tmp_path / "saved", way, tmp_path / "again")
    sent = {line["value"]["path"] for line in hub.commit if line["key"] in ("file", "lfsFile")}
    for name in (
        "config.json",
        "engram-memory-00001-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "modeling_engram.py",
        "README.md",
    ):
        assert name in sent, sorted(sent)
    assert not any(name.startswith(".saving") for name in sent)
    memory = (tmp_path / "saved" / "engram-memory-00001-of-00001.safetensors").read_bytes()
    assert memory in hub.received.values(), "the memory shard did not arrive byte for byte"
    assert f"{len(memory):,} of them memory" in done.stderr.replace("\n", " ")
    card = next(line["value"] for line in hub.commit if line["key"] == "file" and line["value"]["path"] == "README.md")
    assert torch.tensor(len(card["content"])) > 0


TRAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
from engram_transformers import EngramTrainer
from engram_transformers.training import EngramTrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = {"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)}
settings = {"max_steps": 2, "save_steps": 2, "save_strategy": "steps", "report_to": [], "use_cpu": True}
hub = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "me/memory", "hub_token": "hf_stand_in"}
arguments = EngramTrainingArguments(sys.argv[2], **settings, **hub)
EngramTrainer(model, arguments, train_dataset=[text] * 4, trainable=sys.argv[3]).train()
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize("mode", ["memory", "all"])
def test_what_a_run_pushes_while_it_trains_is_the_whole_model(mode, hub, with_hub, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "graft")
    run = tmp_path / "run"
    run.mkdir()
    (run / "memory_delta.safetensors").write_bytes(b"of an earlier run")
    with_hub(TRAIN, tmp_path / "graft", run, mode, tmp_path / "trained")
    sent = {line["value"]["path"] for line in hub.commit if line["key"] in ("file", "lfsFile")}
    expected = {path.relative_to(tmp_path / "trained").as_posix() for path in (tmp_path / "trained").rglob("*.*")}
    assert expected <= sent, sorted(expected - sent)
    assert "memory_delta.safetensors" not in sent
    pushed, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run, tmp_path / "trained"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, pushed.state_dict()[name]), name


GRAFT = """
import sys
from engram_transformers.conversion.cli import app
sizes = ["--vocab-size", "200", "--n-heads", "2", "--head-dim", "4"]
app(["graft", "me/private", *sys.argv[1:], "--token", "TOKEN", *sizes])
""".replace("TOKEN", TOKEN)

PLAN = GRAFT.replace('"graft"', '"plan"')

OTHERS = (
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "optimizer.bin",
    "training_args.bin",
    "flax_model.msgpack",
    "onnx/decoder_model.onnx",
    "openvino/openvino_model.bin",
    "adapter/adapter_model.safetensors",
    "runs/events.json",
)


@pytest.mark.parametrize("weights", ["one file", "several files", "pickled", "in a subfolder"])
def test_a_graft_fetches_one_format_of_the_weights(weights, hub, with_hub, tiny_donor, tiny_tokenizer, tmp_path):
    hub.folder = tmp_path / "repository"
    inside = hub.folder / ("inner" if weights == "in a subfolder" else "")
    tiny_donor().save_pretrained(inside, max_shard_size=200_000 if weights == "several files" else "1GB")
    tiny_tokenizer.save_pretrained(inside)
    safetensors = {path.relative_to(hub.folder).as_posix() for path in inside.glob("*.safetensors")}
    torch.save(tiny_donor().state_dict(), inside / "pytorch_model.bin")
    for name in OTHERS:
        (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / name).write_bytes(b"{}")
    if weights == "pickled":
        (hub.folder / "model.safetensors").unlink()
        safetensors = {"pytorch_model.bin"}
    elif weights == "in a subfolder":
        tiny_donor(seed=1).save_pretrained(hub.folder)
    options = ["--subfolder", "inner"] if weights == "in a subfolder" else ["--revision", "v2"]
    with_hub(GRAFT, tmp_path / "out", "--cache-dir", tmp_path / "cache", *options)
    described = {name for name in hub.fetched if name.rpartition(".")[2] not in ("safetensors", "bin")}
    assert set(hub.fetched) - described == safetensors
    assert described == {
        name.relative_to(hub.folder).as_posix() for name in inside.iterdir() if name.suffix in (".json", ".jinja")
    }
    assert hub.revisions[0] == ("main" if weights == "in a subfolder" else "v2")
    assert set(hub.revisions[1:]) == {COMMIT}, "weights of another commit than the configuration's"
    receipt = (tmp_path / "out" / "engram_graft.json").read_text()
    assert json.loads(receipt)["revision"] == COMMIT and TOKEN not in receipt
    ids = torch.randint(3, 4000, (2, 9))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(found(ids).logits, tiny_donor()(ids).logits)
    assert not (hub.home / "hub").exists(), "the donor is in another cache than the one that was named"


def test_a_plan_fetches_no_weights(hub, with_hub, tiny_donor, tiny_tokenizer, tmp_path):
    hub.folder = tmp_path / "repository"
    tiny_donor().save_pretrained(hub.folder)
    tiny_tokenizer.save_pretrained(hub.folder)
    done = with_hub(PLAN)
    assert "donor         me/private: llama" in done.stdout
    assert "config.json" in hub.fetched and not any(name.endswith((".safetensors", ".bin")) for name in hub.fetched)


PICKLES = """
import copy, io, os, pickle, sys
from pathlib import Path
import torch
from engram_transformers import EngramForCausalLM
from transformers import AutoModel, AutoModelForCausalLM

token, folder, ids = sys.argv[1], sys.argv[2], torch.tensor([[5, 6, 7, 8]])
local = AutoModelForCausalLM.from_pretrained(folder)
expected = local(ids).logits

def check(model):
    torch.save(model, file := io.BytesIO())
    for held in (pickle.dumps(model), file.getvalue(), pickle.dumps(copy.deepcopy(model))):
        assert token.encode() not in held, (type(model), model.memory.placement)

model = AutoModelForCausalLM.from_pretrained("me/private", token=token, engram_placement="none")
check(model)
with local.disable_memory():
    assert torch.equal(model(ids).logits, local(ids).logits) and not torch.equal(model(ids).logits, expected)
assert not any(Path(os.environ["HF_HOME"]).rglob("engram-memory-*")), "a memory that is not wanted was downloaded"
try:
    model.place_memory("disk")
except FileNotFoundError as error:
    print(error)
for kind in (AutoModelForCausalLM, AutoModel, EngramForCausalLM):
    for placement in ("auto", "device", "cpu", "disk", "none"):
        model = kind.from_pretrained("me/private", token=token, engram_placement=placement)
        assert kind is AutoModel or placement == "none" or torch.equal(model(ids)[0], expected)
        check(model)
        again = pickle.loads(pickle.dumps(model)).place_memory("disk")  # of the commit in the cache, without a token
        assert torch.equal(again(ids)[0], model.place_memory("cpu")(ids)[0])
sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
check(EngramForCausalLM.from_backbone("me/private", token=token, subfolder="donor", **sizes))  # its tokenizer as well
"""


def test_a_memory_is_fetched_where_it_is_wanted_and_a_token_is_in_no_pickle(
    hub, with_hub, tiny_engram, tiny_donor, tiny_tokenizer, tmp_path
):
    hub.folder = tmp_path / "repository"
    tiny_donor().save_pretrained(hub.folder / "donor")
    tiny_tokenizer.save_pretrained(hub.folder / "donor")
    tiny_engram(trained=True).save_pretrained(hub.folder)
    done = with_hub(PICKLES, TOKEN, hub.folder)
    assert "hf auth login" in done.stdout and "token=" in done.stdout, "what was not fetched needs the token again"
    memory = [name for name in hub.fetched if name.startswith("engram-memory")]
    assert len(memory) == 1, "control: fetched with the token, once for all"
    assert hub.fetched.index("model-00001-of-00001.safetensors") < hub.fetched.index(memory[0])


PACK = """
import sys
import torch
import engram_transformers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from engram_transformers.conversion.cli import app

folder, token, *published = sys.argv[1:]
if published:
    told = ["--base-model", "me/graft", "--license", "cc0-1.0", "--token", token]
    done = CliRunner().invoke(app, ["pack", "publish", *published, *told])
    print(done.output)
    sys.exit(done.exit_code)
model = AutoModelForCausalLM.from_pretrained(folder)
before = model(torch.arange(3, 20)[None]).logits
print(model.load_memory("me/private", token=token))
print(repr(model(torch.arange(3, 20)[None]).logits.double().abs().sum().item()))
model.unload_memory("people")
assert torch.equal(model(torch.arange(3, 20)[None]).logits, before)
for wrong, more in (("me/nothing", {}), ("people.engram-pack.safetensors", {"revision": "v2"})):
    try:
        model.load_memory(wrong, **more)
    except (FileNotFoundError, ValueError) as error:
        print(type(error).__name__, error)
"""


@torch.no_grad()
def test_a_pack_is_published_with_its_card_and_read_from_the_hub(hub, with_hub, hub_process, tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    model.save_pretrained(tmp_path / "graft")
    pack = pack_of(model, ngrams_in(classes_of(model, torch.arange(3, 20))))
    side = {"right": 0.5, "texts": 4, "before": {"right": 0.0}}
    pack.provenance = {"note": "a|b\n# <b>x</b>", "report": {"taught": side, "other_texts": {}}}
    file = pack.save(tmp_path / "people.engram-pack.safetensors")
    with_hub(PACK, tmp_path / "graft", TOKEN, file, "me/memory")
    sent = {line["value"]["path"]: line["value"] for line in hub.commit if line["key"] in ("file", "lfsFile")}
    assert set(sent) == {file.name, "README.md"} and file.read_bytes() in hub.received.values()
    text = b64decode(sent["README.md"]["content"]).decode()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (
        "me/graft",
        "adapter",
        "cc0-1.0",
    )
    assert (
        'load_memory("me/memory", name="people")' in text
        and "| taught phrasings | 4 | 50.0% right | 0.0% right |" in text
    )
    assert r"- note: a\|b \# \<b\>x\</b\>" in text and "{{" not in text

    hub.folder = tmp_path / "repository"
    hub.folder.mkdir()
    shutil.copy(file, hub.folder)
    (hub.folder / "model.safetensors").write_bytes(b"not wanted")
    done = with_hub(PACK, tmp_path / "graft", TOKEN)
    name, read, *errors = done.stdout.splitlines()
    model.load_memory(pack, name="people")
    here = model(torch.arange(3, 20)[None]).logits.double().abs().sum().item()
    assert name == "people" and float(read) == pytest.approx(here, rel=1e-9)
    assert hub.fetched == [file.name] and len(errors) == 2
    assert errors[0].startswith("FileNotFoundError 'me/nothing' is not a file here") and "needs token=" in errors[0]
    assert errors[1].startswith("ValueError revision='v2' is for packs on the Hub")

    shutil.copy(file, hub.folder / "law.engram-pack.safetensors")
    shutil.rmtree(hub.home / "hub")  # the stand-in has one commit, whose list of files is kept there
    done = hub_process[0].run(PACK, tmp_path / "graft", TOKEN, cwd=tmp_path)
    assert done.returncode and "'me/private' holds 2 knowledge packs ['law" in done.stderr


def test_a_pack_that_could_not_be_loaded_again_is_not_published(hub, hub_process, tiny_engram, tmp_path):
    model = tiny_engram(trained=True)
    pack = pack_of(model, ngrams_in(classes_of(model, torch.arange(3, 20))))
    good, other = (pack.save(tmp_path / name) for name in ("people.engram-pack.safetensors", "people.safetensors"))
    damaged = tmp_path / "damaged.engram-pack.safetensors"
    damaged.write_bytes(good.read_bytes()[:-8])
    for file, repository in ((other, "me/memory"), (good, "people"), (good, "me/a/b"), (damaged, "me/memory")):
        done = hub_process[0].run(PACK, tmp_path, TOKEN, file, repository, cwd=tmp_path)
        assert done.returncode == 2 and "error:" in done.stdout, done.stdout + done.stderr[-500:]
    assert not hub.received and not hub.commit
