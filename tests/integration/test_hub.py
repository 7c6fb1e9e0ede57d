"""`push_to_hub` against a local stand-in for the Hub's HTTP calls: what is sent, and that the bytes are said first.

Run: pytest tests/integration/test_hub.py
"""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch


class Hub(BaseHTTPRequestHandler):
    """Answers what an upload asks; keeps what it is sent in `server.received`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, body: dict | None = None, status: int = 200):
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self):
        self.answer(status=404)

    def do_GET(self):
        self.answer(status=404)

    def do_PUT(self):
        self.server.received[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer()

    def do_POST(self):
        body = self.body()
        host = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{host}/me/memory", "name": "me/memory"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**entry, "actions": {"upload": {"href": f"{host}/lfs/{entry['oid']}"}}} for entry in objects
                    ],
                }
            )
        elif "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            self.answer(
                {"commitUrl": f"{host}/me/memory/commit/1", "commitOid": "1", "pullRequestUrl": None, "success": True}
            )
        else:
            self.answer()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.received, server.commit = {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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
def test_a_push_sends_every_file_and_says_the_bytes_first(way, hub, tiny_engram, tmp_path):
    tiny_engram(trained=True).save_pretrained(tmp_path / "saved")
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",  # read when huggingface_hub is imported, so a process
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), way, str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
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
