"""A model on a device that is not the CPU, with a stand-in where there is no GPU: on_a_device.py in its own process."""

import subprocess
import sys
from pathlib import Path


def test_nothing_is_made_on_the_wrong_device() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "on_a_device.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-8000:]
