"""The gRPC service: protobuf in, protobuf out, and nothing else.

Unary and streaming answers are made from the same pieces, so they cannot differ.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import ExitStack

from tgis.errors import InvalidRequest
from tgis.front.accounts import Accounts, Call, Output
from tgis.front.adapters import Adapters
from tgis.front.intake import Input, Intake
from tgis.front.params import Limits
from tgis.front.rpc import Context
from tgis.front.streams import Answer, Piece, Stream, Streams
from tgis.front.tenants import Metadata
from tgis.front.tokenize import TextTokenizer
from tgis.proto import generation_pb2 as pb
from tgis.types import FinishReason, ModelKind, TokenDetails, TokenOut

_NO_DETAILS = TokenDetails()


class GenerationService:
    """`fmaas.GenerationService`; errors become statuses in `tgis.front.rpc`."""

    def __init__(
        self,
        intake: Intake,
        adapters: Adapters,
        streams: Streams,
        tokenizer: TextTokenizer,
        accounts: Accounts,
        kind: ModelKind,
        limits: Limits,
        pad_id: int | None,
        tenant_of: Callable[[Metadata], bytes],
    ) -> None:
        self._intake = intake
        self._adapters = adapters
        self._pad_id = pad_id
        self._tenant_of = tenant_of
        self._streams = streams
        self._tokenizer = tokenizer
        self._accounts = accounts
        self._kind = kind
        self._limits = limits

    async def Generate(  # noqa: N802
        self, request: pb.BatchedGenerationRequest, context: Context
    ) -> pb.BatchedGenerationResponse:
        """Generate for a batch of inputs; all succeed or the call fails."""
        texts = [item.text for item in request.requests]
        kind = "single" if len(texts) == 1 else "batch"
        with self._accounts.call(kind, texts, request, context) as call:
            if not texts:
                return pb.BatchedGenerationResponse()
            tenant = self._tenant_of(context.invocation_metadata() or ())
            with self._intake.permits(len(texts), tenant), ExitStack() as stack:
                inputs = await self._intake.accept(texts, request, call.arrival, stack)
                call.validated = time.monotonic()
                streams = [
                    stack.enter_context(self._streams.open(item.job, tenant)) for item in inputs
                ]
                outputs = call.accepted(streams)
                answers = await _all(self._collect(call, output) for output in outputs)
                return pb.BatchedGenerationResponse(
                    responses=[
                        self._response(*parts)
                        for parts in zip(inputs, streams, answers, strict=True)
                    ]
                )

    async def GenerateStream(  # noqa: N802
        self, request: pb.SingleGenerationRequest, context: Context
    ) -> AsyncIterator[pb.GenerationResponse]:
        """Generate for one input, piece by piece."""
        texts = [request.request.text]
        tenant = self._tenant_of(context.invocation_metadata() or ())
        with (
            self._accounts.call("stream", texts, request, context) as call,
            self._intake.permits(1, tenant),
            ExitStack() as stack,
        ):
            if not request.HasField("request"):
                raise InvalidRequest("missing request")
            (item,) = await self._intake.accept(texts, request, call.arrival, stack)
            call.validated = time.monotonic()
            with self._streams.open(item.job, tenant) as stream:
                (output,) = call.accepted([stream])
                async for message in self._messages(item, call, output):
                    yield message

    async def Tokenize(  # noqa: N802
        self, request: pb.BatchedTokenizeRequest, context: Context
    ) -> pb.BatchedTokenizeResponse:
        """Token counts, and token strings and byte offsets on request."""
        with await self._adapters.lease(request):
            pass  # nothing of it is needed, but it must be there
        with self._accounts.tokenize(len(request.requests)) as note:
            results = await asyncio.gather(
                *(
                    self._tokenizer.describe(
                        item.text,
                        request.truncate_input_tokens,
                        request.return_tokens,
                        request.return_offsets,
                    )
                    for item in request.requests
                )
            )
            note(sum(result.count for result in results))
        return pb.BatchedTokenizeResponse(
            responses=[
                pb.TokenizeResponse(
                    token_count=result.count,
                    tokens=result.tokens,
                    offsets=[
                        pb.TokenizeResponse.Offset(start=start, end=end)
                        for start, end in result.offsets
                    ],
                )
                for result in results
            ]
        )

    async def ModelInfo(  # noqa: N802
        self, request: pb.ModelInfoRequest, context: Context
    ) -> pb.ModelInfoResponse:
        """What kind of model is served, and its limits."""
        return pb.ModelInfoResponse(
            model_kind=self._kind.value,  # type: ignore[arg-type]
            max_sequence_length=self._limits.max_sequence_length,
            max_new_tokens=self._limits.max_new_tokens,
        )

    def _response(self, item: Input, stream: Stream, answer: Answer) -> pb.GenerationResponse:
        not_started = answer.num_generated == 0
        separator = "\n\n" if self._kind is ModelKind.ENCODER_DECODER else ""
        echo = item.text + separator if item.params.input_text and not not_started else ""
        return pb.GenerationResponse(
            input_token_count=item.num_tokens,
            generated_token_count=answer.num_generated,
            text=echo + answer.text,
            stop_reason=answer.finish.value,  # type: ignore[arg-type]
            stop_sequence=answer.stop_sequence,
            seed=0 if not_started else item.seed,
            tokens=[self._token(token) for token in answer.tokens],
            input_tokens=[] if not_started else self._input_tokens(item, stream),
        )

    async def _collect(self, call: Call, output: Output) -> Answer:
        answer = await output.stream.collect()
        output.add(answer.text)
        self._accounts.finished(call, output, answer.finish)
        return answer

    async def _messages(
        self, item: Input, call: Call, output: Output
    ) -> AsyncIterator[pb.GenerationResponse]:
        """The messages of one stream, in the order of the TGIS api (streaming protocol)."""
        stream = output.stream
        yield pb.GenerationResponse(
            input_token_count=item.num_tokens,
            seed=item.seed,
            text=item.text if item.params.input_text else "",
        )
        awaiting_inputs = item.params.details.input
        finish = FinishReason.NOT_FINISHED
        while finish is FinishReason.NOT_FINISHED:
            for piece in await stream.next():
                if awaiting_inputs and piece.num_generated:
                    awaiting_inputs = False
                    tokens = self._input_tokens(item, stream)
                    yield pb.GenerationResponse(input_token_count=len(tokens), input_tokens=tokens)
                finish = piece.finish
                output.add(piece.text)
                if finish is not FinishReason.NOT_FINISHED:
                    self._accounts.finished(call, output, finish)
                if piece.text or piece.token is not None or finish:
                    yield self._piece(item, piece)

    def _piece(self, item: Input, piece: Piece) -> pb.GenerationResponse:
        message = pb.GenerationResponse(generated_token_count=piece.num_generated, text=piece.text)
        if piece.token is not None:
            message.tokens.append(self._token(piece.token))
        if piece.finish is not FinishReason.NOT_FINISHED:
            message.stop_reason = piece.finish.value  # type: ignore[assignment]
            message.stop_sequence = piece.stop_sequence
            message.seed = item.seed if piece.num_generated else 0
        return message

    def _token(self, out: TokenOut) -> pb.TokenInfo:
        return self._token_info(out.token_id, out.details or _NO_DETAILS)

    def _token_info(self, token_id: int, details: TokenDetails) -> pb.TokenInfo:
        return pb.TokenInfo(
            text=self._tokenizer.token_string(token_id),
            logprob=details.logprob,
            rank=details.rank,
            top_tokens=[
                pb.TokenInfo.TopToken(text=self._tokenizer.token_string(top_id), logprob=logprob)
                for top_id, logprob in details.top
            ],
        )

    def _input_tokens(self, item: Input, stream: Stream) -> list[pb.TokenInfo]:
        """One entry per input token; of the first nothing was predicted, by an encoder of none.

        The tokens of a soft prompt come first, as pads.
        """
        if not item.params.details.input:
            return []
        pads = [-1 if self._pad_id is None else self._pad_id] * item.num_virtual
        token_ids = [*pads, *item.job.token_ids]
        unknown = TokenDetails(logprob=math.nan if item.params.details.logprobs else 0.0)
        if self._kind is ModelKind.ENCODER_DECODER:
            return [self._token_info(token_id, unknown) for token_id in token_ids]
        rest = stream.input_details or [_NO_DETAILS] * (len(token_ids) - 1)
        return [
            self._token_info(token_id, details)
            for token_id, details in zip(token_ids, [unknown, *rest], strict=True)
        ]


async def _all(work: Iterable[Coroutine[None, None, Answer]]) -> list[Answer]:
    """Wait for all; when one fails, none is left behind."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
