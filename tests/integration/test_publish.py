"""Publishing a checkpoint on a stand-in for the Hub that also fails on purpose, and loading it from there.

Run: pytest tests/integration/test_publish.py
"""

import json
import os
import shutil

import pytest
from huggingface_hub import ModelCard

from engram_transformers.conversion.publish import zero_tables

from .forked import Forked
from .hub_server import COMMIT, TOKEN, Fault


PUBLISH = """
import sys, time
from engram_transformers.conversion.cli import app
time.sleep = lambda seconds: None  # between tries
app(["publish", *sys.argv[1:]])
"""

LOAD = """
import hashlib, json, sys, time
import huggingface_hub
source, package, placements, hub = sys.argv[1], sys.argv[2], sys.argv[3].split(), json.loads(sys.argv[4])
huggingface_hub.constants.HF_HUB_OFFLINE = sys.argv[5] == "True"
time.sleep = lambda seconds: None  # between tries
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "engram_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
if package == "with":
    import engram_transformers
else:
    sys.meta_path.insert(0, Absent())
    hub["trust_remote_code"] = True
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(source, **hub)
for placement in placements:
    model = AutoModelForCausalLM.from_pretrained(source, engram_placement=placement, **hub)
    assert type(model).__module__.startswith("engram_transformers." if package == "with" else "transformers_modules.")
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None]).logits
    print(placement, hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""

LEFT_BY_TRAINING = ("optimizer.pt", "training_args.bin", "checkpoint-2/model.safetensors", ".saving-x/config.json")


@pytest.fixture
def checkpoint(tiny_engram, tiny_tokenizer, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    tiny_tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def repository(hub, tmp_path):
    """A repository with an older checkpoint, some of whose files would be read beside a new one."""
    hub.folder = tmp_path / "repository"
    hub.folder.mkdir()
    for name in ("model.safetensors", "engram-memory-00002-of-00002.safetensors", "adapter_config.json", "notes.md"):
        (hub.folder / name).write_text("{}")
    return hub.folder


@pytest.fixture
def publish(hub, hub_process, repository, tmp_path):
    """`publish(folder, *options)`: runs `engram publish` to "me/private"."""

    def run(folder, *options, repo="me/private"):
        done = hub_process[0].run(PUBLISH, folder, repo, "--token", TOKEN, *options, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


@pytest.fixture(scope="module")
def clean(hub_server, hub_process):
    """A process that knows Transformers, and of the package nothing; its Hub and home are those of `hub_process`."""
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HOME": hub_process[1], "NO_PROXY": "127.0.0.1"}
    settings["HF_ENDPOINT"] = f"http://127.0.0.1:{hub_server.server_port}"
    with Forked("import torch, transformers", **settings) as forked:
        yield forked


@pytest.fixture
def load(hub, hub_process, clean, tmp_path):
    """`load(source, package, placements, offline)`: digests of logits, from a process that has loaded nothing yet."""

    def run(source, package="with", placements="cpu", offline=False, fails=False, **arguments):
        told = json.dumps({"token": TOKEN, **arguments})
        process = hub_process[0] if package == "with" else clean
        done = process.run(LOAD, source, package, placements, told, offline, cwd=tmp_path)
        assert bool(done.returncode) == fails, done.stderr[-3000:]
        return done.stderr if fails else dict(line.split() for line in done.stdout.splitlines())

    return run


def names_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_loads_with_and_without_the_package(checkpoint, publish, repository, hub, load):
    expected = names_in(checkpoint) | {"README.md", "notes.md"}
    for name in LEFT_BY_TRAINING:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"hf_secret")
    before = {name: (checkpoint / name).read_bytes() for name in names_in(checkpoint)}
    code, said = publish(checkpoint, "--license", "mit", "--base-model", "me/donor", "--revision", "v2")
    assert code == 0, said
    assert "0 of them zeros" in said and "Not sent: optimizer.pt, training_args.bin." in said
    assert any("/branch/v2" in path for path in hub.asked)
    assert names_in(repository) == expected and b"hf_secret" not in b"".join(hub.received.values())
    assert all((repository / name).read_bytes() == before[name] for name in expected & set(before))
    card = ModelCard((repository / "README.md").read_text())
    assert (card.data.base_model, card.data.license) == ("me/donor", "mit")
    assert 'from_pretrained("me/private")' in card.text and "digests match, constants derive again" in card.text
    assert names_in(checkpoint) == set(before), "the folder is as it was"
    here = load(checkpoint)
    assert here == load("me/private") == load("me/private", "without")


def test_tables_of_zeros_are_sent_only_if_asked_for(checkpoint, publish, repository, hub, tiny_engram, tmp_path):
    tiny_engram().save_pretrained(tmp_path / "fresh")
    shutil.copy(checkpoint / "tokenizer.json", tmp_path / "fresh")
    shutil.copy(checkpoint / "tokenizer_config.json", tmp_path / "fresh")
    shard = tmp_path / "fresh" / "engram-memory-00001-of-00001.safetensors"
    code, said = publish(tmp_path / "fresh")
    found = zero_tables(tmp_path / "fresh")
    assert code == 2 and f"{sum(found.values()):,} bytes of the memory" in said and not hub.received, said
    assert 0 < shard.stat().st_size - sum(found.values()) < 2000, "but for the header"
    assert zero_tables(checkpoint) == {}
    with open(shard, "r+b") as file:  # the last value of one table
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert len(zero_tables(tmp_path / "fresh")) == len(found) - 1
    code, said = publish(tmp_path / "fresh", "--yes")
    assert code == 0 and shard.read_bytes() in hub.received.values(), said
    assert (
        "bytes of the tables hold nothing but zeros: they were not trained." in (repository / "README.md").read_text()
    )


def test_what_would_not_load_is_not_published(checkpoint, publish, hub, tmp_path):
    def refused(says: str, *options, folder=checkpoint, **others):
        code, said = publish(folder, *options, **others)
        assert code == 2 and says in said, said

    refused("must be owner/name", repo="private")
    refused("no config.json", folder=tmp_path / "nowhere")
    shutil.copytree(checkpoint, tmp_path / "with card")
    (tmp_path / "with card" / "README.md").write_text("# mine")
    refused("base_model and license would not be read", "--license", "mit", folder=tmp_path / "with card")
    shutil.copytree(checkpoint, tmp_path / "delta")
    (tmp_path / "delta" / "model.safetensors.index.json").unlink()
    (tmp_path / "delta" / "memory_delta.safetensors").write_bytes(b"x")
    refused("a memory delta", folder=tmp_path / "delta")
    (checkpoint / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused("is not published, because it would not load: tokenizer:")
    (tmp_path / "tokenizer.json").rename(checkpoint / "tokenizer.json")
    shard = checkpoint / "engram-memory-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    refused("is not published, because it would not load: files:")
    assert not hub.received and not hub.commit


@pytest.mark.parametrize(
    ("asked", "what"), [("PUT /lfs", 503), ("PUT /lfs", 429), ("PUT /lfs", "cut"), ("objects/batch", 503)]
)
def test_an_upload_that_fails_for_a_while_is_tried_again(asked, what, checkpoint, publish, repository, hub):
    hub.faults = [Fault(asked, what, times=2)]
    code, said = publish(checkpoint)
    assert code == 0 and hub.failed == [what] * 2, said
    shard = "engram-memory-00001-of-00001.safetensors"
    assert (repository / shard).read_bytes() == (checkpoint / shard).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("POST /api/models/me/private/commit", 503),  # huggingface_hub does not try again
        ("POST /api/models/me/private/preupload", 403),
        ("PUT /lfs", "cut"),
        ("PUT /lfs", 503),
    ],
)
def test_an_upload_that_keeps_failing_leaves_the_repository_as_it_was(
    asked, what, checkpoint, publish, repository, hub
):
    before = names_in(repository)
    hub.faults = [Fault(asked, what, times=100)]
    code, said = publish(checkpoint)
    assert code == 2 and "'me/private' could not be published" in said and "publish again" in said, said
    assert names_in(repository) == before and not hub.commit
    arrived, hub.faults = set(hub.received), [Fault(f"PUT /lfs/{oid}", 500, times=100) for oid in hub.received]
    assert bool(arrived) == ("/commit" in asked)
    code, said = publish(checkpoint)
    assert code == 0 and hub.failed.count(500) == 0, f"what had arrived was sent again: {said}"


def test_a_repository_that_holds_something_else_is_not_called_done(checkpoint, publish, repository, hub):
    hub.faults = [Fault("PUT /lfs", "wrong")]
    code, said = publish(checkpoint)
    assert code == 2 and hub.failed == ["wrong"], said
    assert "'me/private' does not hold what was sent: " in said and ".safetensors of commit " in said
    hub.faults = [Fault("POST /api/models/me/private/paths-info", 500)]
    code, said = publish(checkpoint)
    assert code == 2 and "could not be compared with the files" in said, said


@pytest.mark.parametrize("what", [429, "cut"])
def test_a_download_that_fails_for_a_while_is_tried_again(what, checkpoint, hub, load):
    hub.folder = checkpoint
    hub.faults = [Fault("GET /me/private/resolve/", what, times=3), Fault("engram-memory", what, times=1)]
    assert load("me/private") == load(checkpoint)
    assert hub.failed == [what] * 4


@pytest.mark.slow
def test_a_download_that_keeps_failing_is_an_error_and_leaves_no_half_file(checkpoint, hub, load):
    hub.folder = checkpoint
    hub.faults = [Fault("GET /me/private/resolve/" + COMMIT + "/engram-memory", 503, times=100)]
    assert "503" in load("me/private", fails=True)
    hub.faults = []
    assert load("me/private") == load(checkpoint)


@pytest.mark.slow
def test_revisions_subfolders_and_an_offline_cache(checkpoint, hub, load, tiny_engram, fill_memory, tmp_path):
    hub.folder = tmp_path / "repository"
    other = fill_memory(tiny_engram(), seed=9)  # the same constants, other rows
    shutil.copytree(checkpoint, hub.folder / "inner")
    shutil.copytree(checkpoint, hub.folder, dirs_exist_ok=True)
    other.save_pretrained(hub.folder)
    hub.others["v1"] = (checkpoint, "d" * 40)
    older, newer = load(checkpoint)["cpu"], load(hub.folder)["cpu"]
    assert older != newer
    places = "device cpu disk"
    for arguments, expected in (({}, newer), ({"revision": "v1"}, older), ({"subfolder": "inner"}, older)):
        for offline in (False, True):
            hub.faults = [Fault("", 500, times=100)] if offline else []
            found = load("me/private", "with", places, offline, **arguments)
            assert found == dict.fromkeys(places.split(), expected), (arguments, offline)
    assert not hub.failed, "a request from an offline process"
    snapshots = hub.home / "hub" / "models--me--private" / "snapshots"
    shards = list(snapshots.rglob("engram-memory-*"))
    assert len(shards) == 3 and all(path.is_symlink() for path in shards), "nothing was copied"
    assert load(snapshots / ("d" * 40), placements=places, offline=True) == dict.fromkeys(places.split(), older)
    assert load("me/private", "without", "disk", offline=True, fails=True), "control: its code was never fetched"
