"""Print generated text as it appears.

    python examples/stream.py "One day, a dog"

Needs a running server (`make run`) and nothing but grpcio and the generated code.
"""

import argparse

import grpc

from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--server", default="localhost:8033")
    args = parser.parse_args()

    request = pb.SingleGenerationRequest(
        request=pb.GenerationRequest(text=args.text),
        params=pb.Parameters(
            stopping=pb.StoppingCriteria(max_new_tokens=100),
            response=pb.ResponseOptions(input_text=True),
        ),
    )
    with grpc.insecure_channel(args.server) as channel:
        try:
            # The first message has the input's length and text, the last one a stop reason.
            for message in GenerationServiceStub(channel).GenerateStream(request):
                print(message.text, end="", flush=True)
        except grpc.RpcError as error:
            raise SystemExit(f"\n{error.code().name}: {error.details()}") from None

    print(
        f"\n  [{message.generated_token_count} tokens, {pb.StopReason.Name(message.stop_reason)}]"
    )


if __name__ == "__main__":
    main()
