"""The public contract cannot drift: every message, field, number, type and presence is listed."""

import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from tgis.proto import generation_pb2, generation_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]

# name -> number, type; "?" after a type: explicit presence, "*": repeated, "|x": in oneof x.
MESSAGES = {
    "BatchedGenerationRequest": {
        "model_id": (1, "string"),
        "prefix_id": (2, "string?"),
        "requests": (3, "GenerationRequest*"),
        "adapter_id": (4, "string?"),
        "params": (10, "Parameters?"),
    },
    "SingleGenerationRequest": {
        "model_id": (1, "string"),
        "prefix_id": (2, "string?"),
        "request": (3, "GenerationRequest?"),
        "adapter_id": (4, "string?"),
        "params": (10, "Parameters?"),
    },
    "BatchedGenerationResponse": {"responses": (1, "GenerationResponse*")},
    "GenerationRequest": {"text": (2, "string")},
    "GenerationResponse": {
        "generated_token_count": (2, "uint32"),
        "text": (4, "string"),
        "input_token_count": (6, "uint32"),
        "stop_reason": (7, "StopReason"),
        "tokens": (8, "TokenInfo*"),
        "input_tokens": (9, "TokenInfo*"),
        "seed": (10, "uint64"),
        "stop_sequence": (11, "string"),
    },
    "Parameters": {
        "method": (1, "DecodingMethod"),
        "sampling": (2, "SamplingParameters?"),
        "stopping": (3, "StoppingCriteria?"),
        "response": (4, "ResponseOptions?"),
        "decoding": (5, "DecodingParameters?"),
        "truncate_input_tokens": (6, "uint32"),
    },
    "DecodingParameters": {
        "repetition_penalty": (1, "float"),
        "length_penalty": (2, "DecodingParameters.LengthPenalty?"),
        "format": (3, "DecodingParameters.ResponseFormat?|guided"),
        "json_schema": (4, "string?|guided"),
        "regex": (5, "string?|guided"),
        "choice": (6, "DecodingParameters.StringChoices?|guided"),
        "grammar": (7, "string?|guided"),
    },
    "DecodingParameters.LengthPenalty": {
        "start_index": (1, "uint32"),
        "decay_factor": (2, "float"),
    },
    "DecodingParameters.StringChoices": {"choices": (1, "string*")},
    "SamplingParameters": {
        "temperature": (1, "float?"),
        "top_k": (2, "uint32"),
        "top_p": (3, "float"),
        "typical_p": (4, "float"),
        "seed": (5, "uint64?"),
    },
    "StoppingCriteria": {
        "max_new_tokens": (1, "uint32"),
        "min_new_tokens": (2, "uint32"),
        "time_limit_millis": (3, "uint32"),
        "stop_sequences": (4, "string*"),
        "include_stop_sequence": (5, "bool?"),
    },
    "ResponseOptions": {
        "input_text": (1, "bool"),
        "generated_tokens": (2, "bool"),
        "input_tokens": (3, "bool"),
        "token_logprobs": (4, "bool"),
        "token_ranks": (5, "bool"),
        "top_n_tokens": (6, "uint32"),
    },
    "TokenInfo": {
        "text": (2, "string"),
        "logprob": (3, "float"),
        "rank": (4, "uint32"),
        "top_tokens": (5, "TokenInfo.TopToken*"),
    },
    "TokenInfo.TopToken": {"text": (2, "string"), "logprob": (3, "float")},
    "BatchedTokenizeRequest": {
        "model_id": (1, "string"),
        "requests": (2, "TokenizeRequest*"),
        "return_tokens": (3, "bool"),
        "return_offsets": (4, "bool"),
        "truncate_input_tokens": (5, "uint32"),
        "prefix_id": (6, "string?"),
        "adapter_id": (7, "string?"),
    },
    "BatchedTokenizeResponse": {"responses": (1, "TokenizeResponse*")},
    "TokenizeRequest": {"text": (1, "string")},
    "TokenizeResponse": {
        "token_count": (1, "uint32"),
        "tokens": (2, "string*"),
        "offsets": (3, "TokenizeResponse.Offset*"),
    },
    "TokenizeResponse.Offset": {"start": (1, "uint32"), "end": (2, "uint32")},
    "ModelInfoRequest": {"model_id": (1, "string")},
    "ModelInfoResponse": {
        "model_kind": (1, "ModelInfoResponse.ModelKind"),
        "max_sequence_length": (2, "uint32"),
        "max_new_tokens": (3, "uint32"),
    },
}

ENUMS = {
    "DecodingMethod": ["GREEDY", "SAMPLE"],
    "StopReason": [
        "NOT_FINISHED",
        "MAX_TOKENS",
        "EOS_TOKEN",
        "CANCELLED",
        "TIME_LIMIT",
        "STOP_SEQUENCE",
        "TOKEN_LIMIT",
        "ERROR",
    ],
    "DecodingParameters.ResponseFormat": ["TEXT", "JSON"],
    "ModelInfoResponse.ModelKind": ["DECODER_ONLY", "ENCODER_DECODER"],
}

# method -> request, response, streamed response
METHODS = {
    "Generate": ("BatchedGenerationRequest", "BatchedGenerationResponse", False),
    "GenerateStream": ("SingleGenerationRequest", "GenerationResponse", True),
    "Tokenize": ("BatchedTokenizeRequest", "BatchedTokenizeResponse", False),
    "ModelInfo": ("ModelInfoRequest", "ModelInfoResponse", False),
}

SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_BOOL: "bool",
}


def short_name(full_name: str) -> str:
    assert full_name.startswith("fmaas.")
    return full_name.removeprefix("fmaas.")


def describe(field: FieldDescriptor) -> tuple[int, str]:
    """A field as the tables above spell it."""
    referred = field.message_type or field.enum_type
    kind = short_name(referred.full_name) if referred else SCALARS[field.type]
    oneof = field.containing_oneof
    label = "*" if field.is_repeated else "?" if field.has_presence else ""
    group = f"|{oneof.name}" if oneof and not oneof.name.startswith("_") else ""
    return field.number, kind + label + group


def all_messages() -> dict[str, Descriptor]:
    found: dict[str, Descriptor] = {}
    pending = list(generation_pb2.DESCRIPTOR.message_types_by_name.values())
    while pending:
        message = pending.pop()
        found[short_name(message.full_name)] = message
        pending += message.nested_types
    return found


def all_enums() -> dict[str, EnumDescriptor]:
    enums = list(generation_pb2.DESCRIPTOR.enum_types_by_name.values())
    for message in all_messages().values():
        enums += message.enum_types
    return {short_name(enum.full_name): enum for enum in enums}


def test_there_are_no_other_messages():
    assert sorted(all_messages()) == sorted(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_fields(name):
    fields = {field.name: describe(field) for field in all_messages()[name].fields}
    assert fields == MESSAGES[name]


def test_enums():
    numbers = {
        name: {value.name: value.number for value in enum.values}
        for name, enum in all_enums().items()
    }
    assert numbers == {
        name: {value: number for number, value in enumerate(values)}
        for name, values in ENUMS.items()
    }


def test_service():
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    assert service.full_name == "fmaas.GenerationService"
    methods = {
        method.name: (
            short_name(method.input_type.full_name),
            short_name(method.output_type.full_name),
            method.server_streaming,
        )
        for method in service.methods
    }
    assert methods == METHODS
    assert not any(method.client_streaming for method in service.methods)


def test_stub_calls_the_public_paths():
    paths = []

    class Channel:
        def unary_unary(self, path, **_):
            paths.append(path)

        unary_stream = unary_unary

    generation_pb2_grpc.GenerationServiceStub(Channel())
    assert sorted(paths) == sorted(f"/fmaas.GenerationService/{name}" for name in METHODS)


# ---- the generated code is in step with the source ----


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_proto", ROOT / "tools" / "generate_proto.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_descriptor_is_that_of_the_source(tool, tmp_path):
    path = tmp_path / "set.pb"
    tool.run_protoc(f"--descriptor_set_out={path}")
    (expected,) = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    actual = descriptor_pb2.FileDescriptorProto()
    generation_pb2.DESCRIPTOR.CopyToProto(actual)
    assert _without_json_names(expected) == _without_json_names(actual)


def _without_json_names(file: descriptor_pb2.FileDescriptorProto) -> bytes:
    """protoc spells out the JSON names that a descriptor in memory derives."""
    pending = list(file.message_type)
    while pending:
        message = pending.pop()
        pending += message.nested_type
        for field in message.field:
            field.ClearField("json_name")
    return file.SerializeToString()


def test_generated_code_is_committed(tool, tmp_path):
    if version("grpcio-tools") != tool.GENERATOR:
        pytest.skip(f"committed code was written by grpcio-tools {tool.GENERATOR}")
    written = tool.generate(tmp_path)
    assert [path.name for path in written] == [
        "generation_pb2.py",
        "generation_pb2.pyi",
        "generation_pb2_grpc.py",
    ]
    for path in written:
        assert (tool.TARGET / path.name).read_text() == path.read_text(), (
            f"{path.name} is stale: run python tools/generate_proto.py"
        )
