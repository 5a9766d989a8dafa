"""Tests of whole layers run twice: with the kernels, and as if there were none. Memory and threads for kernels."""

from collections.abc import Iterator

import pytest
import torch

from nestling.model.native import library


@pytest.fixture(scope="module", params=["kernels", "torch"])
def each_path(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(library, "library", lambda: None)
        elif library.library() is None:
            pytest.skip("no C++ compiler here")
        yield


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
