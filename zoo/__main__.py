"""The command: `zoo …`, or `python -m zoo …`."""
from zoo.tools._cli import command


def main() -> None:
    command()


if __name__ == "__main__":
    main()
