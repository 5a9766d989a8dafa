"""What every refusal has in common."""

from collections.abc import Callable

import pytest

from nestling.errors import NestlingError


def refused(call: Callable[[], object], *words: object) -> str:
    """`call` raises NestlingError with one line that has these words; the line."""
    with pytest.raises(NestlingError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message
