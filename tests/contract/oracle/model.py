"""The oracle: a model directory, and what a TGIS server would answer with it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.contract.oracle import logits as rules
from tests.contract.oracle.logits import Details, Margins
from tests.contract.oracle.request import (
    Json,
    Limits,
    Params,
    RejectedError,
    check_length,
    parse,
    snake,
)
from tests.contract.oracle.text import Text, find_stop
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM


@dataclass(frozen=True)
class Step:
    """One generated token."""

    token_id: int
    details: Details


@dataclass
class Output:
    """One input's answer, before it becomes JSON."""

    steps: list[Step] = field(default_factory=list)
    text: str = ""
    stop_reason: str = ""
    stop_sequence: str = ""


class Oracle:
    """One model in float32.

    Args:
        directory: a model in the layout of the Hugging Face hub.
        limits: the server settings to answer for.
    """

    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        # The same sums on every machine; and these models are too small to share out.
        torch.set_num_threads(1)
        self.limits = limits or Limits()
        config = AutoConfig.from_pretrained(directory)
        self.encoder_decoder = bool(config.is_encoder_decoder)
        kind = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        self.model: Any = kind.from_pretrained(directory, dtype=torch.float32).eval()
        self.start_id = getattr(config, "decoder_start_token_id", None)
        self.text = Text(directory, not self.encoder_decoder, self.limits.output_special_tokens)
        eos = json.loads((directory / "config.json").read_text()).get("eos_token_id")
        self.eos_ids: list[int] = eos if isinstance(eos, list) else [eos]
        self.margins = Margins()

    # --- the four methods of the service -------------------------------------------------------

    def generate(self, request: Json) -> Json:
        """Answer a BatchedGenerationRequest in proto3 JSON.

        A sampling request without a seed is the caller's: it must put one in.

        Raises:
            RejectedError: the answer is a gRPC status.
        """
        texts = [str(item.get("text", "")) for item in request.get("requests", [])]
        if not texts:
            return {}
        if len(texts) > self.limits.max_concurrent_requests:
            raise RejectedError("RESOURCE_EXHAUSTED", "Model is overloaded")
        params = parse(request, self.limits)
        inputs = [self.text.encode(text, params.truncate) for text in texts]
        for ids in inputs:
            check_length(len(ids), params, self.limits)
        return {
            "responses": [
                self._respond(text, ids, params) for text, ids in zip(texts, inputs, strict=True)
            ]
        }

    def start_stream(self, request: Json) -> Json:
        """What is wrong with a SingleGenerationRequest; else the unary answer to the same.

        Raises:
            RejectedError: the answer is a gRPC status.
        """
        if "request" not in request:
            raise RejectedError("INVALID_ARGUMENT", "missing request")
        rest = {name: value for name, value in request.items() if name != "request"}
        return self.generate({"requests": [request["request"]], **rest})

    def tokenize(self, request: Json) -> Json:
        """Answer a BatchedTokenizeRequest."""
        request = snake(request)
        responses = []
        for item in request.get("requests", []):
            truncate = int(request.get("truncate_input_tokens", 0))
            rows = self.text.tokenize(str(item.get("text", "")), truncate)
            responses.append(
                _present(
                    tokenCount=len(rows),
                    tokens=[row[0] for row in rows if request.get("return_tokens")],
                    offsets=[
                        _present(start=row[1], end=row[2])
                        for row in rows
                        if request.get("return_offsets")
                    ],
                )
            )
        return _present(responses=responses)

    def model_info(self, _request: Json) -> Json:
        """Answer a ModelInfoRequest."""
        return _present(
            modelKind="ENCODER_DECODER" if self.encoder_decoder else None,
            maxSequenceLength=self.limits.max_sequence_length,
            maxNewTokens=self.limits.effective_new_tokens,
        )

    # --- generation ----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, input_ids: list[int], params: Params) -> Output:
        """Generate from `input_ids` until a stop rule holds."""
        room = self.limits.max_sequence_length - len(input_ids)
        lowered = params.max_new_tokens > room
        max_new_tokens = min(params.max_new_tokens, room)
        generator = torch.Generator("cpu").manual_seed(params.seed or 0)
        next_logits = self._decoding(input_ids)
        output = Output()
        ids: list[int] = []
        size = 0  # bytes of text so far
        while True:
            seen = [self.start_id, *ids] if self.encoder_decoder else input_ids + ids
            scores = rules.process(
                next_logits(ids), params, seen, len(ids), self.eos_ids, self.margins
            )
            token = rules.choose(scores, params.sample, generator, self.margins)
            details = rules.details_of(scores, token, params, True, self.margins)
            output.steps.append(Step(token, details))
            ids.append(token)
            text = self._text(ids)
            num_new, size = len(text) - size, len(text)
            if len(ids) < params.min_new_tokens:
                continue
            output.text = text.decode()
            if token in self.eos_ids:
                output.stop_reason = "EOS_TOKEN"
            elif len(ids) == max_new_tokens:
                output.stop_reason = "TOKEN_LIMIT" if lowered else "MAX_TOKENS"
            elif stop := find_stop(text, num_new, params.stop_sequences):
                output.stop_reason = "STOP_SEQUENCE"
                output.stop_sequence, start, end = stop
                cut = end if params.include_stop_sequence else start
                output.text = text[:cut].decode(errors="ignore")
            if output.stop_reason:
                return output

    def input_details(self, input_ids: list[int], params: Params) -> list[Details]:
        """Details of each input token, by raw logits; the first has no logits to go by, and the
        input of an encoder has none at all.
        """
        nothing = Details(float("nan") if params.logprobs else 0.0, 0, [])
        if self.encoder_decoder:
            return [nothing] * len(input_ids)
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0]
        return [nothing] + [
            rules.details_of(logits[i - 1].float(), input_ids[i], params, False, self.margins)
            for i in range(1, len(input_ids))
        ]

    def _decoding(self, input_ids: list[int]) -> Any:
        """A function from the ids generated so far to the logits of the next one."""
        if not self.encoder_decoder:
            return lambda ids: self.model(
                input_ids=torch.tensor([input_ids + ids]), use_cache=False
            ).logits[0, -1]
        encoded = self.model.get_encoder()(input_ids=torch.tensor([input_ids]))
        return lambda ids: self.model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([[self.start_id, *ids]]),
            use_cache=False,
        ).logits[0, -1]

    def _text(self, ids: list[int]) -> bytes:
        """The text released after `ids`, which must only ever grow.

        Raises:
            ValueError: a later token changes text that was already released, so that the api does
                not say what the answer is.
        """
        visible = ids[:-1] if ids[-1] in self.eos_ids else ids
        text = self.text.decode(visible)
        if not text.startswith(self.text.decode(visible[:-1])):
            raise ValueError(f"detokenisation is ambiguous: {text!r}")
        return text.encode()

    # --- JSON ----------------------------------------------------------------------------------

    def _respond(self, text: str, ids: list[int], params: Params) -> Json:
        output = self.run(ids, params)
        separator = "\n\n" if self.encoder_decoder else ""
        steps = output.steps if params.generated_tokens else []
        inputs = self.input_details(ids, params) if params.input_tokens else []
        return _present(
            generatedTokenCount=len(output.steps),
            text=(text + separator if params.input_text else "") + output.text,
            inputTokenCount=len(ids),
            stopReason=output.stop_reason,
            tokens=[self._token(step.token_id, step.details) for step in steps],
            inputTokens=[self._token(i, d) for i, d in zip(ids, inputs, strict=False)],
            seed=str(params.seed) if params.sample and params.seed else None,
            stopSequence=output.stop_sequence,
        )

    def _token(self, token_id: int, details: Details) -> Json:
        return _present(
            text=self.text.token(token_id),
            logprob=_number(details.logprob),
            rank=details.rank,
            topTokens=[
                _present(text=self.text.token(i), logprob=_number(value))
                for i, value in details.top
            ],
        )


def _number(value: float) -> float | str:
    """As JSON has it; more digits than a comparison looks at, fewer than platforms share."""
    return "NaN" if value != value else float(f"{value:.6g}")


def _present(**fields: Any) -> Json:
    """proto3 JSON leaves out every field that has its default value."""
    return {name: value for name, value in fields.items() if value}
