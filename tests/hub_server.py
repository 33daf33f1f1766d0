"""A Hub on loopback for tests: repositories in memory, and faults where a test asks for them.

huggingface_hub, timm and transformers talk to it by HF_ENDPOINT, which they read when they are imported, so they run in
a process of their own. It answers what those clients ask for (huggingface_hub 2.4), and no more. Uploads by Xet go to a
folder, `Hub.cas`; such a file can be committed if its bytes are known from an upload without Xet, for the client tells
only their sha256.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]  # of one commit, by path
EMPTY: Files = {".gitattributes": b"*.safetensors filter=lfs\n*.png filter=lfs\n*.parquet filter=lfs\n"}
SILENCE = 600  # seconds
LFS = (".safetensors", ".png", ".parquet", ".pt")


@dataclass
class Fault:
    """What happens to requests of `method` whose path matches `path`, `times` times, the first `skip` excepted.

    Attributes:
        method: of HTTP.
        path: a regular expression, searched for in the path without its query.
        kind: a status code, or 'cut' (the connection closes before anything is done), 'reset' (so, by a TCP reset),
            'lost' (all is done, but the answer does not arrive), 'short' (half the body), 'corrupt' (another byte),
            'silent' (no answer, on a connection that stays), 'stalled' (so after half of the body), 'slow' (a body that
            takes its time).
        times: that it happens.
        retry_after: seconds that go with a 429.
    """

    method: str
    path: str
    kind: int | str
    times: int = 1000
    skip: int = 0
    retry_after: int = 0


@dataclass
class Repo:
    """A repository: its commits by their ids, and what names them: branches and 'refs/pr/N', and tags."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: Files, message: str) -> str:
        """Adds a commit that `ref` then names."""
        text = json.dumps([message, len(self.commits), sorted((path, sha256(data)) for path, data in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or id names."""
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server; `url` is its HF_ENDPOINT.

    Attributes:
        repos: by (type, id), such as ('models', 'org/name').
        blobs: uploaded to LFS, by sha256.
        faults: to inject; `faulty` sets them for a while.
        log: 'METHOD path' of all requests.
        token: without which nothing may be written, nor a private repository be read.
        cas: folder of Xet's uploads.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.token, self.lock, self.cas = token, Lock(), ""
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> Files:
        """What a revision holds; {} where there is no such repository."""
        found = self.repos.get((kind, repo))
        return {} if found is None else dict(found.commits[found.resolve(revision) or ""])

    @contextmanager
    def faulty(self, *faults: Fault) -> Iterator[None]:
        """Injects faults in the block."""
        self.faults = list(faults)
        try:
            yield
        finally:
            self.faults = []

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted down."""
        with self.lock:
            self.log.append(f"{method} {path}")
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a tree, as the Hub describes it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if path.endswith(LFS):
        found["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return found


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:  # the terminal is pytest's
        pass

    def do(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        fault = self.server.fault(self.command, path)
        kind = fault.kind if fault else None
        # Only where the connection itself fails: the client may send its next request on one that closes unannounced.
        self.kind, self.close_connection = kind, kind in ("cut", "reset", "lost", "short")
        length = int(self.headers.get("Content-Length", 0))
        if kind in ("cut", "reset"):
            self.rfile.read(length // 2)
            self.drop()
            return
        body = self.rfile.read(length)
        if kind == "silent":
            time.sleep(SILENCE)
            return
        if isinstance(kind, int):
            headers = {"Retry-After": str(fault.retry_after)} if fault and kind == 429 else {}
            self.answer(kind, {"error": f"injected {kind}"}, headers)
            return
        with self.server.lock:
            answer = self.route(path, body)
        if kind == "lost":
            self.drop()
        else:
            self.answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def drop(self) -> None:
        """Closes the connection without an answer."""
        if self.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.kind == "corrupt" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if self.kind == "slow":
                for start in range(0, len(body), 1 + len(body) // 20):
                    self.wfile.write(body[start : start + 1 + len(body) // 20])
                    time.sleep(0.15)
                return
            self.wfile.write(body[: len(body) // 2] if self.kind in ("short", "stalled") else body)
            if self.kind == "stalled":
                time.sleep(SILENCE)

    def refuse(self, status: int, code: str, message: str) -> tuple[int, Any, dict[str, str]]:
        return status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}

    def route(self, path: str, body: bytes) -> tuple[Any, ...]:
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/lfs/(\w{64})(/verify)?", path):
            if self.command == "PUT":
                if sha256(body) != match[1]:
                    return 400, {"error": "wrong bytes"}
                self.server.blobs[match[1]] = body
            return 200, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body)) if known else (401, {"error": "Invalid credentials"})
        if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body)) if known else (401, {"error": "Invalid credentials"})
        if match := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            kind, name, action, rest = match.groups()
        elif match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/((?:refs/\w+/)?[^/]+)/(.+)", path):
            kind, name, action = "datasets" if match[1] else "models", match[2], "resolve"
            rest, file = match[3], match[4]
        else:
            return 404, {"error": f"{self.command} {path} is not known here"}
        repo = self.server.repos.get((kind, name))
        if repo is None or (repo.private and not known):
            return self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        if self.command == "POST" and action in ("preupload", "commit", "tag", "branch") and not known:
            return 401, {"error": "Invalid credentials"}
        if action == "refs":
            branches, tags = (
                [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": oid} for ref, oid in named.items()]
                for kind, named in (("heads", repo.refs), ("tags", repo.tags))
            )
            branches = [ref for ref in branches if not ref["name"].startswith("refs/pr/")]
            return 200, {"branches": branches, "tags": tags, "converts": []}
        revision = rest or "main"
        if action == "xet-write-token":
            about = {"casUrl": f"local://{self.server.cas}", "exp": int(time.time()) + 3600, "accessToken": "xet"}
            names = {"X-Xet-Cas-Url": "casUrl", "X-Xet-Token-Expiration": "exp", "X-Xet-Access-Token": "accessToken"}
            return 200, about, {header: str(about[name]) for header, name in names.items()}
        if action == "branch":
            if revision in repo.refs:
                return 409, {"error": "Reference already exists"}
            repo.refs[revision] = repo.refs["main"]
            return 200, {}
        oid = repo.resolve(revision)
        if oid is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]
        if action == "resolve":
            return self.resolve(oid, file, files)
        if action in (None, "revision"):
            entries = [entry(*item) for item in sorted(files.items())]
            siblings = [{"rfilename": own["path"], "size": own["size"], "blobId": own["oid"]} for own in entries]
            about = {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}
            return 200, {**about, "_id": oid[:24], "downloads": 0, "likes": 0}
        if action == "tree":
            return 200, [entry(*item) for item in sorted(files.items())]
        if action == "preupload":
            return 200, {"files": [self.mode(own["path"], files) for own in json.loads(body)["files"]]}
        if action == "commit":
            return self.commit(repo, name, revision, oid, body)
        if action == "tag":
            tag = json.loads(body)["tag"]
            if tag in repo.tags:
                return 409, {"error": "Tag reference exists already"}
            repo.tags[tag] = oid
            return 200, {}
        return 404, {"error": f"{self.command} {path} is not known here"}

    def create(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        name, kind = f"{asked['organization']}/{asked['name']}", f"{asked.get('type', 'model')}s"
        there = (kind, name) in self.server.repos
        if not there:
            self.server.repos[kind, name] = repo = Repo(private=asked.get("visibility") == "private")
            repo.commit("main", dict(EMPTY), "initial commit")
        return 409 if there else 200, {"url": f"{self.server.url}/{name}"}

    def mode(self, path: str, files: Files) -> dict[str, Any]:
        lfs = path.endswith(LFS)
        found = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in files:
            found["oid"] = sha256(files[path]) if lfs else blob_id(files[path])
        return found

    def lfs_batch(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        objects = []
        for own in asked["objects"]:
            href = f"{self.server.url}/lfs/{own['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify"}}
            objects.append(own if own["oid"] in self.server.blobs else {**own, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo: Repo, name: str, revision: str, parent: str, body: bytes) -> tuple[Any, ...]:
        files, message = dict(repo.commits[parent]), ""
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return 400, {"error": f"LFS object {value['oid']} was not uploaded"}
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        wants_pr = "create_pr" in self.query
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        oid = repo.commit(f"refs/pr/{number}" if wants_pr else revision, files, message)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        if wants_pr:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        return 200, answer

    def resolve(self, oid: str, path: str, files: Files) -> tuple[Any, ...]:
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(start[1])
            return 206, data[first:], {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        return 200, data, headers
