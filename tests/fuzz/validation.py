"""Random requests through parsing and validation; every verdict is compared with the oracle's.

    python -m tests.fuzz.validation --count 1000000 [--seed 0]

Exits 0 when each message either gave parameters that hold all promises, or the error text that
the oracle expects, or could not be parsed at all. Anything else stops the run and is printed with
the message that caused it.
"""

import argparse
import random
import re
import sys
import time
from collections import Counter

import msgspec
from google.protobuf.message import DecodeError
from tests.fuzz.messages import BYTES, Messages, sized, tag
from tests.fuzz.oracle import check_length, check_params, verdict

from tgis.errors import InvalidRequest
from tgis.front.params import Limits, Params
from tgis.front.validate import fit_length, validate
from tgis.proto import generation_pb2 as pb
from tgis.types import SamplingParams

REQUESTS = (pb.BatchedGenerationRequest, pb.SingleGenerationRequest)
LIMITS = (
    Limits(max_new_tokens=169, max_sequence_length=200),
    Limits(max_new_tokens=5, max_sequence_length=6, default_include_stop_seqs=False),
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SamplingParams)


def make_message(messages: Messages, request: type[pb.BatchedGenerationRequest]) -> bytes:
    """Parameters mostly; sometimes a whole request, sometimes damaged, sometimes mere noise."""
    rng = messages.rng
    chance = rng.random()
    if chance < 0.02:
        return messages.noise()
    if chance < 0.15:
        body = messages.message(request.DESCRIPTOR, fill=0.7)
    else:
        params = messages.message(pb.Parameters.DESCRIPTOR, fill=0.6)
        body = tag(request.PARAMS_FIELD_NUMBER, BYTES) + sized(params)
    return messages.damaged(body) if chance > 0.9 else body


def examine(body: bytes, request: type[pb.BatchedGenerationRequest], rng: random.Random) -> str:
    """Put one message through and return what became of it.

    Raises:
        Exception: whatever must not happen.
    """
    try:
        message = request.FromString(body)
    except DecodeError:
        return "cannot be parsed"
    limits = rng.choice(LIMITS)
    expected = verdict(message.params, limits)
    params = _validate(message.params if message.HasField("params") else None, limits)
    if isinstance(params, str):
        assert params == expected, f"{params} instead of {expected}"
        return "refused: " + params
    assert expected is None, f"accepted instead of {expected}"
    check_params(params, limits)
    assert _decoder.decode(_encoder.encode(params.sampling)) == params.sampling
    return _examine_length(params, limits, rng)


def _validate(raw: pb.Parameters | None, limits: Limits) -> Params | str:
    try:
        return validate(raw, limits)
    except InvalidRequest as error:
        return str(error)


def _examine_length(params: Params, limits: Limits, rng: random.Random) -> str:
    num_input, prefix = rng.randrange(limits.max_sequence_length + 3), rng.choice([0, 0, 7])
    try:
        length = fit_length(num_input, prefix, params, limits)
    except InvalidRequest:
        used = num_input + prefix
        needed = used + max(1, params.sampling.min_new_tokens)
        assert used == 0 or needed > limits.max_sequence_length
        return "does not fit" if used else "nothing to continue"
    check_length(length, num_input + prefix, params, limits)
    return "token limited" if length.token_limited else "accepted"


def run(count: int, seed: int) -> Counter[str]:
    """Examine `count` messages and count the outcomes."""
    rng = random.Random(seed)
    messages = Messages(rng)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        request = REQUESTS[number & 1]
        body = make_message(messages, request)
        try:
            outcomes[examine(body, request, rng)] += 1
        except Exception:
            print(f"message {number} of seed {seed}, {request.__name__}: {body.hex()}")
            raise
    return outcomes


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz.validation")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    outcomes = run(args.count, args.seed)
    seconds = time.perf_counter() - start
    summary: Counter[str] = Counter()
    for outcome, times in outcomes.items():
        summary[re.sub(r"\(\d+\)", "(n)", outcome)] += times
    for outcome, times in summary.most_common():
        print(f"{times:9}  {outcome}")
    print(f"{args.count} messages in {seconds:.1f} s, nothing unexpected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
