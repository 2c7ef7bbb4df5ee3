"""Minimal local Hub: the part of the HTTP API that huggingface_hub's client needs to create, fill and read model
repositories with branches and tags. Everything is in memory, on 127.0.0.1, and lost when it stops.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "tester"
TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".bin", ".png")  # stored by their hash, uploaded apart from the commit

Files = dict[str, str]  # path -> sha256 of the content


@dataclass
class Repository:
    """Commits, and the names that point to them."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, tag or commit; raise a KeyError if there is none."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise KeyError(revision)
        return commit

    def commit(self, branch: str, files: Files) -> str:
        """Put a commit with `files` on a branch."""
        parent = self.branches.get(branch)
        commit = hashlib.sha1(json.dumps([parent, len(self.commits), files]).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class Refusal(Exception):
    """An HTTP error response."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """Serve at `hub.url` inside `with HubServer() as hub:`. `hub.requests` lists the requests of clients."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # method, path
        self.unknown: list[tuple[str, str]] = []  # requests this stand-in has no answer to
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def store(self, content: bytes) -> str:
        """Keep `content`; its hash."""
        name = hashlib.sha256(content).hexdigest()
        self.blobs[name] = content
        return name

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        """Content of a file."""
        stored = self.repositories[repository]
        return self.blobs[stored.commits[stored.resolve(revision)][path]]

    def files(self, repository: str, revision: str = "main") -> set[str]:
        """Paths of all files."""
        stored = self.repositories[repository]
        return set(stored.commits[stored.resolve(revision)])


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "create_tag"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<blob>[0-9a-f]{64})", "lfs_upload"),
        ("GET|HEAD", r"/(?P<name>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args: Any) -> None:
        """Stay silent."""

    def handle_any(self) -> None:
        """Find the route, answer, or say why not."""
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(split.path)))
            try:
                for methods, pattern, action in self.ROUTES:
                    match = re.fullmatch(pattern, split.path)
                    if match and self.command in methods.split("|"):
                        named = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        getattr(self, action)(**named)
                        return
                self.hub.unknown.append((self.command, self.path))
                raise Refusal(404, f"The stand-in does not know {self.command} {self.path}")
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[name]

    def files(self, name: str, revision: str) -> tuple[str, Files]:
        """Commit and files of a revision."""
        stored = self.repository(name)
        try:
            commit = stored.resolve(revision)
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None
        return commit, stored.commits[commit]

    # Writing.

    def create(self) -> None:
        self.check_token()
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        made = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:  # the client reads the URL of this answer, too
            self.answer(made | {"error": "You already created this model repo"}, 409)
            return
        self.hub.repositories[name] = Repository()
        self.hub.repositories[name].commit("main", {".gitattributes": self.hub.store(b"")})
        self.answer(made)

    def validate_yaml(self) -> None:
        """Reject metadata of model cards that the Hub is known to reject."""
        content, errors = json.loads(self.body)["content"], []
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        metadata = yaml.safe_load(match.group(1)) if match else None
        for model in (metadata or {}).get("model-index", []):
            for result in model.get("results", [{}]):
                for part, needed in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                    if not isinstance(result.get(part, {}).get(needed), str):
                        errors.append({"message": f'"model-index.results.{part}.{needed}" must be a string'})
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        self.check_token()
        self.files(name, revision)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": modes})

    def lfs_batch(self, name: str) -> None:
        self.check_token()
        self.repository(name)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:  # what is stored already is not uploaded again
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            answers.append(answer)
        self.answer({"transfer": "basic", "objects": answers})

    def lfs_upload(self, blob: str) -> None:
        if self.hub.store(self.body) != blob:
            raise Refusal(400, "The content does not have the hash it was announced with")
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        self.check_token()
        _, files = self.files(name, revision)
        if revision not in self.repository(name).branches:
            raise Refusal(400, f"{revision} is not a branch")
        files = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = value["content"]
                content = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                files[value["path"]] = self.hub.store(content)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] != "header":
                raise Refusal(400, f"Unknown operation {entry['key']}")
        commit = self.repository(name).commit(revision, files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def create_branch(self, name: str, branch: str) -> None:
        self.check_token()
        stored = self.repository(name)
        if branch in stored.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        stored.branches[branch] = self.files(name, start)[0]
        self.answer({})

    def create_tag(self, name: str, revision: str) -> None:
        self.check_token()
        tag, stored = json.loads(self.body)["tag"], self.repository(name)
        if tag in stored.tags:
            raise Refusal(409, f"Tag already exists: {tag}")
        stored.tags[tag] = self.files(name, revision)[0]
        self.answer({})

    # Reading.

    def refs(self, name: str) -> None:
        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

        stored = self.repository(name)
        self.answer(
            {"branches": listed("heads", stored.branches), "tags": listed("tags", stored.tags), "converts": []}
        )

    def info(self, name: str, revision: str = "main") -> None:
        commit, files = self.files(name, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer({"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        _, files = self.files(name, revision)
        entries = []
        for path, blob in sorted(files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(self.hub.blobs[blob]), "oid": blob[:40]}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": blob, "size": entry["size"], "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.answer(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.files(name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{files[path]}"', "X-Repo-Commit": commit}
        self.answer(self.hub.blobs[files[path]], headers=headers)
