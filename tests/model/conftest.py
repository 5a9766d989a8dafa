"""Memory and threads for kernels."""

from collections.abc import Iterator

import pytest
import torch


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
