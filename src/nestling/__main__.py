"""The program, as `nestling` and as `python -m nestling`."""

import gc

from nestling.stopping import stoppable


def main() -> None:
    """Run the command line. Its imports alone take long enough for people to stop them."""
    gc.set_threshold(10_000, 20, 20)  # what imports make stays: to look through it again and again takes 25 ms
    with stoppable():
        from nestling.cli import main

        main()


if __name__ == "__main__":
    main()
