"""The program, as `nestling` and as `python -m nestling`."""

from nestling.stopping import stoppable


def main() -> None:
    """Run the command line. Its imports alone take long enough for people to stop them."""
    with stoppable():
        from nestling.cli import main

        main()


if __name__ == "__main__":
    main()
