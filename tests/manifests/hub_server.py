"""A server on the loopback that speaks the part of the Hugging Face Hub's protocol which huggingface_hub uses here.

There is no hub to test against, so what is tested is our use of the real client: repositories are made, large files
go through LFS uploads, commits are applied whole, and what was committed is listed and read back by range. Written
from the client's own requests (huggingface_hub 2.4); it keeps everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1024
"""Files of more bytes than this go through LFS."""
TOKEN = "hf_loopback0000000000000000000000000"  # noqa: S105 - opens nothing but this server


class HubServer:
    """`repositories[TYPE/NAME]` is path -> content of the newest commit; `fail_after` uploads the server breaks off."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.uploads = 0
        self.fail_after: int | None = None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/whoami-v2":
            return self._json({"name": "someone", "type": "user", "auth": {}})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self._repository(found[1], found[2])
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": found[2], "sha": self._sha(), "private": False, "siblings": siblings, "tags": []})
            return None
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            files = self._repository(found[1], found[2])
            if files is not None:
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                self._json(_tree(files, found[3] or "", recursive=recursive))
            return None
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            return self._resolve(found[1] or "models", found[2], found[3])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/refs", path):
            return self._json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": self._sha()}], "tags": [], "converts": []})  # fmt: skip
        return self._error(404, "EntryNotFound", f"no such page: {path}")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid credentials")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            key = f"{asked.get('type', 'model')}s/{name}"
            prefix = "datasets/" if key.startswith("datasets/") else ""
            made = {"url": f"{self.hub.url}/{prefix}{name}", "name": name}
            if key in self.hub.repositories:
                return self._answer(409, json.dumps({"error": "it is there", **made}).encode(), "application/json", {})
            self.hub.repositories[key] = {}
            return self._json(made)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/[^/]+", path):
            if self._repository(found[1], found[2]) is None:
                return None
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self._lfs_object(wanted) for wanted in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/[^/]+", path):
            return self._commit(found[1], found[2], body)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/[^/]+", path):
            files_of = self._repository(found[1], found[2])
            if files_of is not None:
                asked_paths = [unquote(p) for p in parse_qs(body.decode()).get("paths", [])] or json.loads(body)[
                    "paths"
                ]
                folders = {name.rpartition("/")[0] for name in files_of}
                self._json([_entry(p, files_of[p]) if p in files_of else {"type": "directory", "path": p, "oid": "0" * 40} for p in asked_paths if p in files_of or p in folders])  # fmt: skip
            return None
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        return self._error(404, "", f"no such page: {path}")

    def do_PUT(self) -> None:
        body = self._body()
        self.hub.uploads += 1
        if self.hub.fail_after is not None and self.hub.uploads > self.hub.fail_after:
            return self._error(403, "", "the upload was broken off")
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        return self._json({})

    def _lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.blobs:
            answer["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}", "header": {}}}
        return answer

    def _commit(self, kind: str, name: str, body: bytes) -> None:
        files = self._repository(kind, name)
        if files is None:
            return
        paths = []
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                paths.append(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._error(400, "", "LFS pointer to a file that was not uploaded")
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
                paths.append(value["path"])
        self.hub.commits.append((name, paths))
        self._json(
            {"success": True, "commitOid": self._sha(), "commitUrl": f"{self.hub.url}/{name}/commit/{self._sha()}"}
        )

    def _resolve(self, kind: str, name: str, path: str) -> None:
        files = self._repository(kind, name)
        if files is None:
            return
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data, status = files[path], 200
        headers = {
            "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
            "X-Repo-Commit": self._sha(),
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            data, status = data[start : stop + 1], 206
        self._answer(status, data, "application/octet-stream", headers)

    def _repository(self, kind: str, name: str) -> dict[str, bytes] | None:
        files = self.hub.repositories.get(f"{kind}/{name}")
        if files is None:
            self._error(404, "RepoNotFound", "Repository not found")
        return files

    def _sha(self) -> str:
        return hashlib.sha1(str(len(self.hub.commits)).encode()).hexdigest()  # noqa: S324 - a commit's name

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._answer(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _answer(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
    entry["lastCommit"] = {"id": "0" * 40, "title": "a commit", "date": "2026-11-28T00:00:00.000Z"}
    if len(data) > LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(start):
            continue
        head, slash, _ = path[len(start) :].partition("/")
        if slash:
            found.setdefault(start + head, {"type": "directory", "path": start + head, "oid": "0" * 40})
        if recursive or not slash:
            found[path] = _entry(path, data)
    return list(found.values())
