"""Tests of the scan and the convolution run twice: with the kernels, and as if there were none."""

from collections.abc import Iterator

import pytest

from nestling.model.native import library


@pytest.fixture(scope="module", params=["kernels", "torch"])
def each_path(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(library, "library", lambda: None)
        elif library.library() is None:
            pytest.skip("no C++ compiler here")
        yield
