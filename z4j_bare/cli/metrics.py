"""``z4j-bare metrics``: the metrics of all agents of this host, for Prometheus."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.agents import answers_exit_code, no_agent_text, no_answer_text
from z4j_bare.cli.output import Output
from z4j_bare.errors import HostConfigurationError
from z4j_bare.monitoring.last_metrics import KEEP_SECONDS, read_last
from z4j_bare.monitoring.openmetrics import (
    GONE,
    LIVE,
    SILENT,
    Families,
    Family,
    Snapshot,
    families_of,
    render,
    silent_agent,
    valid_text,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric

EXAMPLES = """\
examples:
  z4j-bare metrics                              print OpenMetrics text
  z4j-bare metrics --output /var/lib/node_exporter/z4j.prom
                                                for node_exporter's textfile collector
  z4j-bare metrics --listen 127.0.0.1:9464      serve http://127.0.0.1:9464/metrics

The workers open no port. The series of an ended worker are shown for five minutes.
exit codes: 0 every agent answered, 1 an agent did not answer or no agent runs, 2 usage
"""

#: Seconds that an agent may need between two parts of its answer.
#: The timeout of a scrape by Prometheus is 10 s.
ANSWER_TIMEOUT = 4.0

#: Maximum number of agents that are queried at the same time.
PARALLEL_QUERIES = 16

#: Name of the file in ``Z4J_HOME`` that keeps the last answers for the next call of the command.
MEMORY_FILE = "metrics-last.json"

#: Version of the layout of :data:`MEMORY_FILE`.
SCHEMA = 1

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``metrics``."""
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--listen",
        type=_address,
        metavar="HOST:PORT",
        help="serve the metrics over HTTP until interrupted (needs z4j-bare[metrics])",
    )
    target.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="replace this file in one step, instead of printing",
    )
    configuration.add_agents(parser)
    parser.set_defaults(worker=None)  # ``no_agent_text`` reads it


def run(arguments: argparse.Namespace) -> int:
    """Print or serve the metrics; return 0 if every selected agent has answered, else 1."""
    configuration.open_home(arguments)
    if arguments.listen:
        return serve(arguments)
    path = configuration.home() / MEMORY_FILE
    memory = Memory(_read_memory(path))
    everyone = query()
    now = time.time()
    memory.add(read_last(configuration.home(), now))
    families = memory.families(everyone, now, arguments.adapter)
    answers = [each for each in everyone if arguments.adapter in (None, each["adapter"])]
    with suppress(OSError):  # if this fails, the next call shows no ended workers
        _replace(path, json.dumps({"schema": SCHEMA, "answers": memory.entries()}))
    code = answers_exit_code(answers)
    if arguments.json:
        Output(json_only=True).print_json(
            {"ok": code == 0, "home": str(configuration.home()), "agents": answers}
        )
    elif arguments.output:
        _write(arguments.output, render(families))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(render(families).encode())
        sys.stdout.buffer.flush()
    _report(arguments, answers)
    return code


def query() -> list[Answer]:
    """Return the answer of each agent; the answer of a failed request has ``error``."""
    with ThreadPoolExecutor(PARALLEL_QUERIES) as pool:
        return control.query(control.METRICS, None, ANSWER_TIMEOUT, pool.map)


class Memory:
    """Remembers the last answer of each agent.

    :param entries: the result of :meth:`entries` of an earlier memory.
    """

    def __init__(self, entries: Iterable[tuple[float, Answer]] = ()) -> None:
        self._known = {_identity(answer): (at, answer) for at, answer in entries}

    def entries(self) -> list[tuple[float, Answer]]:
        """Return the answers, each with the last time at which its process ran."""
        return list(self._known.values())

    def add(self, entries: Iterable[tuple[float, Answer]]) -> None:
        """Remember the answers that processes wrote at their end, in place of earlier answers."""
        self._known |= {_identity(answer): (at, answer) for at, answer in entries}

    def families(
        self, answers: Sequence[Answer], now: float, adapter: str | None = None
    ) -> list[Family]:
        """Return the metrics of agents that have answered, and of remembered agents.

        :param answers: the answers of all agents.
        :param now: seconds since the epoch.
        :param adapter: the framework adapter whose agents are shown; ``None`` for all.
        """
        failed = {(each["adapter"], each["pid"]) for each in answers if "error" in each}
        answered = {_identity(each): (now, each) for each in answers if "error" not in each}
        snapshots = [Snapshot(answer, LIVE) for _, answer in answered.values()]
        for identity, (at, answer) in list(self._known.items()):
            if identity in answered:
                continue
            if identity[:2] in failed:
                snapshots.append(Snapshot(answer, SILENT))
                self._known[identity] = (now, answer)
                failed.discard(identity[:2])
            elif now - at <= KEEP_SECONDS:
                snapshots.append(Snapshot(answer, GONE))
            else:
                del self._known[identity]
        self._known |= answered
        shown = [each for each in snapshots if adapter in (None, each.answer["adapter"])]
        families = Families({family.name: family for family in families_of(shown)})
        for name, pid in sorted(failed):  # agents that have never answered
            if adapter in (None, name):
                families.gauge("z4j_agent_up", silent_agent(name, pid), 0)
        return list(families.values())


class Collector:
    """Collects the metrics for ``prometheus_client`` at each scrape."""

    def __init__(self, adapter: str | None) -> None:
        self._adapter = adapter
        self._memory = Memory()
        self._lock = threading.Lock()  # each request has a thread of its own

    def collect(self) -> Iterator[Metric]:
        """Query the agents and yield the families."""
        from prometheus_client.core import Metric

        with self._lock:
            answers, now = query(), time.time()
            self._memory.add(read_last(configuration.home(), now))
            families = self._memory.families(answers, now, self._adapter)
        for family in families:
            metric = Metric(family.name, family.help, family.type)
            for suffix, labels, value in family.samples:
                valid = {key: valid_text(text) for key, text in labels.items()}
                metric.add_sample(f"{family.name}{suffix}", valid, value)
            yield metric

    def describe(self) -> list[Metric]:
        """Return no families, so that registering the collector does not query the agents."""
        return []


def serve(arguments: argparse.Namespace) -> int:
    """Serve the metrics until SIGINT or SIGTERM.

    :raises HostConfigurationError: ``prometheus_client`` is missing, or the address is not free.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise HostConfigurationError(
            "--listen needs the package prometheus_client: run pip install 'z4j-bare[metrics]'"
        ) from None
    host, port = arguments.listen
    registry = CollectorRegistry()
    registry.register(Collector(arguments.adapter))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise HostConfigurationError(
            f"cannot listen on --listen {host}:{port}: {error.strerror or error}"
        ) from None
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    print(
        f"serving the metrics of the agents of Z4J_HOME={configuration.home()}"
        f" at http://{host}:{server.server_port}/metrics",
        flush=True,
    )
    try:
        stopped.wait()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return 0


def _report(arguments: argparse.Namespace, answers: Sequence[Mapping[str, Any]]) -> None:
    """Write to stderr which agents have not answered."""
    if not answers:
        print(no_agent_text(arguments), file=sys.stderr)
    for each in answers:
        if "error" in each:
            print(no_answer_text(each), file=sys.stderr)


def _identity(answer: Mapping[str, Any]) -> tuple[str, int, float]:
    return answer["adapter"], answer["pid"], answer["created"]


def _read_memory(path: Path) -> list[tuple[float, Answer]]:
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA:
            return []
        return [(float(at), dict(answer)) for at, answer in document["answers"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _write(path: Path, text: str) -> None:
    try:
        _replace(path, text, mode=0o644)  # node_exporter runs as another user
    except OSError as error:
        raise HostConfigurationError(f"cannot write --output {path}: {error.strerror}") from None


def _replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step. A reader sees either the old or the new text."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - TCP's limit
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]"), int(port)
