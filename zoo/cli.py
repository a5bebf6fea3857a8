"""What every tool does around its work."""
import sys
from collections.abc import Callable

from zoo.errors import InputError


def run(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main` and ends the process: an `InputError` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
