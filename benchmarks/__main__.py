"""``python -m benchmarks NAME [options]``."""

from __future__ import annotations

import importlib
import signal
import sys

from z4j_bare.cli.arguments import Parser
from z4j_bare.demo.process import HarnessError

#: Every benchmark is a module with ``add_arguments(parser)`` and ``run(args)``. The module's
#: docstring is the help text.
NAMES = (
    "host",
    "observers",
    "inspection",
    "hot",
    "ingest",
    "burst",
    "crash",
    "soak",
    "parity",
    "fleet",
)


def main() -> int:
    """Run one benchmark.

    Return 0 if it ran to its end, 1 if it failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="|".join(NAMES))
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        title = str(module.__doc__).split("\n", 1)[0]
        module.add_arguments(names.add_parser(name, help=title, description=module.__doc__))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        importlib.import_module(f"benchmarks.{args.name}").run(args)
    except HarnessError as error:
        print(f"benchmarks {args.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"benchmarks {args.name}: interrupted, everything is stopped", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"benchmarks {args.name}: terminated, everything is stopped", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


class _Terminated(BaseException):
    """Raised on SIGTERM, so that brain, broker and workers are stopped as after Ctrl-C."""


def _terminate(*_args: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another SIGTERM must not interrupt the stop
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
