"""How many replicas a load needs: arithmetic over a model's shape, a machine and measured costs.

A step of b decoding sequences takes `step + b (row + context)` seconds, and prompts share steps
with them, so b sequences of P prompt and O new tokens each get a token every

    gap(b) = step + b (row + context) + (b / O) P (1 - h) prompt_token

seconds where a share h of the prompts is cached, and the replica ends b / (O gap(b)) requests a
second. Memory, the largest batch or a wanted gap bound b. docs/scaling.md compares this with
the scheduler itself.

An encoder-decoder keeps keys and values of its input and of what it has made, one as large as the
other. Inputs cost what the encoder does, steps what the decoder does, and no input is cached.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgis.errors import ConfigError, ModelError
from tgis.hub.headers import ITEM_BYTES, read_headers
from tgis.hub.resolve import read_json
from tgis.models.families import read_spec
from tgis.models.families.t5 import SEQ2SEQ_FAMILIES, read_seq2seq_spec
from tgis.models.model_config import ModelConfig
from tgis.models.seq2seq_spec import Seq2SeqSpec
from tgis.models.spec import DecoderSpec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Measured on the two cores of docs/performance.md with model M; bytes and operations a second.
BANDWIDTH = 25e9
PREFILL_RATE = 1.0e12
DECODE_RATE = 0.7e12
# Seconds of the front's CPU time for a streamed token.
FRONT_TOKEN = 47e-6
_MEASURED_TOKENS = 128  # prompt and answer of the workloads that `Cost.measured` takes
_MEASURED_STREAMS = 32


@dataclass(frozen=True)
class Shape:
    """What of a model decides its costs."""

    num_parameters: int
    weight_bytes: int
    step_bytes: int  # of the weights, what a decoding step reads
    step_parameters: int  # multiplied with for a generated token
    prompt_parameters: int  # ... for a token of the prompt
    kv_bytes_per_token: int
    hidden_size: int
    vocab_size: int
    caches_prompts: bool = True


@dataclass(frozen=True)
class _Parts:
    """A model's parameters by what they are for; a decoder-only model has one part for all."""

    decoder: int
    encoder: int  # what an input passes through, 0 if that is the decoder
    other: int  # the table that is looked up in, not multiplied with
    wide: tuple[int, int]  # of decoder and encoder, those that stay float32
    kv_values: int  # of one token


@dataclass(frozen=True)
class Cost:
    """Seconds: of a step, and more for each thing in it."""

    step: float
    row: float  # a decoding sequence
    prompt_token: float
    context_token: float  # a token that a decoding sequence attends to

    @classmethod
    def estimated(
        cls, shape: Shape, bandwidth: float, prefill_rate: float, decode_rate: float
    ) -> "Cost":
        """Weights are read once a step, and multiplied with once for each token."""
        return cls(
            step=shape.step_bytes / bandwidth,
            row=2 * shape.step_parameters / decode_rate,
            prompt_token=2 * shape.prompt_parameters / prefill_rate,
            context_token=shape.kv_bytes_per_token / bandwidth,
        )

    @classmethod
    def measured(
        cls, shape: Shape, one_stream: float, many_streams: float, first_token: float
    ) -> "Cost":
        """From the figures that `benchmarks.serving` prints for W1 and W2.

        Args:
            one_stream: tokens a second of one request, 128 tokens in and out.
            many_streams: the same of 32 requests at once.
            first_token: seconds to the first token of the one request.

        Raises:
            ConfigError: the figures contradict each other.
        """
        number, streams = _MEASURED_TOKENS, _MEASURED_STREAMS
        prompt_token = first_token / number
        alone = (number / one_stream - first_token) / (number - 1)
        prompts = streams * number * prompt_token
        together = (streams * number / many_streams - prompts) / (number - 1)
        row = (together - alone) / (streams - 1)
        if alone <= 0 or row <= 0 or alone <= row:
            raise ConfigError(
                "--one-stream, --streams-32, --first-token-ms: contradict each other; expected"
                " figures of one model on one machine"
            )
        context = min(row, shape.kv_bytes_per_token / BANDWIDTH * number * 1.5)
        context_token = context / (number * 1.5)
        return cls(alone - row, row - context, prompt_token, context_token)


@dataclass(frozen=True)
class Load:
    """What is asked of all replicas together."""

    requests_per_second: float
    prompt_tokens: float
    new_tokens: float
    cached_share: float = 0.0  # of the prompts' tokens


@dataclass(frozen=True)
class Machine:
    """What a replica runs on."""

    memory: int  # bytes, for weights, keys and values and one step
    kv_share: float  # of what weights and a step leave
    max_running: int
    step_tokens: int
    num_shards: int = 1  # machines that share a replica's model


@dataclass(frozen=True)
class Plan:
    """The answer."""

    weight_bytes: int  # in each process of a replica
    step_bytes: int
    kv_tokens: int
    most_running: int  # sequences for which there is memory
    running: int  # sequences at the replica's limit
    gap: float  # seconds between tokens at that limit
    capacity: float  # requests a second of a replica
    replicas: int
    load_running: float  # sequences in a replica at the given load
    load_gap: float
    first_token: float  # without waiting
    front_share: float  # of one core


def read_shape(directory: Path, dtype: str, name: str) -> Shape:
    """A model's shape from its config.json; of its weights at most the headers are read.

    Raises:
        ModelError: the configuration is broken, or of a family that the native engine has not.
    """
    config = _read_config(directory)
    try:
        seq2seq = config.model_type in SEQ2SEQ_FAMILIES
        spec = read_seq2seq_spec(config) if seq2seq else read_spec(config)[0]
    except ModelError as error:
        raise ModelError(f"Model {name}: {error}") from None
    parts = _seq2seq_parts(spec) if isinstance(spec, Seq2SeqSpec) else _decoder_parts(spec)
    parameters = computed = parts.decoder + parts.encoder + parts.other
    if any(directory.glob("*.safetensors")):
        infos = read_headers(directory).values()
        parameters = sum((info.stop - info.start) // ITEM_BYTES[info.dtype] for info in infos)
    item = DTYPE_BYTES[dtype]
    step = parts.decoder + (0 if parts.encoder else parameters - computed)
    return Shape(
        num_parameters=parameters,
        weight_bytes=parameters * item + sum(parts.wide) * (4 - item),
        step_bytes=step * item + parts.wide[0] * (4 - item),
        step_parameters=step,
        prompt_parameters=parts.encoder or step,
        kv_bytes_per_token=parts.kv_values * item,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        caches_prompts=not seq2seq,
    )


def _decoder_parts(spec: DecoderSpec) -> _Parts:
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.hidden_size
    attention = width * spec.head_dim * (2 * heads + 2 * kv_heads)
    mlp = (3 if spec.gated_mlp else 2) * width * spec.intermediate_size
    tables = (1 if spec.tied_head else 2) * spec.vocab_size * width
    kv_values = 2 * spec.num_layers * kv_heads * spec.head_dim
    return _Parts(spec.num_layers * (attention + mlp) + tables, 0, 0, (0, 0), kv_values)


def _seq2seq_parts(spec: Seq2SeqSpec) -> _Parts:
    """Each layer of the decoder keeps keys and values of the input, which the encoder's end makes.

    The MLP's second matrix stays float32 (`Seq2SeqWeights.mlp_out`).
    """
    width, inner = spec.hidden_size, spec.num_heads * spec.head_dim
    encoders, decoders = spec.num_encoder_layers, spec.num_decoder_layers
    mlp_out = width * spec.intermediate_size
    mlp = (3 if spec.gated_mlp else 2) * mlp_out
    table = spec.vocab_size * width
    return _Parts(
        decoder=decoders * (6 * width * inner + mlp) + table,
        encoder=encoders * (4 * width * inner + mlp) + decoders * 2 * width * inner,
        other=0 if spec.scaled_logits else table,
        wide=(decoders * mlp_out, encoders * mlp_out),
        kv_values=2 * decoders * inner,
    )


def make_plan(
    shape: Shape,
    cost: Cost,
    load: Load,
    machine: Machine,
    *,
    wanted_gap: float = math.inf,
    utilisation: float = 0.7,
) -> Plan:
    """How many replicas, and what each of them does.

    Args:
        wanted_gap: seconds between tokens that are not to be exceeded.
        utilisation: share of a replica's capacity that is used; the rest is for peaks.

    Raises:
        ConfigError: not even one sequence fits, one alone exceeds the wanted gap, or prompts are
            said to be cached where none is.
    """
    if load.cached_share and not shape.caches_prompts:
        raise ConfigError("--cached: an encoder-decoder's inputs are not cached; expected 0")
    weights = shape.weight_bytes // machine.num_shards
    step = _step_bytes(shape, machine)
    room = machine.memory - weights - step
    if room <= 0:
        raise ConfigError(
            f"--memory={machine.memory}: {weights} bytes of weights and {step} of a step do not"
            " fit; more memory, a smaller dtype, or --num-shard"
        )
    kv_tokens = int(room * machine.kv_share * machine.num_shards / shape.kv_bytes_per_token)
    most = int(min(machine.max_running, kv_tokens // (load.prompt_tokens + load.new_tokens)))
    if most < 1:
        raise ConfigError(
            f"--memory={machine.memory}: room for {kv_tokens} tokens of keys and values, less than"
            " one sequence has"
        )
    fitting = [running for running in range(1, most + 1) if gap(cost, load, running) <= wanted_gap]
    if not fitting:
        least = gap(cost, load, 1) * 1e3
        raise ConfigError(f"--gap-ms={wanted_gap * 1e3:g}: one sequence alone takes {least:.1f} ms")
    running = fitting[-1]
    capacity = rate(cost, load, running)
    replicas = max(1, math.ceil(load.requests_per_second / (capacity * utilisation)))
    share = load.requests_per_second / replicas
    inside = _running_at(cost, load, share, running)
    return Plan(
        weight_bytes=weights,
        step_bytes=step,
        kv_tokens=kv_tokens,
        most_running=most,
        running=running,
        gap=gap(cost, load, running),
        capacity=capacity,
        replicas=replicas,
        load_running=inside,
        load_gap=gap(cost, load, inside),
        first_token=_uncached(load) * cost.prompt_token + gap(cost, load, inside),
        front_share=share * load.new_tokens * FRONT_TOKEN,
    )


def gap(cost: Cost, load: Load, running: float) -> float:
    """Seconds between two tokens of a sequence when so many run."""
    context = load.prompt_tokens + load.new_tokens / 2
    row = cost.row + context * cost.context_token
    prompts = _uncached(load) * cost.prompt_token / load.new_tokens
    return cost.step + running * (row + prompts)


def rate(cost: Cost, load: Load, running: float) -> float:
    """Requests that end in a second when so many run."""
    return running / (load.new_tokens * gap(cost, load, running))


def _uncached(load: Load) -> float:
    """Tokens of a prompt that are computed."""
    return max(1.0, load.prompt_tokens * (1 - load.cached_share))


def _running_at(cost: Cost, load: Load, requests_per_second: float, most: int) -> float:
    """Sequences that run at a rate below capacity: running = rate x new tokens x gap."""
    slope = gap(cost, load, 1) - cost.step
    tokens = requests_per_second * load.new_tokens
    return min(float(most), tokens * cost.step / (1 - tokens * slope))


def _step_bytes(shape: Shape, machine: Machine) -> int:
    """About what a step's activations need; the server measures it.

    A dozen float32 rows of the model's width for each token, and logits for every sequence.
    """
    rows = machine.step_tokens * shape.hidden_size * 12
    return 4 * (rows + machine.max_running * shape.vocab_size) // machine.num_shards


def _read_config(directory: Path) -> ModelConfig:
    values: Mapping[str, Any] = read_json(directory / "config.json", str(directory))
    return ModelConfig(values)
