"""What every tool does around its work."""
import os
import sys
from collections.abc import Callable

from zoo.errors import InputError


def run(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main` and ends the process: an `InputError` becomes one line on stderr and exit status 2."""
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
