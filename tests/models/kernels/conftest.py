import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from tgis.models.kernels import build

RUNNABLE = build.TARGETS[build.TARGETS.index(build.cpu_target()) :]


# The best, and what the least of machines get; those between are compiled from the same lines.
USUAL = {RUNNABLE[0].name, "avx2", "generic"}


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(target, id=target.name, marks=[] if target.name in USUAL else pytest.mark.slow)
        for target in RUNNABLE
    ],
)
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModuleType]:
    """`kernels.native`, bound to the library for each target that this CPU runs."""
    directory = tmp_path_factory.mktemp("kernels")
    try:
        path = build.compile_library(directory, request.param)
    except build.BuildError as error:
        pytest.skip(str(error))
    found = importlib.util.find_spec("tgis.models.kernels.native")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"native_{request.param.name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "find_or_compile", lambda: path)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; one unless called, as waiting for threads is slow when busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(len(request.node.name))
