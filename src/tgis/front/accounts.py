"""What is noted of each request: metrics of arrival, failure and completion, and one log line."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tgis.errors import RequestError
from tgis.front.streams import Stream
from tgis.observe.metrics import Metrics
from tgis.types import FinishReason

log = logging.getLogger(__name__)


class Accounts:
    """Request metrics and the completion log."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def arrived(self, kind: str, num_inputs: int) -> None:
        """A request has come, before any check."""
        self._metrics.count("tgi_request_count", kind=kind)
        if num_inputs:
            self._metrics.count("tgi_request_input_count", num_inputs)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count how generation ends badly: by an error, or because the client is gone."""
        try:
            yield
        except RequestError as error:
            self._metrics.count("tgi_request_failure", err="generate")
            log.error("request failed: %s", error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.count("tgi_request_failure", err="cancelled")
            log.warning("request cancelled by its client")
            raise

    def finished(self, kind: str, stream: Stream, finish: FinishReason) -> None:
        """One input is complete."""
        times, metrics = stream.times, self._metrics
        metrics.count("tgi_request_success", stop_reason=finish.name, kind=kind)
        num_tokens = stream.num_generated
        inference = times.last_token - times.started
        metrics.observe("tgi_request_inference_duration", inference)
        metrics.observe(
            "tgi_request_mean_time_per_token_duration",
            inference / num_tokens if num_tokens else 0.0,
        )
        metrics.observe("tgi_request_duration", times.last_token - times.arrival)
        metrics.observe("tgi_request_generated_tokens", num_tokens)
        metrics.observe("tgi_request_total_tokens", num_tokens + len(stream.job.token_ids))
        log.info(
            "%s: %d input tokens, %d generated, %s, queue %.1f ms, inference %.1f ms",
            kind,
            len(stream.job.token_ids),
            num_tokens,
            finish.name,
            (times.started - times.arrival) * 1e3,
            inference * 1e3,
        )

    @contextmanager
    def tokenize(self, num_texts: int) -> Iterator[Callable[[int], None]]:
        """Count a Tokenize call; what it yields is told the number of tokens at the end."""
        start = time.monotonic()
        self._metrics.count("tgi_tokenize_request_count")
        self._metrics.count("tgi_tokenize_request_input_count", num_texts)

        def note(num_tokens: int) -> None:
            self._metrics.observe("tgi_tokenize_request_tokens", num_tokens)
            self._metrics.observe("tgi_tokenize_request_duration", time.monotonic() - start)

        yield note
