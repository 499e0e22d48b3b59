"""From a request's texts and raw parameters to jobs: permits, validation, tokens, lengths."""

import asyncio
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec

from tgis.errors import InvalidRequest, Overloaded
from tgis.front.adapters import Adapters, Lease
from tgis.front.params import Limits, Params
from tgis.front.streams import Job
from tgis.front.tokenize import TextTokenizer
from tgis.front.validate import fit_length, validate
from tgis.observe.metrics import Metrics
from tgis.proto import generation_pb2 as pb

Request = pb.BatchedGenerationRequest | pb.SingleGenerationRequest


@dataclass(frozen=True, slots=True)
class Input:
    """One valid input of a request."""

    job: Job
    params: Params
    text: str
    num_virtual: int = 0  # tokens of a soft prompt before it

    @property
    def num_tokens(self) -> int:
        """Input tokens, as counted for the client."""
        return len(self.job.token_ids)

    @property
    def seed(self) -> int:
        """The seed to tell the client; 0 unless sampling."""
        return self.job.sampling.seed if self.job.sampling.do_sample else 0


class Intake:
    """Lets requests in.

    Args:
        max_concurrent: inputs that may be queued or running at the same time.
        fair: no tenant may hold more permits than it leaves to others.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        adapters: Adapters,
        limits: Limits,
        max_concurrent: int,
        metrics: Metrics,
        fair: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._limits = limits
        self._max_concurrent = max_concurrent
        self._num_admitted = 0
        self._fair = fair
        self._held: dict[bytes, int] = {}  # permits, by tenant
        self._metrics = metrics

    @contextmanager
    def permits(self, count: int, tenant: bytes = b"") -> Iterator[None]:
        """Hold `count` of the permits for concurrent inputs.

        Raises:
            Overloaded: not that many are left; nobody waits.
        """
        left = self._max_concurrent - self._num_admitted
        held = self._held.get(tenant, 0)
        if count + (held if self._fair else 0) > left:
            self._metrics.count("tgi_request_failure", err="conc_limit")
            raise Overloaded("Model is overloaded")
        self._num_admitted += count
        self._held[tenant] = held + count
        try:
            yield
        finally:
            self._num_admitted -= count
            self._held[tenant] -= count
            if not self._held[tenant]:
                del self._held[tenant]

    async def accept(
        self, texts: Sequence[str], request: Request, arrival: float, stack: ExitStack
    ) -> list[Input]:
        """Validate one request, in the order of the TGIS api.

        Args:
            stack: what the request holds until its end is put here.

        Raises:
            InvalidRequest: the first rule that it breaks.
        """
        try:
            inputs = await self._accept(texts, request, arrival, stack)
        except InvalidRequest:
            self._metrics.count("tgi_request_failure", err="validation")
            raise
        except Overloaded:  # no room for its adapter
            self._metrics.count("tgi_request_failure", err="conc_limit")
            raise
        now = time.monotonic()
        self._metrics.observe("tgi_request_validation_duration", now - arrival)
        for item in inputs:
            self._metrics.observe("tgi_request_max_new_tokens", item.params.max_new_tokens)
            self._metrics.observe("tgi_request_input_length", item.num_tokens)
        return inputs

    async def _accept(
        self, texts: Sequence[str], request: Request, arrival: float, stack: ExitStack
    ) -> list[Input]:
        params = validate(request.params if request.HasField("params") else None, self._limits)
        lease = stack.enter_context(await self._adapters.lease(request))
        encodings = await asyncio.gather(
            *(self._tokenizer.encode(text, params.truncate_input_tokens) for text in texts)
        )
        for encoding in encodings:
            self._metrics.observe("tgi_request_raw_input_length", encoding.num_raw_tokens)
        return [
            Input(self._job(encoding.ids, params, arrival, lease), params, text, lease.num_virtual)
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def _job(self, token_ids: list[int], params: Params, arrival: float, lease: Lease) -> Job:
        length = fit_length(len(token_ids), lease.length, params, self._limits)
        sampling = params.sampling
        if sampling.do_sample and params.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(32))
        return Job(
            token_ids=token_ids,
            sampling=sampling,
            details=params.details,
            max_new_tokens=length.max_new_tokens,
            token_limited=length.token_limited,
            stop_sequences=params.stop_sequences,
            include_stop_sequence=params.include_stop_sequence,
            arrival=arrival,
            adapter=lease.handle,
            deadline=math.inf if params.time_limit is None else arrival + params.time_limit,
        )
