"""Tests run on the CPU, also where there is a GPU, which `--device auto` would take; those of test_cuda.py excepted."""

import pytest
import torch


@pytest.fixture(autouse=True)
def without_gpu(request):
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available() and not request.node.name.startswith("test_cuda_"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
        yield
