"""A hub on this machine: the part of huggingface.co's protocol that its own client speaks.

`python tests/hub_server.py FOLDER` serves the folders FOLDER/ORG/MODEL until it is stopped."""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_of_the_tests"  # who sends it may write
LARGE = {".safetensors", ".bin", ".model", ".msgpack", ".png"}  # kept outside of git, in a storage of its own
CHUNK = 1 << 20


class NotFound(Exception):
    "What a request asks for does not exist; its text is the hub's name for that."


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    "Commits of one repository, each a map from paths to blobs, and names of some of them."

    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files, ref="main", removed=()):
        "A commit after that of `ref`, with these files changed."
        tree = {k: v for k, v in self.tree(ref).items() if k not in removed} if ref in self.refs else {}
        tree |= files
        about = json.dumps([self.refs.get(ref), sorted(tree.items())]).encode()
        oid = hashlib.sha1(about).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise NotFound("RevisionNotFound")
        return oid

    def tree(self, revision):
        return self.commits[self.resolve(revision)]


class Hub:
    "Repositories, blobs, and the two servers: of the hub and of its storage of large files."

    def __init__(self, folder):
        self.blobs = Path(folder) / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repos = {}  # (`models` or `datasets`, name) -> Repo
        self.requests = []  # (method, path, status, headers of the request)
        self.cut = {}  # checksum -> bytes after which the connection breaks, once
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), h) for h in (HubHandler, StorageHandler)]
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def environment(self, home):
        "Variables that send the client here, with a cache of its own."
        names = dict(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return others | names | dict(HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

    def add_blob(self, path):
        "Keep a file by its checksum; on the same disk that is a link."
        digest = sha256_of(path)
        if not (self.blobs / digest).exists():
            os.link(path, self.blobs / digest)
        return digest

    def add_folder(self, name, folder, ref="main", kind="models"):
        "A commit with the files of a folder."
        folder = Path(folder)
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = {p.relative_to(folder).as_posix(): self.add_blob(p) for p in paths}
        return self.repos.setdefault((kind, name), Repo()).commit(files, ref)

    def find(self, kind, name):
        if (kind, name) not in self.repos:
            raise NotFound("RepoNotFound")
        return self.repos[kind, name]

    def entry(self, path, digest):
        "A file as the API describes it."
        size = (self.blobs / digest).stat().st_size
        if Path(path).suffix not in LARGE:
            return dict(type="file", path=path, size=size, oid=git_oid((self.blobs / digest).read_bytes()))
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        lfs = dict(oid=digest, size=size, pointerSize=len(pointer))
        return dict(type="file", path=path, size=size, oid=git_oid(pointer), lfs=lfs)


class Handler(BaseHTTPRequestHandler):
    "Answers, files with ranges, and a note of every request."

    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers["Content_Type"] = json.dumps(content).encode(), "application/json"
        self.hub.requests.append((self.command, self.path, status, dict(self.headers)))
        self.send_response(status)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, code, **headers):
        self.answer(status, dict(error=code), X_Error_Code=code, X_Error_Message=code, **headers)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send_blob(self, digest, **headers):
        "A file, or the part of it that `Range` names."
        path = self.hub.blobs / digest
        size = path.stat().st_size
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(part[1]), int(part[2] or size - 1)) if part else (0, size - 1)
        status = 206 if part else 200
        if part:
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
        self.hub.requests.append((self.command, self.path, status, dict(self.headers)))
        self.send_response(status)
        length = last - first + 1
        for name, value in (headers | dict(Content_Length=length, Accept_Ranges="bytes")).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut.pop(digest, None)
        if cut is not None:
            length, self.close_connection = cut, True
        with open(path, "rb") as file:
            file.seek(first)
            while length and (content := file.read(min(length, CHUNK))):
                self.wfile.write(content)
                length -= len(content)


class StorageHandler(Handler):
    "Large files by their checksum."

    def do_GET(self):
        digest = urlsplit(self.path).path.strip("/")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not (self.hub.blobs / digest).exists():
            return self.error(404, "EntryNotFound")
        self.send_blob(digest, ETag=f'"{digest}"')

    do_HEAD = do_GET

    def do_PUT(self):
        digest, content = urlsplit(self.path).path.strip("/"), self.body()
        if hashlib.sha256(content).hexdigest() != digest:
            return self.error(400, "BadDigest")
        (self.hub.blobs / digest).write_bytes(content)
        self.answer(200, ETag=f'"{digest}"')


API = r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
FILES = r"/(?P<kind>datasets(?=/))?/?(?P<name>[\w.-]+/[\w.-]+)"


class HubHandler(Handler):
    "Repositories: what is in them, their files, and new commits."

    GET = {
        r"/api/whoami-v2": "whoami",
        rf"{API}(/revision/(?P<revision>.+))?": "info",
        rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?": "tree",
        rf"{API}/refs": "refs",
        rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "file",
    }
    POST = {
        r"/api/repos/create": "create",
        r"/api/validate-yaml": "validate",
        rf"{API}/preupload/(?P<revision>[^/]+)": "preupload",
        rf"{API}/commit/(?P<revision>[^/]+)": "commit",
        rf"{API}/paths-info/(?P<revision>[^/]+)": "paths",
        rf"{FILES}\.git/info/lfs/objects/batch": "lfs",
    }

    def route(self, routes):
        url = urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        for pattern, action in routes.items():
            if match := re.fullmatch(pattern, url.path):
                parts = {k: v and unquote(v) for k, v in match.groupdict().items()}
                if "kind" in parts:
                    parts["kind"] = parts["kind"] or "models"
                try:
                    return getattr(self, action)(**parts)
                except NotFound as error:
                    known = self.headers.get("Authorization") or str(error) != "RepoNotFound"
                    return self.error(404 if known else 401, str(error))
        self.error(404, "EntryNotFound")

    def do_GET(self):
        self.route(self.GET)

    do_HEAD = do_GET

    def do_POST(self):
        self.content = self.body()
        writes = "/paths-info/" not in self.path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Unauthorized")
        self.route(self.POST)

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Unauthorized")
        self.answer(200, dict(type="user", name="me", orgs=[], auth={}))

    def info(self, kind, name, revision):
        repo = self.hub.find(kind, name)
        oid = repo.resolve(revision or "main")
        siblings = [dict(rfilename=path) for path in sorted(repo.commits[oid])]
        self.answer(200, dict(id=name, modelId=name, sha=oid, private=False, tags=[], siblings=siblings))

    def tree(self, kind, name, revision, path):
        tree = self.hub.find(kind, name).tree(revision)
        inside = {p: d for p, d in tree.items() if not path or p.startswith(f"{path}/")}
        if path and not inside:
            return self.error(404, "EntryNotFound")
        entries = [self.hub.entry(p, d) for p, d in sorted(inside.items())]
        if self.query.get("recursive", "false").lower() not in ("1", "true"):
            start = len(path) + 1 if path else 0
            folders = sorted({p[start:].split("/")[0] for p in inside if "/" in p[start:]})
            entries = [e for e in entries if "/" not in e["path"][start:]]
            entries += [dict(type="directory", path=f"{path or ''}/{f}".strip("/"), oid="0") for f in folders]
        self.answer(200, entries)

    def paths(self, kind, name, revision):
        tree = self.hub.find(kind, name).tree(revision)
        wanted = json.loads(self.content)["paths"]
        self.answer(200, [self.hub.entry(p, tree[p]) for p in wanted if p in tree])

    def refs(self, kind, name):
        refs = self.hub.find(kind, name).refs.items()
        branches = [dict(name=n, ref=f"refs/heads/{n}", targetCommit=c) for n, c in refs if "/" not in n]
        self.answer(200, dict(branches=branches, tags=[], converts=[]))

    def file(self, kind, name, revision, path):
        repo = self.hub.find(kind, name)
        oid = repo.resolve(revision)
        if path not in repo.commits[oid]:
            return self.error(404, "EntryNotFound", X_Repo_Commit=oid)
        digest = repo.commits[oid][path]
        entry = self.hub.entry(path, digest)
        headers = dict(X_Repo_Commit=oid, ETag=f'"{entry["oid"]}"')
        if "lfs" not in entry:
            return self.send_blob(digest, **headers)
        linked = dict(X_Linked_Etag=f'"{digest}"', X_Linked_Size=entry["size"])
        self.answer(302, Location=f"{self.hub.storage}/{digest}", **headers, **linked)

    def create(self):
        wanted = json.loads(self.content)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        kind = f"{wanted.get('type') or 'model'}s"
        prefix = "" if kind == "models" else f"{kind}/"
        url = dict(url=f"{self.hub.url}/{prefix}{quote(name)}", name=name, id=name)
        if (kind, name) in self.hub.repos:
            return self.answer(409, url | dict(error="You already created this repo"))
        self.hub.repos[kind, name] = Repo()
        self.hub.repos[kind, name].commit({})
        self.answer(200, url)

    def validate(self):
        text = json.loads(self.content)["content"]
        errors = [] if text.startswith("---\n") else [dict(message="no metadata")]
        self.answer(200, dict(errors=[], warnings=errors))

    def preupload(self, kind, name, revision):
        tree = self.hub.find(kind, name).tree(revision)
        files = []
        for file in json.loads(self.content)["files"]:
            path = file["path"]
            mode = "lfs" if Path(path).suffix in LARGE else "regular"
            oid = self.hub.entry(path, tree[path])["oid"] if path in tree else None
            files.append(dict(path=path, uploadMode=mode, shouldIgnore=False, oid=oid))
        self.answer(200, dict(files=files))

    def lfs(self, kind, name):
        self.hub.find(kind, name)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            known = (self.hub.blobs / wanted["oid"]).exists()
            upload = (
                {} if known else dict(actions=dict(upload=dict(href=f"{self.hub.storage}/{wanted['oid']}")))
            )
            objects.append(wanted | upload)
        self.answer(200, dict(transfer="basic", objects=objects))

    def commit(self, kind, name, revision):
        repo = self.hub.find(kind, name)
        repo.resolve(revision)
        files, removed = {}, set()
        for line in self.content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                content = base64.b64decode(value["content"])
                digest = hashlib.sha256(content).hexdigest()
                (self.hub.blobs / digest).write_bytes(content)
                files[value["path"]] = digest
            elif item["key"] == "lfsFile":
                if not (self.hub.blobs / value["oid"]).exists():
                    return self.error(400, "LFS file was not uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                removed.add(value["path"])
        oid = repo.commit(files, revision, removed)
        self.answer(200, dict(success=True, commitOid=oid, commitUrl=f"{self.hub.url}/{name}/commit/{oid}"))


def main():
    root = Path(sys.argv[1])
    with Hub(root / ".hub") as hub:
        for folder in sorted(p for p in root.glob("[!.]*/*") if p.is_dir()):
            hub.add_folder(folder.relative_to(root).as_posix(), folder)
            print("serving", folder.relative_to(root))
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN}; unset HF_HUB_OFFLINE")
        threading.Event().wait()


if __name__ == "__main__":
    main()
