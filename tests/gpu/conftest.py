"""Tests that need a CUDA device, marked `gpu`; elsewhere they are skipped."""

import pytest
import torch

HERE = "tests/gpu/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs a CUDA device that PyTorch can use")
    for item in items:
        if HERE in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)
