"""The program, as `nestling` and as `python -m nestling`."""

import gc

from nestling.stopping import stoppable


def main() -> None:
    """Run the command line. Its imports alone take long enough for people to stop them."""
    try:
        with stoppable():
            from nestling.cli import main

            main()
    finally:
        gc.freeze()  # what imports made is not looked through once more at the end: 20 ms


if __name__ == "__main__":
    main()
