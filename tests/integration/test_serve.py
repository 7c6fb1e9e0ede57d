"""`engram serve`: the real server as a process of its own, asked with OpenAI's client, against `generate` here.

Run: pytest tests/integration/test_serve.py
"""

import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from engram_transformers import EngramConfig, EngramForCausalLM
from engram_transformers.conversion.cli import app

from ..packs import classes_of, ngrams_in, pack_of
from ..tiny import GOLDEN, engram_on
from .composites import composite_donor, needs_whole_composites


pytest.importorskip("fastapi", reason="of the extra serve")
openai = pytest.importorskip("openai", reason="of the extra serve")

from fastapi.testclient import TestClient  # noqa: E402
from transformers.cli.serving.utils import Modality  # noqa: E402

from engram_transformers.serving import openai_server  # noqa: E402


SERVE = "from engram_transformers.conversion.cli import main; main()"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ENDING = ".engram-pack.safetensors"
TOKENS = 16
QUESTIONS = [f"Who wrote law number {number} of the town, and when?" for number in range(8)]
CHOICES = {"": [], "+law": ["law"], "+town hall": ["town hall"], "+town hall+law": ["town hall", "law"]}


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """Folder `my-graft` with a filled graft and a tokenizer, and two packs beside it that its prompts read."""
    folder = tmp_path_factory.mktemp("served") / "my-graft"
    config = LlamaConfig(
        vocab_size=4104, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    engram_on(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(" of the town, and when?\nassistant:", return_tensors="pt").input_ids[0]
    ngrams = ngrams_in(classes_of(model, ids))
    pack_of(model, ngrams, seed=1).save(folder.parent / f"law{ENDING}")
    pack_of(model, ngrams, seed=2, mode="replace").save(folder.parent / f"town{ENDING}")
    return folder


def start(graft, *options):
    """Starts the server, and returns its process, its address, and where its log is."""
    log = graft.parent / f"log-{len(list(graft.parent.glob('log-*')))}"
    command = [sys.executable, "-c", SERVE, "serve", str(graft), "--port", "0", "--device", "cpu", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    address = process.stdout.readline().strip()
    assert address.startswith("http://localhost:"), log.read_text()
    return process, address, log


def stop(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(graft):
    """Address and log of a server with two packs, of which the plain name reads none."""
    packs = ["--pack", str(graft.parent / f"law{ENDING}"), "--pack", f"town hall={graft.parent / f'town{ENDING}'}"]
    process, address, log = start(graft, *packs)
    yield address, log
    stop(process)


@pytest.fixture(scope="module")
def here(graft):
    """The same model and packs in this process, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(graft)
    model.load_memory(graft.parent / f"law{ENDING}")
    model.load_memory(graft.parent / f"town{ENDING}", name="town hall")
    return model, AutoTokenizer.from_pretrained(graft)


def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=240)


def expected(here, question: str, packs: list[str]) -> torch.Tensor:
    """Tokens of a greedy answer of `generate` to a question alone."""
    model, tokenizer = here
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.set_memories(packs)
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :]


def as_streamed(here, ids: torch.Tensor) -> str:
    """Text of tokens as a stream gives it, which leaves out a character that has begun and does not end."""
    stream = DecodeStream(skip_special_tokens=True)
    return "".join(stream.step(here[1].backend_tokenizer, int(token)) or "" for token in ids)


def ask(address, question: str, model: str, stream: bool):
    """Returns text, number of tokens and reason for the end of an answer."""
    chat = [{"role": "user", "content": question}]
    answer = client(address).chat.completions.create(
        model=model, messages=chat, max_tokens=TOKENS, temperature=0, stream=stream
    )
    if not stream:
        return answer.choices[0].message.content, answer.usage.completion_tokens, answer.choices[0].finish_reason
    chunks = list(answer)
    assert {chunk.model for chunk in chunks} == {model}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > TOKENS / 4, "in pieces, and not at once"
    return text, chunks[-1].usage.completion_tokens, chunks[-1].choices[0].finish_reason


def test_32_streams_at_once_are_each_what_generate_gives(server, here):
    address, log = server
    asked = [(question, suffix) for question in QUESTIONS for suffix in CHOICES]
    with ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(ask, address, question, f"my-graft{suffix}", True) for question, suffix in asked]
        answers = [job.result() for job in jobs]
    tokens = [expected(here, question, CHOICES[suffix]) for question, suffix in asked]
    assert answers == [(as_streamed(here, ids), len(ids), "length") for ids in tokens]
    for number in range(0, 32, 4):
        assert len({tuple(ids.tolist()) for ids in tokens[number : number + 4]}) == 4, "each choice of packs is seen"
    assert "CB: False" in log.read_text() and "CB: True" not in log.read_text()


def test_an_answer_at_once_is_what_generate_gives(server, here, graft):
    ids = expected(here, QUESTIONS[0], ["law"])
    text = here[1].decode(ids, skip_special_tokens=True)
    for name in ("my-graft", str(graft)):
        assert ask(server[0], QUESTIONS[0], f"{name}+law", stream=False) == (text, TOKENS, "length")


def test_completions_and_responses_read_packs_too(server, here):
    model, tokenizer = here
    prompt = "Who is mayor of the town, and when?\nassistant:"
    model.set_memories(["law"])
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)
    plain = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    asked = client(server[0])
    done = asked.completions.create(model="my-graft+law", prompt=prompt, max_tokens=TOKENS, temperature=0)
    assert done.choices[0].text == tokenizer.decode(ids[0, plain:], skip_special_tokens=True)
    done = asked.responses.create(
        model="my-graft+law", input=QUESTIONS[1], max_output_tokens=TOKENS, temperature=0, stream=False
    )
    text = tokenizer.decode(expected(here, QUESTIONS[1], ["law"]), skip_special_tokens=True)
    assert done.output_text == text


@pytest.mark.slow
def test_requests_that_are_batched_continuously_are_each_what_generate_gives(graft, here):
    options = ["--continuous-batching", "--active", "law", "--pack", str(graft.parent / f"law{ENDING}")]
    process, address, log = start(graft, *options, "--pack", f"town hall={graft.parent / f'town{ENDING}'}")
    try:
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            answers = list(pool.map(lambda question: ask(address, question, "my-graft", stream=True), QUESTIONS))
        tokens = [expected(here, question, ["law"]) for question in QUESTIONS]
        assert answers == [(as_streamed(here, ids), len(ids), "length") for ids in tokens]
        text = here[1].decode(tokens[0], skip_special_tokens=True)
        assert ask(address, QUESTIONS[0], "my-graft+law", stream=False)[:2] == (text, TOKENS)
        assert "CB: True" in log.read_text() and "CB: False" not in log.read_text()
        with pytest.raises(openai.BadRequestError, match="all read the packs .'law'., and not .'town hall'."):
            ask(address, QUESTIONS[0], "my-graft+town hall", stream=False)
        with pytest.raises(
            openai.BadRequestError, match="sample as the first one did, with .*'do_sample': False.*'temperature': 0.5"
        ):
            chat = [{"role": "user", "content": QUESTIONS[0]}]
            client(address).chat.completions.create(model="my-graft", messages=chat, max_tokens=4, temperature=0.5)
    finally:
        stop(process)


def test_a_client_that_leaves_disturbs_no_other(server, here):
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    left = client(server[0]).chat.completions.create(
        model="my-graft+law", messages=messages, max_tokens=4000, temperature=0, stream=True
    )
    next(left)
    left.close()
    ids = expected(here, QUESTIONS[2], [])
    assert ask(server[0], QUESTIONS[2], "my-graft", stream=True) == (as_streamed(here, ids), TOKENS, "length")


def test_a_request_that_names_a_field_that_is_not_there_is_an_answer(server):
    with pytest.raises(openai.UnprocessableEntityError, match="memory_names"):
        client(server[0]).completions.create(model="my-graft", prompt="x", extra_body={"memory_names": ["law"]})


def test_the_models_are_listed_by_name_and_pack(server):
    names = ["my-graft", "my-graft+law", "my-graft+town hall"]
    assert [model.id for model in client(server[0]).models.list()] == names


@pytest.mark.parametrize(
    ("model", "status", "says"),
    [
        ("my-graft+war", 404, "no pack named 'war' is loaded"),
        ("my-graft+", 404, "no pack named '' is loaded"),
        ("other", 404, "model 'other' is not served here"),
        ("my-graft+law+law", 400, "names a pack twice"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_name_that_is_not_served_is_an_answer_and_says_which_are(server, model, status, says, stream):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server[0], QUESTIONS[0], model, stream)
    assert caught.value.status_code == status and says in str(caught.value)
    if status == 404:
        assert "['my-graft', 'my-graft+law', 'my-graft+town hall']" in caught.value.body["message"]


def test_an_endpoint_that_is_not_ours_is_refused(server):
    with pytest.raises(openai.NotFoundError, match="not served for a model with a memory"):
        client(server[0]).post("/systemone", body={"model": "my-graft", "state": "x"}, cast_to=object)


def test_the_plain_name_reads_what_active_names(graft, here):
    law = str(graft.parent / f"law{ENDING}")
    process, address, log = start(graft, "--pack", law, "--active", "law", "--name", "mine")
    try:
        answer = ask(address, QUESTIONS[0], "mine", stream=True)
    finally:
        stop(process)
    assert answer[0] == as_streamed(here, expected(here, QUESTIONS[0], ["law"]))
    assert re.search(r"^model mine\nmodel mine\+law$", log.read_text(), re.MULTILINE)


def refused(*arguments) -> str:
    """What `engram serve` says before it ends with 2; it would serve here until the tests are stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openai_server, "run", lambda *_: pytest.fail("it serves"))
        done = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert done.exit_code == 2 and "Traceback" not in done.output, (done.output, done.exception)
    assert done.stdout == ""
    return " ".join(done.output.split())


def test_a_port_in_use_is_said_before_anything_is_loaded(graft):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 'localhost' cannot be used" in refused(graft, "--port", port)


def test_packs_and_models_that_cannot_be_served_are_refused(graft, tmp_path, tiny_donor, tiny_tokenizer):
    law = graft.parent / f"law{ENDING}"
    free = ("--port", 0, "--device", "cpu")
    assert "is given already" in refused(graft, *free, "--pack", law, "--pack", law)
    assert "must not be empty or hold '+'" in refused(graft, *free, "--pack", f"a+b={law}")
    assert "missing.safetensors" in refused(graft, *free, "--pack", f"a={tmp_path / 'missing.safetensors'}")
    assert "--active 'war' is not a pack that is loaded; loaded are ['law']" in refused(
        graft, *free, "--pack", law, "--active", "war"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "donor")
    tiny_donor().save_pretrained(tmp_path / "donor")
    assert "is a llama without a memory" in refused(tmp_path / "donor", *free)
    assert "--host 'not here'" in refused(graft, "--host", "not here")
    other = engram_on(AutoModelForCausalLM.from_pretrained(graft).config.text_config, seed=5)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    assert "memory 'law' was made for the projections" in refused(tmp_path / "other", *free, "--pack", law)


@needs_whole_composites
def test_a_whole_composite_model_is_refused_before_its_images_are_lost(tmp_path, tiny_tokenizer):
    sizes = {"engram_vocab_size": 200, "engram_n_heads": 2, "engram_head_dim": 4}
    model = EngramForCausalLM.from_backbone(composite_donor("mistral3"), tiny_tokenizer, [1], text_only=False, **sizes)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert "is a whole model that also reads images" in refused(tmp_path, "--port", 0, "--device", "cpu")


def test_requests_are_batched_continuously_only_where_it_is_asked_for(here, graft):
    state = openai_server.OneAfterTheOther()
    assert not state.use_continuous_batching(here[0], Modality.LLM)
    assert state.get_manager("my-graft+law") is state.get_manager("my-graft"), "one thread for one model"
    done = CliRunner().invoke(app, ["serve", str(graft), "--num-blocks", "8"])
    assert done.exit_code == 2 and "is for --continuous-batching" in done.output


def test_pages_take_no_more_than_the_weights(here):
    model, wide = here[0], LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=2**20)
    assert openai_server.settings_of_pages(model, None).num_blocks == 16, "the least"
    assert openai_server.settings_of_pages(model, 3).num_blocks == 3
    with torch.device("meta"):
        large = EngramForCausalLM(EngramConfig(text_config=wide, engram_layer_ids=[0], engram_vocab_size=10))
    weights = sum(weight.nbytes for weight in large.backbone.parameters())
    taken = openai_server.settings_of_pages(large, None).num_blocks * 256 * 2 * 2 * 8 * 4
    assert 0.9 * weights < taken <= weights


def test_what_cannot_be_batched_continuously_is_refused_before_it_is_served(here):
    settings = openai_server.settings_of_pages(here[0], 4)
    settings.cpu_offload_space = 1.0
    with pytest.raises(NotImplementedError, match="cpu_offload_space=1.0"):
        openai_server.make_app(*here, ["my-graft"], settings)


def test_a_server_that_is_made_of_other_parts_is_refused(here, monkeypatch):
    monkeypatch.setattr(openai_server, "build_server", lambda model_manager, chat_handler, response_handler: None)
    with pytest.raises(ValueError, match="without .'completion_handler', 'generation_state'.* tested with"):
        openai_server.make_app(*here, ["my-graft"])


def test_a_chat_without_a_template_is_an_answer(here):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert tokenizer.chat_template is None
    asked = TestClient(openai_server.make_app(here[0], tokenizer, ["my-graft"]))
    body = {"model": "my-graft", "messages": [{"role": "user", "content": "x"}]}
    answer = asked.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "has no chat template" in answer.json()["error"]["message"]
    answer = asked.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "temperature": 0})
    assert answer.status_code == 200 and answer.json()["model"] == "my-graft", "the model need not be named"
