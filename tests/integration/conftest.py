"""What the tests of this folder share: a filled memory, its checkpoint and the device that counts; processes that work
together and the graft that they load; a donor's folder; a memory that learns; a stand-in for the Hub."""

import os
import shutil
import threading
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import LlamaConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from engram_transformers import EngramForCausalLM

from ..faults import shard_of
from ..tiny import engram_on
from .backbones import HEADS
from .forked import Forked
from .hub_server import Hub, forget
from .placed import loaded
from .process_models import small_model
from .ranks import Ranks
from .stepping import four_batches


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where PEFT is older than Transformers' own methods for adapters ask for, tests of them may end with its error."""
    refused = Version(version("peft")) < Version(MIN_PEFT_VERSION)
    if not (refused and pyfuncitem.get_closest_marker("native_peft")):
        return (yield)
    try:
        return (yield)
    except (ValueError, AssertionError) as error:  # the second where a test waits for another ValueError
        assert f"please use a version >= {MIN_PEFT_VERSION}" in str(error)
        return True


@pytest.fixture(scope="session")
def device(counting_device):
    """`torch.counting`."""
    return counting_device


@pytest.fixture(scope="module")
def original() -> EngramForCausalLM:
    """A filled memory that was made here; tests only read it."""
    return engram_on(LlamaConfig(**HEADS), (1, 2))


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The checkpoint of such a memory; tests only read it."""
    folder = tmp_path_factory.mktemp("saved")
    engram_on(LlamaConfig(**HEADS), (1, 2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def control(saved) -> EngramForCausalLM:
    """The saved memory among the parameters of a model on the CPU."""
    return loaded(saved)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to do harm to; whatever is written into it from now on changes the time of the last change."""
    shutil.copytree(saved, tmp_path / "saved")
    os.utime(shard_of(tmp_path / "saved"), ns=(0, 0))
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def pair():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def trio():
    with Ranks(3) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """A folder with the small model."""
    folder = tmp_path_factory.mktemp("graft")
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def donor(tmp_path, tiny_donor, tiny_tokenizer):
    """The folder of a donor that knows no memory."""
    folder = tmp_path / "donor"
    tiny_donor().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def batches():
    """Four batches of two texts."""
    return four_batches()


@pytest.fixture
def memory(tiny_engram):
    """Factory of a filled model whose memory alone learns."""

    def make(**fields):
        model = tiny_engram(trained=True, **fields)
        model.set_trainable("memory")
        return model

    return make


@pytest.fixture(scope="module")
def hub_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def hub_process(hub_server, tmp_path_factory):
    """What runs programs for which the stand-in is the Hub, and their home."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HOME": home, "NO_PROXY": "127.0.0.1"}
    endpoint = f"http://127.0.0.1:{hub_server.server_port}"  # read when huggingface_hub is imported
    with Forked("from engram_transformers import EngramTrainer, graft", HF_ENDPOINT=endpoint, **settings) as forked:
        yield forked, home


@pytest.fixture
def hub(hub_server, hub_process):
    """The stand-in, which knows of nothing yet."""
    forget(hub_server, hub_process[1])
    return hub_server


@pytest.fixture
def with_hub(hub, hub_process, tmp_path):
    """`with_hub(script, *arguments)`: runs a program for which the stand-in is the Hub."""

    def run(script: str, *arguments):
        done = hub_process[0].run(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run
