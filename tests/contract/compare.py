"""What counts as equal: as the reference's own suite compares, message by message."""

import math
from typing import Any

from tests.contract.cases import Json
from tests.contract.oracle.request import snake
from tests.kit.client import Status

RELATIVE, ABSOLUTE = 5e-4, 1e-9


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where two JSON values first differ, None if they are equal but for rounding."""
    if isinstance(expected, float) and isinstance(found, int | float):
        if math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            return None
    elif isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return f"{path}: fields {sorted(found)} instead of {sorted(expected)}"
        return _first(difference(found[key], expected[key], f"{path}.{key}") for key in expected)
    elif isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{path}: {len(found)} items instead of {len(expected)}"
        pairs = enumerate(zip(found, expected, strict=True))
        return _first(difference(f, e, f"{path}[{i}]") for i, (f, e) in pairs)
    elif found == expected:
        return None
    return f"{path}: {found!r} instead of {expected!r}"


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def error_difference(found: Json | Status | None, expected: Json) -> str | None:
    """Where an RPC's outcome differs from an expected error."""
    if not isinstance(found, Status):
        return f"{found!r} instead of the error {expected}"
    same_text = (
        found.message == expected["message"]
        if expected.get("exact", True)
        else found.message.startswith(expected["message"])
    )
    return None if found.code == expected["code"] and same_text else f"{found} not {expected}"


def outcome_difference(found: Json | Status, case: Json) -> str | None:
    """Where the outcome of a unary RPC differs from what its case expects."""
    if "error" in case:
        return error_difference(found, case["error"])
    if isinstance(found, Status):
        return f"{found} instead of a response"
    return difference(found, case["response"])


def single_request(request: Json) -> Json:
    """A request with one input as GenerateStream takes it."""
    rest = {name: value for name, value in request.items() if name != "requests"}
    return {"request": request["requests"][0], **rest}


def stream_difference(
    messages: list[Json], request: Json, unary: Json, separator: str = ""
) -> str | None:
    """Where a stream differs from the protocol, or its sum from the unary response.

    Args:
        request: a SingleGenerationRequest.
        unary: the GenerationResponse that is expected of the unary method.
        separator: what stands between input and output in the unary text, and in no message.
    """
    options = snake(request).get("params", {}).get("response", {})
    head = {"inputTokenCount": unary["inputTokenCount"]}
    first = head | ({"seed": unary["seed"]} if "seed" in unary else {})
    if options.get("input_text") and (text := request["request"].get("text")):
        first["text"] = text
    opening = [first]
    if options.get("input_tokens"):
        opening.append(head | {"inputTokens": unary["inputTokens"]})
    found, rest = messages[: len(opening)], messages[len(opening) :]
    if problem := difference(found, opening, "opening"):
        return problem
    if not rest:
        return "no message after the opening"
    return _body_problem(rest, bool(options.get("generated_tokens"))) or difference(
        _collected(first, rest, separator if options.get("input_text") else ""),
        {name: value for name, value in unary.items() if name not in ("inputTokens", *head)},
        "collected",
    )


def _body_problem(body: list[Json], with_tokens: bool) -> str | None:
    """What is wrong with the messages after the opening, taken by themselves."""
    count = 0
    for i, message in enumerate(body):
        is_last = i == len(body) - 1
        if {"inputTokenCount", "inputTokens"} & message.keys():
            return f"body[{i}] has input fields: {message}"
        if is_last != ("stopReason" in message):
            return f"body[{i}] of {len(body)}: stop reason {message.get('stopReason')}"
        if not is_last and {"seed", "stopSequence"} & message.keys():
            return f"body[{i}] has final fields: {message}"
        if not is_last and not {"tokens", "text"} & message.keys():
            return f"body[{i}] says nothing: {message}"
        if len(message.get("tokens", [])) != with_tokens:
            return f"body[{i}] has {len(message.get('tokens', []))} tokens"
        if message.get("generatedTokenCount", 0) <= count:
            return f"body[{i}]: count {message.get('generatedTokenCount')} after {count}"
        count = message["generatedTokenCount"]
    return None


def _collected(first: Json, body: list[Json], separator: str) -> Json:
    """The body's messages as one response."""
    last = body[-1]
    text = first.get("text", "") + separator + "".join(m.get("text", "") for m in body)
    tokens = [token for message in body for token in message.get("tokens", [])]
    kept = ("generatedTokenCount", "stopReason", "seed", "stopSequence")
    collected = {name: last[name] for name in kept if name in last}
    return collected | ({"text": text} if text else {}) | ({"tokens": tokens} if tokens else {})
