"""A small Hub on this machine: the part of the Hub's HTTP protocol that huggingface_hub speaks when it makes a
repository, uploads to it by plain LFS, and reads from it.

    with Hub(folder) as hub:
        subprocess.run(..., env=os.environ | hub.environment(home))
        hub.files("user/name")    # what a commit left there

The protocol is in the client (huggingface_hub: hf_api.py, _commit_api.py, lfs.py, file_download.py) and in the LFS
batch API (git-lfs, docs/api/batch.md). As on the Hub, contents lie apart from the commits that name them, a commit is
all or nothing, large files are answered with a redirect, and an error says in X-Error-Code what was not found.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

USER, TOKEN = "user", "hf_fake"
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
LARGE = 5000  # bytes from which on a file is stored by LFS; the Hub also goes by the file's name and content


@dataclass(frozen=True)
class Blob:
    """A file of a commit: where its content is (sha256), its size, and whether it came by LFS."""

    sha256: str
    size: int
    git: str  # the id that git gives to the content
    large: bool


@dataclass
class Repo:
    """Branches name commits; a commit is {path: Blob} and is never changed."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        listed = sorted((path, blob.sha256) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([len(self.messages), message, listed]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch or a commit's id means."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class Refusal(Exception):
    """An answer that is an error. code goes into X-Error-Code, commit into X-Repo-Commit."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body):
        super().__init__(message)
        self.status, self.code, self.commit, self.body = status, code, commit, {"error": message} | body


class Hub:
    """The server, its repositories, and the faults that it shall have. Contents are files in `folder`.

    break_at(step, repo, status, times): the next `times` requests of a step (create, preupload, batch, upload, verify,
    commit, resolve) that concern the repository (None: any) are answered with the status. cut(pattern, how, times): of
    the next `times` files of such a name that are sent, half arrives. "short": the answer says so, as of a proxy that
    lost the rest; "dropped": it promises all, and ends. asked: all requests that it got, "METHOD path". unknown: those
    that it does not know, but for what the client asks about itself.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.faults: list[dict] = []
        self.cuts: list[dict] = []
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        # Two, since the Hub sends clients elsewhere for large files, and they treat another origin differently.
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self) -> Hub:
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make a client use this Hub, with all that it keeps in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN": TOKEN,
        }

    def break_at(self, step: str, repo: str | None = None, status: int = 400, times: int = 1):
        self.faults.append(dict(step=step, repo=repo, status=status, times=times))

    def cut(self, pattern: str, how: str, times: int = 1):
        self.cuts.append(dict(pattern=pattern, how=how, times=times))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content of the newest commit of a branch."""
        found = self.repos[repo]
        return {path: self.read(blob.sha256) for path, blob in found.commits[found.resolve(revision)].items()}

    def read(self, sha256: str) -> bytes:
        return (self.folder / sha256).read_bytes()

    def write(self, content: bytes, expected: str | None = None):
        """Stores a content under its sha256, unless that is not the one expected."""
        oid = hashlib.sha256(content).hexdigest()
        if expected not in (None, oid):
            raise Refusal(400, f"the content's sha256 is {oid}, not {expected}")
        part = self.folder / f"{oid}.{threading.get_ident()}.part"
        part.write_bytes(content)
        part.replace(self.folder / oid)
        return Blob(oid, len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), False)

    def repo(self, name: str, known: bool) -> Repo:
        """The repository, as one sees it who showed a token or did not."""
        found = self.repos.get(name)
        if found is None or (found.private and not known):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        return found

    # ---- requests. Each takes the parts of its path, the query, the body and whether a known token came with it, and
    # returns (status, headers, content); content is bytes, or what JSON can say.

    def create(self, body, known, **_):
        must(known)
        wanted = json.loads(body)
        if (wanted.get("organization") or USER) != USER:
            raise Refusal(403, f"You don't have the rights to create a model under {wanted['organization']!r}")
        name = f"{USER}/{wanted['name']}"
        self.fault("create", name)
        status = 409 if name in self.repos else 200
        if status == 200:
            self.repos[name] = Repo(private=wanted.get("visibility") == "private")
            self.repos[name].commit("main", {}, "initial commit")
        return status, {}, {"url": f"{self.url}/{name}", "name": name}

    def branch(self, repo, branch, known, **_):
        must(known)
        found = self.repo(repo, known)
        found.branches[unquote(branch)] = found.resolve("main")
        return 200, {}, {}

    def validate_yaml(self, body, **_):
        content = json.loads(body)["content"]
        header = re.match(r"\s*---\n(.*?)\n---\s*\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(header.group(1)) if header else {}
            if not isinstance(metadata, dict):
                raise ValueError("metadata must be a mapping")
            if "model-index" in metadata:
                model_index_to_eval_results(metadata["model-index"])
        except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
            message = " ".join(str(error).split())
            raise Refusal(400, message, errors=[{"message": message}], warnings=[]) from error
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {}, {"errors": [], "warnings": warnings}

    def preupload(self, repo, revision, body, known, **_):
        must(known)
        self.fault("preupload", repo)
        found = self.repo(repo, known)
        there = found.commits[found.resolve(unquote(revision))]

        def answer(file):
            mode = "lfs" if file["size"] >= LARGE else "regular"
            old = there.get(file["path"])
            oid = None if old is None else old.sha256 if old.large else old.git
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return 200, {}, {"files": [answer(file) for file in json.loads(body)["files"]]}

    def batch(self, repo, body, known, **_):
        must(known)
        self.fault("batch", repo)
        self.repo(repo, known)

        def answer(file):
            if (self.folder / file["oid"]).exists():
                return file  # no actions: it is there
            upload, verify = (f"/lfs/{name}/{repo}/{file['oid']}" for name in ("upload", "verify"))
            return file | {"actions": {"upload": {"href": self.store + upload}, "verify": {"href": self.url + verify}}}

        return 200, {}, {"transfer": "basic", "objects": [answer(file) for file in json.loads(body)["objects"]]}

    def upload(self, repo, oid, body, **_):
        self.fault("upload", repo)
        self.write(body, expected=oid)
        return 200, {"ETag": f'"{oid}"'}, b""

    def verify(self, repo, oid, body, known, **_):
        must(known)
        self.fault("verify", repo)
        size = json.loads(body)["size"]
        if not (self.folder / oid).exists() or (self.folder / oid).stat().st_size != size:
            raise Refusal(404, f"no content {oid} of {size} bytes was uploaded")
        return 200, {}, {}

    def commit(self, repo, revision, body, known, **_):
        must(known)
        self.fault("commit", repo)
        found, branch = self.repo(repo, known), unquote(revision)
        if branch not in found.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        files = dict(found.commits[found.branches[branch]])
        if header.get("parentCommit", found.branches[branch]) != found.branches[branch]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = self.write(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                there = self.folder / value["oid"]
                if not there.exists() or there.stat().st_size != value["size"]:
                    raise Refusal(400, f"{value['path']} points to an LFS object that was not uploaded")
                files[value["path"]] = Blob(value["oid"], value["size"], value["oid"][:40], True)
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"this server knows no operation {kind!r}")
        oid = found.commit(branch, files, header["summary"])
        return 200, {}, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}

    def info(self, repo, known, revision="main", **_):
        found = self.repo(repo, known)
        oid = found.resolve(unquote(revision))
        siblings = [{"rfilename": path} for path in sorted(found.commits[oid])]
        return 200, {}, {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}

    def tree(self, repo, revision, query, known, folder="", **_):
        found = self.repo(repo, known)
        files = found.commits[found.resolve(unquote(revision))]
        start = f"{unquote(folder)}/" if folder else ""
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            inside = {path: blob for path, blob in inside.items() if "/" not in path[len(start) :]}
        return 200, {}, [self.entry(path, blob) for path, blob in inside.items()]

    @staticmethod
    def entry(path, blob):
        pointer = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.git} | (
            {"lfs": pointer} if blob.large else {}
        )

    def resolve(self, repo, revision, path, known, **_):
        self.fault("resolve", repo)
        found = self.repo(repo, known)
        oid = found.resolve(unquote(revision))
        blob = found.commits[oid].get(unquote(path))
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit=oid)
        if blob.large:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            return 302, {"X-Repo-Commit": oid, "Location": f"{self.store}/lfs/content/{blob.sha256}"} | linked, b""
        return 200, {"X-Repo-Commit": oid, "ETag": f'"{blob.git}"'}, self.read(blob.sha256)

    def content(self, oid, **_):
        return 200, {"ETag": f'"{oid}"'}, self.read(oid)

    def fault(self, step: str, repo: str):
        """Raises what break_at has ordered for this request."""
        with self.lock:
            for fault in self.faults:
                if fault["step"] == step and fault["repo"] in (None, repo) and fault["times"] > 0:
                    fault["times"] -= 1
                    raise Refusal(fault["status"], f"this server was told to fail at {step}")

    def next_cut(self, path: str | None = None, oid: str | None = None, **_) -> str | None:
        """The cut of the file that is sent now, by its path or its content, if `cut` has ordered one."""
        commits = (files for repo in self.repos.values() for files in repo.commits.values())
        paths = {name for files in commits for name, blob in files.items() if blob.sha256 == oid} | {path}
        for cut in self.cuts:
            if cut["times"] > 0 and any(name and fnmatch(unquote(name), cut["pattern"]) for name in paths):
                cut["times"] -= 1
                return cut["how"]
        return None


ROUTES = [
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", Hub.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("GET", rf"/api/models/{NAME}", Hub.info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Hub.tree),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", rf"/lfs/upload/{NAME}/(?P<oid>[0-9a-f]{{64}})", Hub.upload),
    ("POST", rf"/lfs/verify/{NAME}/(?P<oid>[0-9a-f]{{64}})", Hub.verify),
    ("GET", r"/lfs/content/(?P<oid>[0-9a-f]{64})", Hub.content),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
]


def must(known: bool):
    if not known:
        raise Refusal(401, "Invalid credentials in Authorization header")


class Handler(BaseHTTPRequestHandler):
    """Finds the request's method in ROUTES, and sends what it returns."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self):
        address = urlsplit(self.path)
        body = self.body()
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.asked.append(f"{self.command} {address.path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        headers, content, cut = {}, b"", None
        for verb, pattern, act in ROUTES:
            match = re.fullmatch(pattern, address.path)
            if verb == method and match:
                parts = {name: x for name, x in match.groupdict().items() if x is not None}
                try:
                    with self.hub.lock:
                        status, headers, content = act(
                            self.hub, **parts, query=parse_qs(address.query), body=body, known=known
                        )
                        if self.command == "GET" and act in (Hub.resolve, Hub.content) and status == 200:
                            cut = self.hub.next_cut(**parts)
                except Refusal as refusal:
                    status, content = refusal.status, refusal.body
                    headers = {"X-Error-Message": str(refusal)}
                    headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                    headers |= {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
                break
        else:
            if not address.path.startswith("/api/agent-"):
                self.hub.unknown.append(f"{self.command} {address.path}")
            status, content = 404, {"error": f"this server does not know {self.command} {address.path}"}
        self.send(status, headers, content, cut)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status, headers, content, cut=None):
        if not isinstance(content, bytes):
            headers, content = headers | {"Content-Type": "application/json"}, json.dumps(content).encode()
        half = content[: len(content) // 2] if cut else content
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(half if cut == "short" else content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client may go before its answer
                self.wfile.write(half)
        self.close_connection = self.close_connection or cut == "dropped"

    def log_message(self, *_):
        """Nothing: what was asked is in hub.asked."""
