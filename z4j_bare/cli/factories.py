"""The command lines of the adapters, ``z4j-django``, ``z4j-celery`` and so on, made of ours."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from z4j_bare.cli.main import main
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics.result import ProbeResult, failed, passed, warned

Main = Callable[..., int]

#: Commands of an engine's command line; the others need an agent, which an engine is not.
_ENGINE_COMMANDS = {
    "doctor": "see whether the adapter and its task queue are installed",
    "check": "the same",
    "status": "the same",
    "version": "print the versions",
}


def make_main_for_adapter(adapter_id: str) -> Main:
    """Return ``main(argv=None)`` of a framework adapter: ``z4j-bare`` by another name, whose restart means its agents."""

    def adapter_main(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        named = any(word in ("-a", "--adapter") or word.startswith("--adapter=") for word in words)
        if words and words[0] in ("restart", "reload") and not named:
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
    """Return ``main(argv=None)`` of an engine adapter, which sees whether both packages are there and a broker is named.

    :param upstream_package: the task queue's package, import name and distribution.
    :param broker_env: variable with the broker's address; a missing one is only mentioned.
    :param upstream_attribute: accepted, because adapters may pass it; nothing depends on it.
    """
    del upstream_attribute

    def engine_main(argv: Sequence[str] | None = None) -> int:
        parser = _engine_parser(engine_id)
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        if arguments.command is None:
            parser.print_help()
            return 2
        output = Output(machine=arguments.json)
        packages = (upstream_package, f"z4j-{engine_id}")
        if arguments.command == "version":
            return _versions(output, packages)
        return _report(output, [*map(_importable, packages), *_broker(broker_env)])

    return engine_main


def _engine_parser(engine_id: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"z4j-{engine_id}", description=f"The z4j adapter for {engine_id}."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _ENGINE_COMMANDS.items():
        commands.add_parser(name, help=text).add_argument(
            "--json", action="store_true", help="one JSON object"
        )
    return parser


def _importable(package: str) -> ProbeResult:
    try:
        import_module(package.replace("-", "_"))
    except Exception as error:
        cause = f"{package} cannot be imported ({type(error).__name__}: {error})"
        return failed(
            package, cause, f"pip install {package}, in the environment that the workers use"
        )
    return passed(package, f"{package} {_version(package)}", version=_version(package))


def _broker(variable: str | None) -> Iterator[ProbeResult]:
    if variable and os.environ.get(variable):
        yield passed("broker", f"{variable} is set")
    elif variable:
        yield warned(
            "broker",
            f"{variable} is not set",
            "nothing, if the application configures its broker itself",
        )


def _report(output: Output, results: Sequence[ProbeResult]) -> int:
    for result in results:
        output.mark(result.verdict, result.name, result.text, result.fix)
    good = all(result.ok for result in results)
    probes = [
        {"name": each.name, "ok": each.ok, "message": each.message, "details": each.details}
        for each in results
    ]
    output.answer({"ok": good, "probes": probes})
    return 0 if good else 1


def _versions(output: Output, packages: Sequence[str]) -> int:
    found = {package: _version(package) for package in (*packages, "z4j-bare")}
    for name, number in found.items():
        output.say(f"{name} {number or 'not installed'}")
    output.answer(found)
    return 0 if all(found.values()) else 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
