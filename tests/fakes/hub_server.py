"""A Hub on the loopback interface: the part of its protocol that uploading and loading a model needs.

The real ``huggingface_hub`` client talks to it over HTTP. Everything is kept in memory and can be looked at:
repositories, commits, and the requests that came. ``drop`` closes connections without an answer, as a bad line does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits by hash, each a copy of all files; branches and tags point at them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        before = self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {})
        content = {**before, **files}
        sha = hashlib.sha1(repr((sorted(content.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = content
        self.refs[branch] = sha
        self.refs.setdefault("main", sha)
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class Hub:
    """State of the server.

    Args:
        token: What a client has to send to write, and to read what is private.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        #: "METHOD path-pattern" to how many such requests are dropped.
        self.drop: dict[str, int] = {}
        self.url = ""

    def publish(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Puts files there as somebody else's upload would."""
        return self.repositories.setdefault(repo_id, Repository()).commit(files, revision)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header(
                "Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json"
            )
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _error(self, status: int, code: str, message: str) -> None:
            self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

        def _allowed(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _dispatch(self) -> None:
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            hub.requests.append((self.command, path))
            for pattern, left in hub.drop.items():
                method, _, shape = pattern.partition(" ")
                if left and method == self.command and re.search(shape, path):
                    hub.drop[pattern] = left - 1
                    self.close_connection = True
                    self.connection.close()
                    return
            for method, shape, function in _ROUTES:
                match = re.fullmatch(shape, path)
                if match and self.command in method:
                    function(self, body, *match.groups())
                    return
            self._error(404, "EntryNotFound", f"no route {self.command} {path}")

        do_GET = do_HEAD = do_POST = do_PUT = _dispatch  # noqa: N815 - what http.server calls

        # Routes

        def whoami(self, body: bytes) -> None:
            if not self._allowed():
                self._error(401, "Unauthorized", "Invalid credentials in Authorization header")
                return
            self._answer(200, {"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

        def create(self, body: bytes) -> None:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
            if not self._allowed():
                self._error(401, "Unauthorized", "Invalid username or password.")
                return
            if repo_id in hub.repositories:
                self._answer(409, {"error": "exists", "url": f"{hub.url}/{repo_id}"})
                return
            private = wanted.get("private") or wanted.get("visibility") == "private"
            hub.repositories[repo_id] = Repository(private=bool(private))
            hub.repositories[repo_id].commit({".gitattributes": b""}, message="initial commit")
            self._answer(200, {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

        def validate_yaml(self, body: bytes) -> None:
            content = json.loads(body)["content"]
            errors = [] if content.startswith("---") else [{"message": "no metadata"}]
            self._answer(200 if not errors else 400, {"errors": errors, "warnings": []})

        def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            self._answer(200 if self._allowed() else 401, {"files": files})

        def lfs_batch(self, body: bytes, repo_id: str) -> None:
            objects = [
                o if o["oid"] in hub.blobs else {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})

        def lfs_put(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                self._error(400, "BadRequest", "hash differs")
                return
            hub.blobs[oid] = body
            self._answer(200, {})

        def commit(self, body: bytes, repo_id: str, revision: str) -> None:
            repository = hub.repositories.get(repo_id)
            if repository is None or not self._allowed():
                self._error(401, "RepoNotFound", "Repository not found")
                return
            files, message = {}, ""
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            sha = repository.commit(files, revision, message)
            self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"})

        def branch(self, body: bytes, repo_id: str, name: str) -> None:
            repository = hub.repositories[repo_id]
            repository.refs[name] = repository.refs["main"]
            self._answer(200, {})

        def _find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
            repository = hub.repositories.get(repo_id)
            if repository is None or (repository.private and not self._allowed()):
                self._error(401, "RepoNotFound", "Repository not found")
                return None
            sha = repository.resolve(revision)
            if sha is None:
                self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository, sha

        def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
            found = self._find(repo_id, revision or "main")
            if found:
                repository, sha = found
                siblings = [{"rfilename": name} for name in repository.commits[sha]]
                self._answer(
                    200,
                    {"_id": sha[:24], "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private}
                    | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0},
                )

        def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
            found = self._find(repo_id, revision)
            if found:
                repository, sha = found
                self._answer(
                    200,
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in repository.commits[sha].items()
                    ],
                )

        def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
            found = self._find(repo_id, revision)
            if not found:
                return
            repository, sha = found
            data = repository.commits[sha].get(name)
            if data is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
                return
            etag = hashlib.sha256(data).hexdigest()
            headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            start = 0
            if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) is not None:
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            part = data[start:]
            headers["Content-Length"] = str(len(part))
            self._answer(206 if start else 200, part, headers)

    repo = r"([\w.-]+/[\w.-]+)"
    _ROUTES = [
        (("GET",), r"/api/whoami-v2", Handler.whoami),
        (("POST",), r"/api/repos/create", Handler.create),
        (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
        (("POST",), rf"/api/models/{repo}/preupload/([^/]+)", Handler.preupload),
        (("POST",), rf"/{repo}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        (("PUT",), r"/lfs/([0-9a-f]+)", Handler.lfs_put),
        (("POST",), rf"/api/models/{repo}/commit/([^/]+)", Handler.commit),
        (("POST",), rf"/api/models/{repo}/branch/([^/]+)", Handler.branch),
        (("GET",), rf"/api/models/{repo}", Handler.info),
        (("GET",), rf"/api/models/{repo}/revision/([^/]+)", Handler.info),
        (("GET",), rf"/api/models/{repo}/tree/([^/]+)(?:/(.*))?", Handler.tree),
        (("GET", "HEAD"), rf"/{repo}/resolve/([^/]+)/(.+)", Handler.resolve),
    ]
    return Handler


@contextmanager
def running(token: str = "hf_loopback") -> Iterator[Hub]:
    """Serves until the block ends."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: str, **more: str) -> dict[str, str]:
    """Variables of a process whose Hub this is."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
