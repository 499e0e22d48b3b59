"""Generate text for several inputs with one call.

    python examples/generate.py "Once upon a time" "One day, a dog"

Needs a running server (`make run`) and nothing but grpcio and the generated code.
"""

import argparse

import grpc

from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+")
    parser.add_argument("--server", default="localhost:8033")
    args = parser.parse_args()

    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text=text) for text in args.text],
        params=pb.Parameters(
            method=pb.SAMPLE,
            sampling=pb.SamplingParameters(temperature=0.7, top_p=0.9),
            stopping=pb.StoppingCriteria(max_new_tokens=60),
        ),
    )
    with grpc.insecure_channel(args.server) as channel:
        try:
            answer = GenerationServiceStub(channel).Generate(request, timeout=60)
        except grpc.RpcError as error:
            raise SystemExit(f"{error.code().name}: {error.details()}") from None

    for text, response in zip(args.text, answer.responses, strict=True):
        reason = pb.StopReason.Name(response.stop_reason)
        print(f"{text}{response.text}")
        print(f"  [{response.generated_token_count} tokens, {reason}, seed {response.seed}]\n")


if __name__ == "__main__":
    main()
