"""The program, as `nestling` and as `python -m nestling`."""

import gc

from nestling.stopping import stoppable


def main() -> None:
    """Run the command line. Its imports alone take long enough for people to stop them."""
    gc.set_threshold(10_000, 20, 20)  # what imports make stays: to look through it again and again takes 25 ms
    try:
        with stoppable():
            from nestling.cli import main

            main()
    finally:
        gc.freeze()  # nor is it looked through at the end: 20 ms


if __name__ == "__main__":
    main()
