"""Makes the command lines of the adapter packages: ``z4j-django``, ``z4j-celery`` and so on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from z4j_bare.cli import configuration
from z4j_bare.cli.arguments import Parser
from z4j_bare.cli.main import USAGE_ERROR, main
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics.result import ProbeResult, failed, passed, warned

Main = Callable[..., int]

#: Commands of an engine adapter's command line. Commands that need an agent are left out.
_ENGINE_COMMANDS = {
    "doctor": "check that the adapter and its task queue are installed",
    "check": "the same as doctor",
    "status": "the same as doctor",
    "version": "print the adapter's version",
}


def make_main_for_adapter(adapter_id: str) -> Main:
    """Return the ``main(argv=None)`` of a framework adapter.

    This ``main`` has the commands of ``z4j-bare``. Its commands ``restart`` and ``reload`` select
    only the agents of the adapter, unless ``--adapter`` selects other agents.

    :param adapter_id: name of the framework adapter, such as ``django``.
    """

    def adapter_main(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        selected = any(
            word in ("-a", "--adapter") or word.startswith("--adapter=") for word in words
        )
        if words and words[0] in ("restart", "reload") and not selected:
            words[1:1] = ["--adapter", adapter_id]
        return main(words, prog=f"z4j-{adapter_id}")

    return adapter_main


def make_engine_main(
    engine_id: str,
    *,
    upstream_package: str,
    broker_env: str | None = None,
    upstream_attribute: str | None = None,
) -> Main:
    """Return the ``main(argv=None)`` of an engine adapter.

    This ``main`` checks that the adapter and its task queue are installed, and whether the
    environment names a broker.

    :param engine_id: name of the engine, such as ``celery``.
    :param upstream_package: import name and distribution name of the task queue.
    :param broker_env: environment variable that contains the broker's address. If the variable is
        not set, the check prints a warning.
    :param upstream_attribute: ignored. Adapter packages may pass this argument.
    """
    del upstream_attribute

    def engine_main(argv: Sequence[str] | None = None) -> int:
        parser = _engine_parser(engine_id)
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        if arguments.command is None:
            parser.print_help()
            return USAGE_ERROR
        output = Output(json_only=arguments.json)
        packages = (upstream_package, f"z4j-{engine_id}")
        if arguments.command == "version":
            return _print_version(output, packages)
        return _report(output, [*map(_probe_import, packages), *_probe_broker(broker_env)])

    return engine_main


def _engine_parser(engine_id: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"z4j-{engine_id}", description=f"The z4j adapter for {engine_id}.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _ENGINE_COMMANDS.items():
        configuration.add_json(commands.add_parser(name, help=text))
    return parser


def _probe_import(package: str) -> ProbeResult:
    try:
        import_module(package.replace("-", "_"))
    except Exception as error:
        cause = f"cannot import {package} ({type(error).__name__}: {error})"
        return failed(package, cause, f"pip install {package} in the workers' environment")
    return passed(package, f"{package} {_version(package)}", version=_version(package))


def _probe_broker(variable: str | None) -> Iterator[ProbeResult]:
    if variable and os.environ.get(variable):
        yield passed("broker", f"{variable} is set")
    elif variable:
        fix = f"set {variable}, unless the application configures its broker itself"
        yield warned("broker", f"{variable} is not set", fix)


def _report(output: Output, results: Sequence[ProbeResult]) -> int:
    for result in results:
        output.print_verdict(result.verdict, result.name, result.text, result.fix)
    ok = all(result.ok for result in results)
    probes = [
        {"name": each.name, "ok": each.ok, "message": each.message, "details": each.details}
        for each in results
    ]
    output.print_json({"ok": ok, "probes": probes})
    return 0 if ok else 1


def _print_version(output: Output, packages: tuple[str, str]) -> int:
    """Print one line with the adapter's version, because scripts read the line.

    The JSON object also contains the versions of the task queue and of the agent.
    """
    adapter = packages[1]
    versions = {package: _version(package) for package in (*packages, "z4j-bare")}
    output.print_line(versions[adapter] or f"{adapter} is not installed: pip install {adapter}")
    output.print_json(versions)
    return 0 if versions[adapter] else 1


def _version(package: str) -> str:
    """Return the version of a distribution, or an empty string if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
