"""Receives what one observer sends, answers as the real receiver does, and counts.

``python bench_sink.py PROTOCOL PORT_FILE [BROKER]`` writes its port to a file when it listens.
``GET /count`` returns how many successful and failed runs of the benchmark's tasks have arrived.
"""

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SUCCEEDS, FAILS = "bench.nap", "bench.fails"

#: Endpoints that the agent of Datadog announces.
DATADOG_INFO = {
    "version": "7.60.0",
    "endpoints": ["/v0.4/traces", "/v0.5/traces", "/telemetry/proxy/"],
    "client_drop_p0s": False,
}


class Counts:
    """The number of runs that have arrived, by the name of the task."""

    def __init__(self):
        self._lock = threading.Lock()
        self._names = dict.fromkeys((SUCCEEDS, FAILS), 0)

    def add(self, name):
        with self._lock:
            if name in self._names:
                self._names[name] += 1

    def to_json(self):
        return json.dumps(
            {"succeeded": self._names[SUCCEEDS], "failed": self._names[FAILS]}
        ).encode()


class OpenTelemetry:
    """OTLP over HTTP: a span ``run/NAME`` for each run."""

    def __init__(self, counts):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        self._request = ExportTraceServiceRequest
        self._counts = counts

    def receive(self, path, body):
        if path == "/v1/traces":
            for resource in self._request.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._counts.add(span.name.removeprefix("run/"))
        return b"", "application/x-protobuf"


class Datadog:
    """The agent of Datadog: a span ``celery.run`` for each run, in one of two formats."""

    def __init__(self, counts):
        import msgpack

        self._unpack = msgpack.unpackb
        self._counts = counts

    def receive(self, path, body):
        answer = {}
        if path == "/info":
            answer = DATADOG_INFO
        elif path == "/v0.4/traces":
            for trace in self._unpack(body):
                for span in trace:
                    self._add(span["name"], span["resource"])
            answer = {"rate_by_service": {"service:,env:": 1}}
        elif path == "/v0.5/traces":
            texts, traces = self._unpack(body, strict_map_key=False)
            for trace in traces:
                for span in trace:  # service, name, resource, ...
                    self._add(texts[span[1]], texts[span[2]])
            answer = {"rate_by_service": {"service:,env:": 1}}
        return json.dumps(answer).encode(), "application/json"

    def _add(self, name, resource):
        if name == "celery.run":
            self._counts.add(resource)


class Sentry:
    """Envelopes: a transaction for each run if it is traced, and an event for each failure."""

    def __init__(self, counts):
        self._counts = counts

    def receive(self, _path, body):
        header, _, rest = body.partition(b"\n")
        while rest.strip():
            line, _, rest = rest.partition(b"\n")
            item = json.loads(line)
            length = item.get("length", rest.find(b"\n") if b"\n" in rest else len(rest))
            payload, rest = rest[:length], rest[length + 1 :]
            if item["type"] in ("event", "transaction"):
                name = json.loads(payload).get("transaction")
                if (name == FAILS) == (item["type"] == "event"):
                    self._counts.add(name)
        answer = {"id": json.loads(header or b"{}").get("event_id", "")}
        return json.dumps(answer).encode(), "application/json"


class CeleryEvents:
    """Celery's own events, read from the broker as Flower reads them."""

    def __init__(self, counts, broker):
        from celery import Celery

        self._counts = counts
        self._names = {}
        self._app = Celery("sink", broker=broker)
        threading.Thread(target=self._capture, daemon=True).start()

    def _capture(self):
        with self._app.connection_for_read() as connection:
            handlers = {
                "task-received": self._remember,
                "task-succeeded": self._count,
                "task-failed": self._count,
            }
            receiver = self._app.events.Receiver(connection, handlers)
            receiver.capture(limit=None, timeout=None, wakeup=False)

    def _remember(self, event):
        self._names[event["uuid"]] = event["name"]

    def _count(self, event):
        self._counts.add(self._names.pop(event["uuid"], ""))

    def receive(self, _path, _body):
        return b"", "text/plain"


PROTOCOLS = {
    "opentelemetry": OpenTelemetry,
    "ddtrace": Datadog,
    "sentry": Sentry,
    "events": CeleryEvents,
}


def handler_of(receiver, counts):
    """Return the class that handles HTTP requests to ``receiver``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            body = self._body()
            if self.path == "/count":
                self._answer(counts.to_json(), "application/json")
            else:
                self._answer(*receiver.receive(self.path.partition("?")[0], body))

        do_POST = do_PUT = do_GET  # noqa: N815 - the names that the base class calls

        def _body(self):
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                body = b"".join(parts)
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self, body, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments):
            """Log no requests."""

    return Handler


def main(protocol, port_file, *broker):
    counts = Counts()
    receiver = PROTOCOLS[protocol](counts, *broker)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(receiver, counts))
    unfinished = Path(f"{port_file}.tmp")
    unfinished.write_text(str(server.server_port))
    unfinished.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
