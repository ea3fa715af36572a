"""A server on this machine that speaks what of the Hugging Face Hub's HTTP is needed here.

Written from the Hub's documented endpoints, not from the code under test. It counts the bytes of
each file that it sends, and can refuse, cut connections and send what no honest Hub would.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_token_of_the_tests"


def commit_of(files: Mapping[str, bytes]) -> str:
    """The id of a commit with these files."""
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha1(data).digest())
    return digest.hexdigest()


@dataclass
class Repo:
    """A repository.

    Attributes:
        refs: commit of each branch.
        commits: files of each commit.
        gated: whether nobody may read it yet.
        private: as its maker asked for.
    """

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool | None = None

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a branch hold exactly these files."""
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the default branch."""
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """The server.

    Attributes:
        endpoint: its address, for ``HF_ENDPOINT``.
        repos: repositories by name.
        sent: bytes of each file that it has sent, headers of HTTP apart.
        requests: lines such as ``"POST /api/repos/create"``.
        cut: files whose connection is closed after so many bytes.
        ranges: whether it answers range requests; else it sends whole files.
        down: status that it answers everything with; 0 for none.
        refuse_commits: whether commits fail.
        lies: sizes that it says files have.
        blobs: uploaded files by SHA-256.
    """

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    down: int = 0
    refuse_commits: bool = False
    lies: dict[str, object] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, folder: Path, **more: bytes) -> Repo:
        """Put the files of a folder into a new repository."""
        repo = self.repos[name] = Repo()
        repo.commit({path.name: path.read_bytes() for path in folder.iterdir()} | more)
        return repo


class _Answer(Exception):
    def __init__(self, status: int, error: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": error, "X-Error-Message": message} if error else {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self._body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        parts = urlsplit(self.path)
        self._query = parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {parts.path}")
        try:
            if self.hub.down:
                raise _Answer(self.hub.down)
            for pattern, method in _ROUTES:
                if match := re.fullmatch(pattern, parts.path):
                    method(self, *map(unquote, match.groups()))
                    return
            raise _Answer(404)
        except _Answer as answer:
            self._send(answer.status, b"", answer.headers)

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str] | None = None, counted: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for begin in range(0, len(data), 1 << 14):
            piece = data[begin : begin + (1 << 14)]
            if counted:  # before it is sent: a test that has it reads the count at once
                self.hub.sent[counted] += len(piece)
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the other side has enough
                self.close_connection = True
                return

    def _json(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self._send(status, data, {"Content-Type": "application/json"})

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None:
            raise _Answer(401 if not self._logged_in else 404, "RepoNotFound", "not found")
        if repo.gated:
            raise _Answer(403, "GatedRepo", "Access to this model is restricted")
        return repo

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        files = repo.commits[commit]
        sizes = {file: len(data) for file, data in files.items()} | self.hub.lies
        siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
        self._json({"id": name, "sha": commit, "private": False, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)]
        self._json(
            [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
        )

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        data = repo.commits[commit].get(file)
        if data is None:
            raise _Answer(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        begin, status = 0, 200
        if asked and self.hub.ranges and self.command == "GET":
            begin, end = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        if self.command == "GET" and file in self.hub.cut:
            kept = data[: max(self.hub.cut[file] - begin, 0)]
            headers["Content-Length"] = str(len(data))
            self.close_connection = True
            data = kept
        self._send(status, data, headers, f"{name}/{file}")

    def create(self) -> None:
        self._writer()
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, 409)
            return
        repo = self.hub.repos[name] = Repo()
        private = asked.get("private", {"private": True}.get(asked.get("visibility")))
        repo.private = private
        repo.commit({".gitattributes": b""})
        self._json(url)

    def _writer(self) -> None:
        if not self._logged_in:
            raise _Answer(401)

    def branch(self, name: str, branch: str) -> None:
        self._writer()
        repo = self._repo(name)
        if branch in repo.refs:
            raise _Answer(409)
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._body)["files"]
        self._repo(name)
        large = (".pt", ".safetensors", ".bin")
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, name: str) -> None:
        self._repo(name)
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        **one,
                        "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}},
                    }
                    for one in json.loads(self._body)["objects"]
                ],
            }
        )

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self._body).hexdigest() == oid
        self.hub.blobs[oid] = self._body
        self._send(200, b"")

    def commit(self, name: str, revision: str) -> None:
        if self.hub.refuse_commits:
            raise _Answer(500)
        self._writer()
        repo = self._repo(name)
        before = self._commit(repo, revision)
        files = dict(repo.commits[before])
        for line in self._body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header" and value.get("parentCommit") not in (None, before):
                raise _Answer(412)
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.validate),
    (f"/api/models/{_NAME}", _Handler.info),
    (f"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    (f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (f"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    (f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (f"/{_NAME}.git/info/lfs/objects/batch", _Handler.batch),
    ("/lfs/([0-9a-f]+)", _Handler.upload),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """A server with no repositories, on a port of its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
