"""Sets up a monitoring library in the worker as its documentation describes it."""

import os

from celery import signals


def set_up(name):
    """Set up the library ``name``. It sends to the address in ``BENCH_SINK``."""
    SET_UPS[name](os.environ["BENCH_SINK"])


def opentelemetry(sink):
    """Export spans in batches over HTTP.

    A prefork worker sets the exporter up in each child, because the exporter has a thread. In the
    other pools it is set up at once, because they do not send the signal of a child's start.
    """
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    def instrument(**_signal):
        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"{sink}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        CeleryInstrumentor().instrument()

    if os.environ["BENCH_POOL"] == "prefork":
        signals.worker_process_init.connect(instrument, weak=False)
    else:
        instrument()


def sentry_errors(sink):
    """Send an event for each failure."""
    _sentry(sink)


def sentry_traces(sink):
    """Send an event for each failure, and a transaction for each run."""
    _sentry(sink, traces_sample_rate=1.0)


def _sentry(sink, **options):
    import sentry_sdk

    address = sink.removeprefix("http://")

    def start(**_signal):
        sentry_sdk.init(dsn=f"http://key@{address}/1", **options)

    signals.celeryd_init.connect(start, weak=False)


SET_UPS = {
    "opentelemetry": opentelemetry,
    "sentry_errors": sentry_errors,
    "sentry_traces": sentry_traces,
}
