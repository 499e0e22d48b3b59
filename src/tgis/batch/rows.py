"""Rows: a line of the input file to a request, an answer or an error to a line of the output."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from tgis.errors import InvalidRequest
from tgis.proto import generation_pb2 as pb

_KEYS = ("id", "params", "text")
MALFORMED = "MALFORMED"  # the code of a line that never became a request


class Prompt(NamedTuple):
    """One row of the input."""

    request: pb.BatchedGenerationRequest
    id: Any  # whatever JSON value the row has, or None


class Malformed(InvalidRequest):
    """A line is no row; the text says why, and never what stands in it."""


def parse_params(params: Mapping[str, Any], common: pb.Parameters | None = None) -> pb.Parameters:
    """`fmaas.Parameters` from proto3 JSON; what is not given there is as in `common`.

    Raises:
        Malformed: a field is unknown or of the wrong type.
    """
    merged = pb.Parameters()
    if common is not None:
        merged.CopyFrom(common)
    try:
        return ParseDict(dict(params), merged)
    except ParseError as error:
        raise Malformed(f"params: {_without_values(error)}") from None


def parse_line(line: bytes, common: pb.Parameters) -> Prompt:
    """A line to a request; the row's own parameters come before the common ones.

    Raises:
        Malformed: it is no JSON object, or a field is missing, unknown or of the wrong type.
    """
    row = _object(line)
    if unknown := sorted(set(row) - set(_KEYS)):
        raise Malformed(f"unknown field {unknown[0][:40]!a}; expected {', '.join(_KEYS)}")
    if not isinstance(text := row.get("text"), str):
        raise Malformed('"text": missing or not a string')
    params = row.get("params", {})
    if not isinstance(params, dict):
        raise Malformed('"params": not an object')
    merged = parse_params(params, common)
    try:
        item = pb.GenerationRequest(text=text)
    except ValueError:  # half of a surrogate pair
        raise Malformed('"text": cannot be encoded as UTF-8') from None
    return Prompt(pb.BatchedGenerationRequest(requests=[item], params=merged), row.get("id"))


def answer(line: int, prompt: Prompt, response: pb.GenerationResponse) -> dict[str, Any]:
    """The output row of a request that succeeded."""
    fields = MessageToDict(response, preserving_proto_field_name=True)
    head = {"text": response.text, "stop_reason": pb.StopReason.Name(response.stop_reason)}
    return _numbered(line, prompt) | head | fields


def failure(line: int, prompt: Prompt | None, code: str, message: str) -> dict[str, Any]:
    """The output row of a line that has no answer."""
    return _numbered(line, prompt) | {"error": {"code": code, "message": message}}


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of the output."""
    return json.dumps(row, ensure_ascii=False, allow_nan=True).encode(errors="replace") + b"\n"


def _numbered(line: int, prompt: Prompt | None) -> dict[str, Any]:
    number: dict[str, Any] = {"line": line}
    return number if prompt is None or prompt.id is None else number | {"id": prompt.id}


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise Malformed("not JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise Malformed("not a JSON object")
    return row


def _without_values(error: ParseError) -> str:
    """protobuf's text on one line, cut, since it quotes what was given."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."
