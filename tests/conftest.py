"""A quiet oracle, one hypothesis profile, and directories to work in."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
_MODULES = tempfile.TemporaryDirectory(prefix="nestling-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name  # where transformers copies the code of checkpoints: not the user's
torch.set_num_threads(1)  # the models are tiny: a second thread only waits

settings.register_profile(
    "nestling",
    deadline=None,
    derandomize=True,
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],  # the examples are small, and making them smaller takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nestling")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=["kernels", "torch"])
def each_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Twice: with the kernels, and as if there were none."""
    from nestling.model.native import library

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(library, "library", lambda: None)
            patch.setenv(library.SWITCH, "off")
        elif library.library() is None:
            pytest.skip("no C++ compiler here")
        yield request.param


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a new empty directory at each call: one per hypothesis example."""
    return lambda: tmp_path_factory.mktemp("model")
