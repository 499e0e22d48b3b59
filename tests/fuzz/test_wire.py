import grpc
from tests.fuzz.validation import LIMITS
from tests.fuzz.wire import METHODS, run

from tgis.config import Config
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.front.validate import validate
from tgis.proto import generation_pb2 as pb


class Validating:
    """Goes as far as validation with every request."""

    async def Generate(self, request, context):
        validate(request.params, LIMITS[0])
        return pb.BatchedGenerationResponse()

    async def GenerateStream(self, request, context):
        validate(request.params, LIMITS[0])
        yield pb.GenerationResponse()

    async def Tokenize(self, request, context):
        return pb.BatchedTokenizeResponse()

    async def ModelInfo(self, request, context):
        return pb.ModelInfoResponse()


async def test_no_message_disturbs_the_server():
    server = GrpcServer(
        Config(model_name="x", host="127.0.0.1", grpc_port=0), is_serving=lambda: True
    )
    server.add_service(GENERATION_SERVICE, Validating())
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        outcomes = await run(channel, count=1000, seed=2, concurrency=16)
    await server.stop(0)
    assert outcomes.total() == 1000
    for method in METHODS:
        assert outcomes[f"{method} OK"]
    assert outcomes["Generate INVALID_ARGUMENT"]
    assert outcomes["GenerateStream INVALID_ARGUMENT"]
