"""Who may call: API keys and names in client certificates, asked of every RPC but health checks."""

import hashlib
import hmac
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front.reload import BadFileError, Watched
from tgis.front.rpc import Context
from tgis.observe.metrics import Metrics

# Whole names of methods, nothing that could match more than it means.
OPEN_METHODS = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch"))

_BEHAVIOURS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_SAN = "x509_subject_alternative_name"
_Handler = Any  # grpc.RpcMethodHandler, whose fields the stubs do not know
_Details = grpc.HandlerCallDetails


def parse_keys(contents: list[bytes]) -> tuple[bytes, ...]:
    """The hashes in a file of API keys.

    Each line holds the SHA-256 hash of a key, 64 hexadecimal digits; what follows after a space,
    and lines that begin with `#`, are comments.

    Raises:
        BadFileError: a line is something else, or there is no hash.
    """
    hashes = []
    for number, line in enumerate(contents[0].decode(errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
            raise BadFileError(f"line {number} is not a SHA-256 hash of 64 hexadecimal digits")
        hashes.append(bytes.fromhex(words[0]))
    if not hashes:
        raise BadFileError("there is no hash in it")
    return tuple(hashes)


def watch_keys(config: Config, metrics: Metrics) -> Watched[tuple[bytes, ...]]:
    """The accepted keys, following their file.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = Path(config.api_keys_file or "")
    try:
        return Watched("api_keys", [path], parse_keys, metrics)
    except BadFileError as error:
        raise ConfigError(f"--api-keys-file={path}: {error}") from error


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls with UNAUTHENTICATED or PERMISSION_DENIED before their handlers see them.

    Args:
        keys: hashes of the keys of the moment; None asks for no key.
        client_names: names of which a client's certificate must have one; empty asks for none.
    """

    def __init__(
        self,
        keys: Callable[[], Sequence[bytes]] | None,
        client_names: Iterable[str],
        metrics: Metrics,
    ) -> None:
        self._keys = keys
        self._client_names = frozenset(name.lower() for name in client_names)
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[_Details], Awaitable[_Handler]], details: _Details
    ) -> _Handler:
        """Replace the handler of a call that is not allowed."""
        if details.method in OPEN_METHODS:
            return await continuation(details)
        if self._keys is not None and (reason := self._wrong_key(details.invocation_metadata)):
            self._metrics.count("tgi_auth_failure", reason=reason)
            text = "no API key was given" if reason == "no_key" else "the API key is not accepted"
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, text)
        handler = await continuation(details)
        return self._guarded(handler) if self._client_names and handler else handler

    def _wrong_key(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        given = [key for name, value in metadata if (key := key_in(name, value)) is not None]
        if not given:
            return "no_key"
        assert self._keys is not None
        digest = hashlib.sha256(given[0]).digest()
        # No short cut: the time must not tell which key it was.
        matches = [hmac.compare_digest(digest, known) for known in self._keys()]
        return "" if len(given) == 1 and any(matches) else "wrong_key"

    def _guarded(self, handler: _Handler) -> _Handler:
        """The same handler, after a look at the client's certificate."""
        kind = next(name for name in _BEHAVIOURS if getattr(handler, name) is not None)
        behaviour = getattr(handler, kind)

        async def check(context: Context) -> None:
            names = context.auth_context().get(_SAN, ())
            if self._client_names.isdisjoint(_text(name) for name in names):
                self._metrics.count("tgi_auth_failure", reason="client_name")
                await context.abort(
                    grpc.StatusCode.PERMISSION_DENIED,
                    "the client certificate has none of the accepted names",
                )

        async def call(request: Any, context: Context) -> Any:
            await check(context)
            if inspect.isasyncgenfunction(behaviour):
                async for message in behaviour(request, context):
                    await context.write(message)
                return None
            return await behaviour(request, context)

        return handler._replace(**{kind: call})


def _refusal(code: grpc.StatusCode, text: str) -> _Handler:
    """A handler that ends any kind of call without reading anything of it."""

    async def refuse(requests: object, context: Context) -> None:
        await context.abort(code, text)

    return grpc.stream_stream_rpc_method_handler(refuse)


def key_in(name: str, value: str | bytes) -> bytes | None:
    """The key in one entry of a call's metadata, if it is one that carries keys."""
    data = value.encode() if isinstance(value, str) else value
    if name == "x-api-key":
        return data.strip()
    if name == "authorization":
        scheme, _, key = data.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            return key.strip()
    return None


def _text(name: bytes) -> str:
    return name.decode(errors="replace").lower()
