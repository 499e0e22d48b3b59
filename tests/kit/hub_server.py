"""A small Hugging Face hub on loopback, with the real one's HTTP shape, headers and error codes.

Files of at least `LARGE` bytes are stored as the hub stores them: the resolve address redirects to
another origin, which must not see the caller's token.
"""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

from aiohttp import web

LARGE = 1000
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHUNK = 4096


@dataclass
class Repo:
    """A model: files by path; `private` and `gated` ones want a token that is in `readers`."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()

    def etag(self, path: str) -> str:
        """SHA-256 of a large file, Git's SHA-1 of a small one."""
        data = self.files[path]
        if len(data) >= LARGE:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A request that came in; `range` and `token` are "" where it had none."""

    method: str
    path: str
    range: str
    token: str
    host: str


@dataclass
class Faults:
    """What goes wrong, by the name of the file; each is used up or stays as said."""

    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes sent, then the line is cut
    stall: dict[str, int] = field(default_factory=dict)  # bytes sent, then silence
    missing: set[str] = field(default_factory=set)  # listed, but not there
    corrupt: set[str] = field(default_factory=set)  # other bytes of the same length, once
    no_ranges: set[str] = field(default_factory=set)  # answers 200 to any range
    no_size: set[str] = field(default_factory=set)  # says no length anywhere
    short: set[str] = field(default_factory=set)  # fewer bytes than promised, cleanly ended
    status: dict[str, list[int]] = field(default_factory=dict)  # status codes of next GETs


class Hub:
    """The running server.

    Attributes:
        endpoint: for HF_ENDPOINT.
        seen: all requests.
        stalled: set when a stalled transfer has sent its bytes.
    """

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.stalled = threading.Event()
        self.endpoint = ""
        self._port = 0

    def gets(self, name: str) -> list[str]:
        """The ranges of the requests for a file's bytes, in order."""
        return [s.range for s in self.seen if s.method == "GET" and s.path.endswith(f"/{name}")]

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/models/{rest:.+}", self._info),
            web.get("/cdn/{etag}/{name}", self._content),
            web.route("*", "/{repo:.+?}/resolve/{revision:[^/]+}/{path:.+}", self._resolve),
        ]

    @web.middleware
    async def _record(self, request: web.Request, handler) -> web.StreamResponse:
        headers = request.headers
        token = headers.get("authorization", "").removeprefix("Bearer ")
        seen = Seen(request.method, request.path, headers.get("range", ""), token, request.host)
        self.seen.append(seen)
        return await handler(request)

    def _open(self, name: str, revision: str, token: str) -> Repo:
        """The repository, or the hub's refusal."""
        known = {token for repo in self.repos.values() for token in repo.readers}
        if token and token not in known:
            raise _refused(401, "", "Invalid credentials in Authorization header")
        repo = self.repos.get(name)
        if repo is None or (repo.private and token not in repo.readers):
            text = "Repository not found" if token else "Invalid username or password."
            raise _refused(404 if token else 401, "RepoNotFound", text)
        if revision not in (*repo.revisions, repo.commit):
            raise _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    async def _info(self, request: web.Request) -> web.StreamResponse:
        """GET /api/models/NAME[/revision/REVISION | /tree/REVISION]."""
        path = request.raw_path.partition("?")[0].removeprefix("/api/models/")
        name, _, revision = path.partition("/revision/")
        name, tree, of_tree = name.partition("/tree/")
        revision = unquote(revision or of_tree or "main")
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        repo = self._open(name, revision, token)
        if tree:
            return web.json_response([_entry(repo, path) for path in repo.files])
        return web.json_response(
            {
                "id": name,
                "modelId": name,
                "sha": repo.commit,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in repo.files],
            }
        )

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        """HEAD or GET /NAME/resolve/REVISION/PATH."""
        path = request.match_info["path"]
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        repo = self._open(request.match_info["repo"], request.match_info["revision"], token)
        if repo.gated and token not in repo.readers:
            raise _refused(403 if token else 401, "GatedRepo", "Access to model is restricted.")
        commit = {"X-Repo-Commit": repo.commit}
        if path not in repo.files or path in self.faults.missing:
            raise _refused(404, "EntryNotFound", "Entry not found", commit)
        etag, data = repo.etag(path), repo.files[path]
        if len(data) < LARGE:
            return await self._send(request, path, data, {"ETag": f'"{etag}"', **commit})
        size = {} if path in self.faults.no_size else {"X-Linked-Size": str(len(data))}
        location = f"http://localhost:{self._port}/cdn/{etag}/{path}?X-Amz-Signature=secret"
        headers = {**commit, "X-Linked-ETag": f'"{etag}"', "Location": location, **size}
        return web.Response(status=302, headers=headers)

    async def _content(self, request: web.Request) -> web.StreamResponse:
        """GET of a large file's bytes."""
        etag, name = request.match_info["etag"], request.match_info["name"]
        for repo in self.repos.values():
            if name in repo.files and repo.etag(name) == etag:
                return await self._send(request, name, repo.files[name], {"ETag": f'"{etag}"'})
        raise web.HTTPNotFound

    async def _send(
        self, request: web.Request, name: str, data: bytes, headers: dict[str, str]
    ) -> web.StreamResponse:
        faults, status = self.faults, 200
        if codes := request.method == "GET" and faults.status.get(name):
            raise _refused(codes.pop(0), "", "")
        if name in faults.corrupt and request.method == "GET":
            faults.corrupt.discard(name)
            data = bytes(byte ^ 1 for byte in data)
        total = len(data)
        if name in faults.short:
            data = data[: total // 2]
        if (wanted := request.headers.get("range")) and name not in faults.no_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            status, data = 206, data[start:]
        response = web.StreamResponse(status=status, headers=headers)
        if name not in faults.no_size:
            response.content_length = len(data)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        cuts = faults.cut.get(name)
        limit = cuts.pop(0) if cuts else faults.stall.get(name, total)
        for start in range(0, min(limit, len(data)), _CHUNK):
            await response.write(data[start : min(start + _CHUNK, limit)])
        if cuts is not None and limit < len(data):
            request.transport.close()
        elif limit < len(data):
            self.stalled.set()
            await asyncio.Event().wait()  # until the client is gone
        return response


def _refused(
    status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> web.HTTPException:
    error = web.HTTPError(headers={"X-Error-Code": code, "X-Error-Message": message})
    error.headers.update(headers or {})
    error.set_status(status)
    return error


def _entry(repo: Repo, path: str) -> dict[str, object]:
    size, etag = len(repo.files[path]), repo.etag(path)
    entry: dict[str, object] = {"type": "file", "oid": etag[:40], "size": size, "path": path}
    if size >= LARGE:
        entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
    return entry


@contextmanager
def run_hub(repos: dict[str, Repo]) -> Iterator[Hub]:
    """A hub in a thread for the length of a block."""
    hub = Hub(repos)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(middlewares=[hub._record])
        app.add_routes(hub._routes())
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub._port = site._server.sockets[0].getsockname()[1]
        hub.endpoint = f"http://127.0.0.1:{hub._port}"
        return runner

    runners: list[web.AppRunner] = []

    def run() -> None:
        runners.append(loop.run_until_complete(start()))
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runners[0].cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
