"""A local stand-in for the Hub's HTTP calls, one repository of which can be read; it also fails on purpose.

`server.folder` is what "me/private" holds, for whoever has the token; a commit to it changes the folder. Its other
revisions are `server.others`: folder and commit by name. What is sent to another repository is kept in
`server.received` and `server.commit` alone. `server.faults` are answered first.
"""

import json
import shutil
from base64 import b64decode
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = "c" * 40
TOKEN = "hf_stand_in_for_a_secret"


class Fault:
    """What goes wrong with requests whose "METHOD /path" holds a text.

    Args:
        asked (`str`): the text.
        what (`int` or `str`): a status; "cut" (the connection closes inside of the file) or "wrong" (a byte of the file
            is another one).
        times (`int`, *optional*, defaults to 1): how often, before all goes well again.
    """

    def __init__(self, asked: str, what: int | str, times: int = 1):
        self.asked, self.what, self.times = asked, what, times


class Hub(BaseHTTPRequestHandler):
    """Answers what uploads and downloads ask, and notes the names that were fetched in `server.fetched`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, body: dict | list | None = None, status: int = 200, **headers):
        data = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
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

    def fault(self) -> int | str | None:
        """What goes wrong with this request."""
        for fault in self.server.faults:
            if fault.times and fault.asked in f"{self.command} {self.path}":
                fault.times -= 1
                self.server.failed.append(fault.what)
                return fault.what
        return None

    def refuses(self, fault: int | str | None) -> bool:
        """Answers with a status if that is what goes wrong."""
        if isinstance(fault, int):
            self.body()
            self.answer({"error": "on purpose"}, status=fault, Retry_After="0")
        return isinstance(fault, int)

    def do_HEAD(self):
        self.hand_out()

    def do_GET(self):
        self.hand_out()

    def hand_out(self):
        """A repository's list of files, or one of them."""
        fault = self.fault()
        if self.refuses(fault):
            return
        asked = self.path.split("?")[0].removeprefix("/api/models")
        path = asked.removeprefix("/me/private").removeprefix("/")
        revision, _, name = path.partition("/")[2].partition("/")
        folder, head = self.revision(revision)
        if folder is None or not asked.startswith("/me/private"):
            self.answer(status=404)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, status=401)
        elif not path or path.startswith(("revision/", "tree/")):
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            named = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
            self.server.revisions.append(revision)
            if path.startswith("tree/"):
                self.answer([{"type": "file", "path": name, "size": size, "oid": name} for name, size in named.items()])
                return
            siblings = [{"rfilename": name} for name in named]
            self.answer({"id": "me/private", "sha": head, "siblings": siblings})
        elif path.startswith("resolve/") and (folder / name).is_file():
            self.send_file((folder / name).read_bytes(), name, head, fault)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def revision(self, name: str) -> tuple[Path | None, str]:
        """Folder and commit of a branch or commit."""
        for branch, (folder, head) in self.server.others.items():
            if name in (branch, head):
                return folder, head
        return self.server.folder, self.server.head

    def send_file(self, data: bytes, name: str, head: str, fault: str | None):
        """A file, or the rest of one."""
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if first else 200)
        for key, value in {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": head}.items():
            self.send_header(key, value)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        data = changed(data[first:]) if fault == "wrong" else data[first:]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.server.fetched.append(name)
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = fault == "cut"

    def do_PUT(self):
        fault = self.fault()
        if self.refuses(fault):
            return
        if fault == "cut":
            self.rfile.read(1000)
            self.close_connection = True
            return
        data = self.body()
        self.server.received[self.path.rsplit("/", 1)[-1]] = changed(data) if fault == "wrong" else data
        self.answer()

    def do_POST(self):
        if self.refuses(self.fault()):
            return
        body = self.body()
        host = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{host}/me/memory", "name": "me/memory"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            self.answer({"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            new = [entry for entry in objects if entry["oid"] not in self.server.received]
            where = {entry["oid"]: {"upload": {"href": f"{host}/lfs/{entry['oid']}"}} for entry in new}
            told = [{**entry, **({"actions": where[entry["oid"]]} if entry in new else {})} for entry in objects]
            self.answer({"transfer": "basic", "objects": told})
        elif "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            if "/me/private/" in self.path:
                self.server.head = commit(self.server)
            told = {"commitUrl": f"{host}/me/memory/commit/1", "pullRequestUrl": None, "success": True}
            self.answer({**told, "commitOid": self.server.head if "/me/private/" in self.path else "1"})
        elif "/paths-info/" in self.path:
            self.answer([described(file, self.server.folder) for file in sorted(self.server.folder.rglob("*.*"))])
        else:
            self.server.asked.append(self.path)
            self.answer()


def changed(data: bytes) -> bytes:
    """The same with another last byte."""
    return data[:-1] + bytes([data[-1] ^ 1])


def commit(server: ThreadingHTTPServer) -> str:
    """Does to the repository what a commit says; returns the commit's name."""
    for line in server.commit:
        value = line["value"]
        path = server.folder / value.get("path", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        if line["key"] == "file":
            path.write_bytes(b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            path.write_bytes(server.received[value["oid"]])
        elif line["key"] == "deletedFile":
            path.unlink()
    return sha1(json.dumps(server.commit).encode()).hexdigest()


def described(file: Path, folder: Path) -> dict:
    """A file as the Hub describes it."""
    data = file.read_bytes()
    told = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(data)}
    if file.suffix == ".safetensors":
        told["lfs"] = {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {**told, "oid": sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def forget(server: ThreadingHTTPServer, home: Path) -> None:
    """The state in which the stand-in knows of nothing yet, and nothing is in the cache."""
    server.received, server.commit, server.asked = {}, [], []
    server.folder, server.fetched, server.revisions = None, [], []
    server.others, server.faults, server.failed, server.head, server.home = {}, [], [], COMMIT, home
    shutil.rmtree(home)
    home.mkdir()
