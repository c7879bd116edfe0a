"""A small server that speaks what the Hub's own client needs to create, fill and read a repository. Everything is in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class State:
    """Repositories: for each its privacy, its branches, and the files of each commit."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(repo, {}).get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((repo, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches.setdefault(repo, {})[branch] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    state: State
    token = "hf_AbCdEfGhIjKlMnOpQr"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        # As a careless server could do it, the answer repeats the token that it was asked with.
        self.answer(404, {"error": f"{what} {self.headers.get('Authorization')}"}, X_Error_Code=what, X_Error_Message=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.state.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo not in self.state.branches:
                self.state.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
                self.state.commit(repo, "main", {".gitattributes": b""})
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/([\w.%-]+)", self.path.partition("?")[0]
        ):
            repo, what, revision = found.groups()
            if what == "branch":
                self.state.branches[repo].setdefault(revision, self.state.branches[repo]["main"])
                return self.answer(200, {})
            there = self.state.files(repo, revision)
            if there is None:
                return self.missing("RepoNotFound")
            if what == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                return self.answer(200, {"files": files})
            new = dict(there[1])
            for line in body.splitlines():
                step = json.loads(line)
                if step["key"] == "file":
                    new[step["value"]["path"]] = base64.b64decode(step["value"]["content"])
                elif step["key"] == "deletedFile":
                    del new[step["value"]["path"]]
            sha = self.state.commit(repo, revision, new)
            url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
            return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return self.missing("EntryNotFound")

    def do_GET(self) -> None:
        self.state.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([\w.%-]+))?", path):
            repo, what, revision = found.groups()
            there = self.state.files(repo, revision or "main")
            if there is None:
                return self.missing("RevisionNotFound" if repo in self.state.branches else "RepoNotFound")
            sha, files = there
            if what == "tree":
                tree = [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files.items()
                ]
                return self.answer(200, tree)
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                200, {"id": repo, "sha": sha, "siblings": siblings, "private": self.state.private[repo], "tags": []}
            )
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.%-]+)/(.+)", path):
            repo, revision, name = found.groups()
            there = self.state.files(repo, revision)
            if there is None:
                return self.missing("RevisionNotFound" if repo in self.state.branches else "RepoNotFound")
            sha, files = there
            if name not in files:
                return self.answer(404, {"error": "no entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], X_Repo_Commit=sha, ETag=f'"{etag}"', Content_Length=str(len(files[name])))
        return self.missing("EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def serving():
    """The state, and the address of a server that is up."""
    state = State()
    handler = type("Bound", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


__all__ = ["Handler", "State", "serving"]
