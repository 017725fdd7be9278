"""A Hugging Face Hub on loopback, in memory: what huggingface_hub asks of the real one.

Requests and answers are those of huggingface_hub 2.4's client (hf_api.py, _commit_api.py, lfs.py,
utils/_http.py), of its recorded cassettes, and of the tests that it runs against the real Hub:
409 for a repository that exists, 412 for a commit whose parent isn't the branch's, oids in the
answer of preupload. ``Stub.fail`` injects faults, ``Stub.seen`` tells what was asked and
``Stub.served`` what was answered. Files can also be served from a disk (``put_files``), so that a
branch can be as large as a real one.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"  # tokens
LFS = ("*.safetensors", "*.bin", "*.pt")
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS).encode()
PART = 1 << 20  # bytes of a part, of files that go in several


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file in git.

    sha256: of those in LFS, whose bytes are elsewhere. path: of those whose bytes are on the disk.
    """

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None
    path: Path | None = None

    def entry(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            found["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return found


def regular(data: bytes) -> Blob:
    return Blob(len(data), git_blob(data), data)


def pointer(sha256: str, size: int) -> Blob:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(size, git_blob(text.encode()), None, sha256)


@dataclass
class Commit:
    title: str
    parent: str | None
    files: dict[str, Blob]


@dataclass
class Repo:
    """gated: the names of its files can be listed, and only those with access may read them."""

    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, parent: str | None, files: dict[str, Blob]) -> str:
        text = f"{title}{parent}{sorted((p, b.oid) for p, b in files.items())}{len(self.commits)}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(title, parent, files)
        return oid

    def find(self, revision: str) -> str | None:
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None

    def log(self, oid: str | None) -> Iterator[str]:
        while oid is not None:
            yield oid
            oid = self.commits[oid].parent


class Answer(Exception):
    """Ends a request. headers of errors are those by which the client tells them apart."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def error(status: int, message: str, code: str = "") -> Answer:
    more = {"X_Error_Code": code} if code else {}
    return Answer(status, {"error": message}, X_Error_Message=message, **more)


@dataclass
class Fault:
    """status: what is answered in place of the real answer; 0 drops the connection.

    after: whether the request is carried out first, so that only its answer is lost.
    skip: how many such requests are answered as ever before.
    """

    method: str
    path: str
    status: int
    times: int
    after: bool
    message: str
    headers: dict[str, str]
    skip: int = 0


def failed(fault: Fault) -> Answer:
    answer = error(fault.status, fault.message)
    answer.headers |= {key.replace("_", "-"): value for key, value in fault.headers.items()}
    return answer


@dataclass(frozen=True)
class Served:
    """One answer. size: bytes of its body. time: when the request came, in seconds.

    range: the header of the request, "" where it had none.
    """

    method: str
    target: str
    status: int
    size: int
    time: float
    range: str = ""


class Stub:
    """The state of the Hub. cas: a folder for Xet, where hf_xet keeps chunks in place of a server.

    seen: every request as "METHOD path?query". before: called once before a request that matches.
    writable: how the names of repositories begin that the token may change.
    renamed: the new names of repositories by their old ones, which redirect with 307.
    delay: seconds that each answer takes. busy: the most requests that were answered at a time.
    """

    def __init__(self, cas: str | None = None, page: int = 1000) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.on_disk: dict[str, Path] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.renamed: dict[str, str] = {}
        self.writable: tuple[str, ...] = ("org/",)
        self.seen: list[str] = []
        self.served: list[Served] = []
        self.delay = 0.0
        self.now = self.busy = 0
        self.faults: list[Fault] = []
        self.before: list[tuple[str, Callable[[], None]]] = []
        self.sent = 0
        self.cas, self.page, self.url = cas, page, ""
        self.lock = threading.RLock()

    def fail(
        self,
        request: str,
        status: int,
        times: int = 1,
        after: bool = False,
        message: str = "made to fail",
        skip: int = 0,
        **headers: str,
    ) -> None:
        """Answer the next requests of this form, "METHOD regex", with a status."""
        method, path = request.split(" ", 1)
        self.faults.append(Fault(method, path, status, times, after, message, headers, skip))

    def bytes_of_requests(self, request: str = "GET .") -> int:
        """Bytes of the bodies that were sent for requests of this form."""
        method, path = request.split(" ", 1)
        return sum(s.size for s in self.served if s.method == method and re.search(path, s.target))

    def count(self, request: str) -> int:
        method, path = request.split(" ", 1)
        return sum(s.startswith(f"{method} ") and re.search(path, s) is not None for s in self.seen)

    def make(self, name: str, private: bool = False, **files: bytes) -> Repo:
        """A repository as it begins: one commit, which has a .gitattributes."""
        repo = self.repos[name] = Repo(private)
        first = {".gitattributes": ATTRIBUTES, **files}
        repo.branches["main"] = repo.commit(
            "initial commit", None, {path: regular(data) for path, data in first.items()}
        )
        return repo

    def put_files(self, name: str, branch: str, folder: Path, *, whole: bool = True) -> str:
        """A branch that holds a folder's files, read from there when they are asked for.

        Those of ``LFS`` are in LFS, under a hash of their path in place of their content's, which
        nobody need compute of large files. whole: the branch holds nothing else.
        """
        repo = self.repos.get(name) or self.make(name)
        head = repo.branches.get(branch) or repo.branches["main"]
        files = {} if whole else dict(repo.commits[head].files)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key, size = path.relative_to(folder).as_posix(), path.stat().st_size
            if any(fnmatch(key, pattern) for pattern in LFS):
                oid = hashlib.sha256(f"{path} {path.stat().st_mtime_ns}".encode()).hexdigest()
                files[key] = pointer(oid, size)
                self.on_disk[oid] = path
            else:
                files[key] = Blob(size, git_blob(path.read_bytes()), path=path)
        repo.branches[branch] = repo.commit(f"files of {branch}", head, files)
        return repo.branches[branch]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, but the .gitattributes; as bytes, from LFS too."""
        repo = self.repos[name]
        oid = repo.find(revision)
        assert oid is not None
        found = repo.commits[oid].files.items()
        return {path: self.bytes_of(b) for path, b in found if path != ".gitattributes"}

    def bytes_of(self, blob: Blob) -> bytes:
        if blob.data is not None:
            return blob.data
        if blob.path is not None:
            return blob.path.read_bytes()
        assert blob.sha256 is not None
        if blob.sha256 in self.on_disk:
            return self.on_disk[blob.sha256].read_bytes()
        return self.objects[blob.sha256]

    def put(self, name: str, branch: str, title: str = "by another", **files: bytes) -> str:
        """A commit that somebody else makes."""
        repo = self.repos[name]
        head = repo.branches.get(branch) or repo.branches["main"]
        new = {path: regular(data) for path, data in files.items()}
        repo.branches[branch] = repo.commit(title, head, {**repo.commits[head].files, **new})
        return repo.branches[branch]

    # what is answered

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        url = urlsplit(target)
        path = unquote(url.path)
        self.seen.append(f"{method} {target}")
        for n, (pattern, call) in enumerate(self.before):
            if re.search(pattern, f"{method} {target}"):
                del self.before[n]
                call()
                break
        fault = next(
            (f for f in self.faults if f.method == method and re.search(f.path, target)), None
        )
        if fault is not None and fault.skip:
            fault.skip -= 1
            fault = None
        if fault is not None:
            fault.times -= 1
            if fault.times == 0:
                self.faults.remove(fault)
            if not fault.after:
                return failed(fault)
        try:
            self._redirect(target)
            with self.lock:
                found = self._route(method, path, url.path, parse_qs(url.query), headers, body)
        except Answer as answer:
            found = answer
        return found if fault is None else failed(fault)

    def _redirect(self, target: str) -> None:
        match = re.match(r"/(?:api/models/)?([^/]+/[^/?]+)(?=[/?]|$)", target)
        if match is not None and match[1] in self.renamed:
            start, end = match.span(1)
            raise Answer(307, b"", Location=target[:start] + self.renamed[match[1]] + target[end:])

    def _route(
        self, method: str, path: str, raw: str, query: Any, headers: Any, body: bytes
    ) -> Answer:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITE, READ):
            raise error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not token:
                raise error(401, "Invalid username or password.")
            role = "write" if token == WRITE else "read"
            access = {"displayName": "test", "role": role}
            return Answer(200, {"name": "org", "auth": {"accessToken": access}, "orgs": []})
        if path == "/api/validate-yaml":
            return Answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if match := re.fullmatch(r"/(lfs|part|complete)/(\w+)(?:/(\d+))?", path):
            return self._transfer(method, match[1], match[2], int(match[3] or 0), body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path):
            self._readable(match[1], token)  # a pull request needs no more
            if not token:
                raise error(401, "Invalid username or password.")
            return self._lfs(match[1], match[2], json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            repo = self._readable(match[1], token)
            if repo.gated and not token:
                message = f"Access to model {match[1]} is restricted. You must be authenticated."
                raise error(401, message, "GatedRepo")
            if repo.gated and token != WRITE:
                message = f"Access to model {match[1]} is restricted and you are not in the list."
                raise error(403, message, "GatedRepo")
            return self._resolve(repo, unquote(match[2]), unquote(match[3]))
        # revisions are quoted, so that a slash in one isn't one in the path
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.+))?)?)?", raw)
        if match is None:
            raise error(404, f"{method} {path} isn't known to the stub")
        name, what, revision = match[1], match[2] or "revision", unquote(match[3] or "main")
        repo = self._readable(name, token)
        if what == "refs":
            return Answer(200, _refs(repo, "include_prs" in query))
        if method == "POST" and what == "branch":
            self._writable(name, token)
            return self._branch(repo, revision, json.loads(body))
        pull = query.get("create_pr") == ["1"]
        if what in ("xet-write-token", "xet-read-token"):
            if not pull and what == "xet-write-token":
                self._writable(name, token)
            until = int(time.time()) + 3600
            cas = f"local://{self.cas}"
            facts = {"casUrl": cas, "exp": until, "accessToken": "xet"}
            more = {"X_Xet_Cas_Url": cas, "X_Xet_Access_Token": "xet"}  # for clients before 1.9
            return Answer(200, facts, X_Xet_Token_Expiration=str(until), **more)
        oid = repo.find(revision)
        if oid is None:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repo.commits[oid].files
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "private": repo.private, "sha": oid, "siblings": siblings}
            return Answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0})
        if what == "tree":
            recursive = query.get("recursive", [""])[0].lower() in ("1", "true")
            return self._pages(raw, query, _tree(files, unquote(match[4] or ""), recursive))
        if what == "commits":
            return self._pages(raw, query, [_told(repo, oid) for oid in repo.log(oid)])
        if not token:
            raise error(401, "Invalid username or password.")
        if not pull:
            self._writable(name, token)
        if what == "preupload":
            return Answer(200, {"files": _modes(files, json.loads(body)), "commitOid": oid})
        if what == "commit":
            return self._commit(name, repo, revision, oid, pull, body)
        raise error(404, f"{method} {path} isn't known to the stub")

    def _readable(self, name: str, token: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not token):
            raise error(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, name: str, token: str) -> None:
        if token != WRITE or not name.startswith(self.writable):
            raise error(403, "You don't have the required permissions to write to this repo")

    def _create(self, wanted: Any, token: str) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        if not token:
            raise error(401, "Invalid username or password.")
        if name in self.repos:
            url = f"{self.url}/{name}"
            return Answer(409, {"error": "You already created this model repo", "url": url})
        self._writable(name, token)
        self.make(name, bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return Answer(200, {"url": f"{self.url}/{name}", "name": name})

    def _branch(self, repo: Repo, branch: str, wanted: Any) -> Answer:
        if branch in repo.branches:
            raise error(409, f"Reference already exists: {branch}")
        start = repo.find(wanted.get("startingPoint", "main"))
        if start is None:
            raise error(404, "Invalid rev id", "RevisionNotFound")
        repo.branches[branch] = start
        return Answer(201, "Created")

    def _lfs(self, name: str, what: str, wanted: Any) -> Answer:
        if what == "verify":
            data = self.objects.get(wanted["oid"])
            if data is None or len(data) != wanted["size"]:
                raise error(404, "Object not found")
            return Answer(200, {})
        assert wanted["operation"] == "upload"
        assert wanted["hash_algo"] == "sha256"
        found = []
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}"}
                if size > PART:
                    parts = range(1, -(-size // PART) + 1)
                    header = {str(n): f"{self.url}/part/{oid}/{n}" for n in parts}
                    header["chunk_size"] = str(PART)
                    upload = {"href": f"{self.url}/complete/{oid}", "header": header}
                verify = {"href": f"{self.url}/{name}.git/info/lfs/verify"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            found.append(item)
        xet = self.cas is not None and "xet" in wanted["transfers"]
        return Answer(200, {"transfer": "xet" if xet else "basic", "objects": found})

    def _transfer(self, method: str, what: str, oid: str, number: int, body: bytes) -> Answer:
        if method in ("GET", "HEAD"):
            return Answer(200, self.on_disk.get(oid) or self.objects[oid])
        if what == "complete":
            told = json.loads(body)["parts"]
            parts = self.parts.pop(oid)
            assert [p["partNumber"] for p in told] == sorted(parts)
            assert [p["etag"] for p in told] == [git_blob(parts[n]) for n in sorted(parts)]
            body = b"".join(parts[n] for n in sorted(parts))
        else:
            self.sent += len(body)
        if what == "part":
            self.parts.setdefault(oid, {})[number] = body
            return Answer(200, b"", ETag=git_blob(body))
        if hashlib.sha256(body).hexdigest() != oid:
            raise error(400, "The content isn't what its hash says")
        self.objects[oid] = body
        return Answer(200, b"")

    def _commit(
        self, name: str, repo: Repo, revision: str, head: str, pull: bool, body: bytes
    ) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and parent != head and not pull:
            raise error(412, "The branch was updated since you opened this page. Please refresh.")
        files = dict(repo.commits[head].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not self._has(value["oid"]):
                    raise error(400, f"LFS object {value['oid']} doesn't exist")
                files[value["path"]] = pointer(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise error(400, f"{line['key']} isn't known to the stub")
        oid = repo.commit(header["summary"], head, files)
        found = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        if pull:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = oid
            found["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number}"
        else:
            repo.branches[revision] = oid
        return Answer(200, found)

    def _has(self, sha256: str) -> bool:
        """Whether an object was uploaded, by LFS or Xet.

        A shard, which lists the files of an upload, holds their SHA-256 in words of 8 bytes, the
        last byte first (xet-core, shard format).
        """
        raw = bytes.fromhex(sha256)
        words = b"".join(raw[n : n + 8][::-1] for n in range(0, 32, 8))
        shards = Path(self.cas).rglob("*.mdb") if self.cas else ()
        return sha256 in self.objects or any(words in s.read_bytes() for s in shards)

    def _resolve(self, repo: Repo, revision: str, path: str) -> Answer:
        oid = repo.find(revision)
        if oid is None:
            raise error(404, "Invalid rev id", "RevisionNotFound")
        blob = repo.commits[oid].files.get(path)
        if blob is None:
            raise error(404, "Entry not found", "EntryNotFound")
        if blob.sha256 is None:
            return Answer(200, blob.data or blob.path, ETag=f'"{blob.oid}"', X_Repo_Commit=oid)
        return Answer(
            302,
            b"",
            # another host, as on the Hub: huggingface_hub reads the headers of this answer then
            Location=f"{self.url.replace('127.0.0.1', 'localhost')}/lfs/{blob.sha256}",
            X_Repo_Commit=oid,
            X_Linked_Etag=f'"{blob.sha256}"',
            X_Linked_Size=str(blob.size),
        )

    def _pages(self, raw: str, query: Any, items: list[Any]) -> Answer:
        at = int(query.get("cursor", ["0"])[0])
        found = items[at : at + self.page]
        if at + self.page >= len(items):
            return Answer(200, found)
        recursive = query.get("recursive", ["false"])[0]
        more = f"{self.url}{raw}?recursive={recursive}&cursor={at + self.page}"
        return Answer(200, found, Link=f'<{more}>; rel="next"')


def _tree(files: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries below a folder, "" for the root: all files, or its own files and folders."""
    above = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(files.items()):
        if not path.startswith(above):
            continue
        name, slash, _ = path[len(above) :].partition("/")
        if recursive or not slash:
            found[path] = blob.entry(path)
        else:
            found[above + name] = {"type": "directory", "path": above + name, "oid": "0" * 40}
    if folder and not found:
        raise error(404, f"{folder} does not exist", "EntryNotFound")
    return list(found.values())


def _refs(repo: Repo, pulls: bool) -> dict[str, Any]:
    def told(refs: dict[str, str], above: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"{above}{n}", "targetCommit": c} for n, c in refs.items()]

    found = {"branches": told(repo.branches, "refs/heads/"), "converts": []}
    found["tags"] = told(repo.tags, "refs/tags/")
    return {**found, "pullRequests": told(repo.pulls, "")} if pulls else found


def _told(repo: Repo, oid: str) -> dict[str, Any]:
    more = {"message": "", "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": "org"}]}
    return {"id": oid, "title": repo.commits[oid].title, **more}


def _modes(files: dict[str, Blob], wanted: Any) -> list[dict[str, Any]]:
    ignored = files[".gitignore"].data if ".gitignore" in files else b""
    assert ignored is not None
    found = []
    for item in wanted["files"]:
        path, blob = item["path"], files.get(item["path"])
        large = item["size"] > 10_000_000 or any(fnmatch(path, pattern) for pattern in LFS)
        told: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
        told["shouldIgnore"] = any(fnmatch(path, p) for p in ignored.decode().split())
        if blob is not None:
            told["oid"] = blob.sha256 or blob.oid
        found.append(told)
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def _do(self) -> None:
        stub, came = self.stub, time.monotonic()
        with stub.lock:
            stub.now += 1
            stub.busy = max(stub.busy, stub.now)
        try:
            if stub.delay:
                time.sleep(stub.delay)
            found = stub.answer(self.command, self.path, self.headers, self._body())
            if found.status == 0:
                self.close_connection = True
                self.connection.close()
                return
            self._send(found, came)
        finally:
            with stub.lock:
                stub.now -= 1

    def _send(self, found: Answer, came: float) -> None:
        body = found.body
        if not isinstance(body, bytes | Path):
            body = json.dumps(body).encode()
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        headers = {"Content-Type": "application/json", **found.headers}
        start, end, status = 0, size, found.status
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and status == 200:
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1) + 1
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        sent = 0 if self.command == "HEAD" else end - start
        asked = self.headers.get("Range") or ""
        self.stub.served.append(Served(self.command, self.path, status, sent, came, asked))
        with suppress(ConnectionError):  # who asked is gone
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if not sent:
                return
            if isinstance(body, bytes):
                self.wfile.write(body[start:end])
                return
            with open(body, "rb") as file:
                file.seek(start)
                for at in range(start, end, 1 << 20):
                    self.wfile.write(file.read(min(1 << 20, end - at)))

    do_GET = do_HEAD = do_POST = do_PUT = _do  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = bytearray()
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(found)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def use(stub: Stub, monkeypatch: Any, folder: Path) -> None:
    """Let this process's huggingface_hub ask the stub, with a cache in a folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    template = f"{stub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", stub.cas is None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN", WRITE)


@contextmanager
def serving(stub: Stub, address: str = "127.0.0.1") -> Iterator[Stub]:
    """The stub at ``stub.url``, until the block ends."""
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    stub.url = f"http://{address}:{server.server_port}"
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
