"""Our services at a server that takes them as Serve's proxy does."""

import pytest

from tgis.cluster import ingress
from tgis.cluster.affinity import MARK, NO_KEY, key_in, key_of
from tgis.proto import generation_pb2 as pb


class Proxy:
    """Keeps what is added, as far as Serve looks at it."""

    def __init__(self) -> None:
        self.handlers: dict[str, object] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[object]) -> None:
        """Serve reads the same attribute."""
        self.handlers |= handlers[0]._method_handlers  # type: ignore[attr-defined]


@pytest.fixture
def handlers() -> dict[str, object]:
    proxy = Proxy()
    ingress.add_services(None, proxy)  # type: ignore[arg-type]
    return proxy.handlers


def test_every_method_of_both_services(handlers: dict[str, object]) -> None:
    assert set(handlers) >= {
        "/fmaas.GenerationService/Generate",
        "/fmaas.GenerationService/GenerateStream",
        "/fmaas.GenerationService/Tokenize",
        "/fmaas.GenerationService/ModelInfo",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }
    assert set(handlers) == {ingress.path_of(method) for method in ingress.METHODS.values()}
    streaming = {name for name, handler in handlers.items() if handler.response_streaming}  # type: ignore[attr-defined]
    assert streaming == {"/fmaas.GenerationService/GenerateStream", "/grpc.health.v1.Health/Watch"}


def test_requests_pass_as_bytes_with_their_key(handlers: dict[str, object]) -> None:
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="Once upon a time"))
    data = request.SerializeToString()
    read = handlers["/fmaas.GenerationService/GenerateStream"].request_deserializer  # type: ignore[attr-defined]
    marked = read(data)
    assert marked == MARK + key_of(request) + data
    assert key_in(b"pickled " + marked) == key_of(request)


@pytest.mark.parametrize("method", ["Generate", "ModelInfo"])
def test_what_is_no_prompt_has_no_key(handlers: dict[str, object], method: str) -> None:
    read = handlers[f"/fmaas.GenerationService/{method}"].request_deserializer  # type: ignore[attr-defined]
    assert read(b"\xff\xff") == MARK + NO_KEY + b"\xff\xff"
