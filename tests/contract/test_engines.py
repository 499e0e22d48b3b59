"""The contract's cases on the engines that are not ours: ONNX Runtime and IBM FMS."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.contract.cases import flags
from tests.contract.test_contract import (
    FILES,
    Served,
    in_batch,
    run_all_at_once,
    run_in_batch,
    run_shuffled,
)
from tests.kit.client import connect
from tests.kit.server import run_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Combination(NamedTuple):
    """An engine and a case file."""

    engine: str
    library: str
    extra: str
    file: str


COMBINATIONS = [
    Combination("hf_optimum_ort", "onnxruntime", "ort", "demo"),
    Combination("hf_optimum_ort", "onnxruntime", "ort", "tiny-t5"),
    Combination("ibm_fms", "fms", "fms", "demo"),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda one: f"{one.engine}-{one.file}")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    asked: Combination = request.param
    pytest.importorskip(asked.library, reason=f"the extra tgis[{asked.extra}] is not installed")
    file = FILES[asked.file]
    model = file.model(tmp_path_factory.mktemp(asked.file))
    if model is None:
        pytest.skip(f"the model {file.content['model']} is not here")
    if asked.engine == "hf_optimum_ort":
        model = exported(model, tmp_path_factory.mktemp("onnx") / "model")
    with run_server(model, *flags(file.limits), "--deployment-framework", asked.engine) as server:
        assert f"engine {asked.engine}" in server.log()
        yield Served(file, server)


def exported(source: Path, target: Path) -> Path:
    from tests.engines.onnx_files import export

    torch.set_num_threads(1)
    export(source, target)
    return target


async def test_all_at_once_and_shuffled(served: Served) -> None:
    await run_all_at_once(served)


async def test_inside_batches(served: Served) -> None:
    requests = [(case, in_batch(case)) for case in served.file.cases]
    async with connect(served.server.grpc) as client:
        await run_shuffled(
            [run_in_batch(client, case, request) for case, request in requests if request]
        )
