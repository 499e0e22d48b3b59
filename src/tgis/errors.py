"""Every error that tgis raises on purpose, and what each becomes on the wire.

    TgisError
    ├─ StartupError          the server cannot start or go on; one line for the operator
    │  ├─ ConfigError        a setting is wrong (exit code 2)
    │  └─ ModelError         the model's files are missing, broken or unsupported (exit code 1)
    └─ RequestError          one request fails, its neighbours do not
       ├─ InvalidRequest     the caller must change the request
       ├─ Overloaded         the caller may retry later
       ├─ Unavailable        the engine died or is not up; the caller may retry
       └─ GenerationFailed   the engine failed on this request
          └─ OutOfMemory     ... for want of memory

`STATUS` is the only place where errors meet gRPC status names and HTTP codes.
User text never appears in a message.
"""

from typing import NamedTuple


class TgisError(Exception):
    """Base of all."""


class StartupError(TgisError):
    """The server cannot start or go on; `str()` is one line for the operator."""

    exit_code = 1


class ConfigError(StartupError):
    """A setting is unknown, malformed or contradicts another."""

    exit_code = 2


class ModelError(StartupError):
    """The model's files are missing, unreadable, mismatched or of an unsupported kind."""


class RequestError(TgisError):
    """One request fails; `str()` is what its client is told."""


class InvalidRequest(RequestError):
    """The request is at fault."""


class Overloaded(RequestError):
    """No room for the request now."""


class Unavailable(RequestError):
    """The engine is not there; `retry_after_ms` says when a retry makes sense."""

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class GenerationFailed(RequestError):
    """The engine failed while it worked on the request."""


class OutOfMemory(GenerationFailed):
    """The engine ran out of memory in a step of the request."""


class Status(NamedTuple):
    """An error's face: the name of a gRPC status code, and an HTTP status."""

    grpc: str
    http: int


STATUS: dict[type[RequestError], Status] = {
    InvalidRequest: Status("INVALID_ARGUMENT", 400),
    Overloaded: Status("RESOURCE_EXHAUSTED", 429),
    Unavailable: Status("UNAVAILABLE", 503),
    GenerationFailed: Status("UNKNOWN", 500),
    OutOfMemory: Status("UNKNOWN", 500),
}
