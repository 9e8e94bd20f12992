"""Whether Celery's broker answers, and how deep its queues are: asked, not inferred.

The adapter's own answers are no evidence: its ``broker_connected`` stays true when the broker is down, and its
``queue_depths`` are empty on Redis and AMQP alike (``adapter-surface`` 2.11).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from z4j_bare.engines.celery.engine import broker_connection

#: Queues asked for at most; the brain reads 1,024 per heartbeat.
MOST_QUEUES = 100

#: AMQP's reply code; a number from RabbitMQ, a text from kombu's virtual transports such as Redis.
NOT_FOUND = "404"


class BrokerProbe:
    """Keeps one connection of its own, which it renews after any failure.

    :param queues: names the queues to measure; asked each time, because consumers come and go.
    """

    def __init__(self, engine: str, app: Any, queues: Callable[[], Iterable[str]]) -> None:
        self.engine = engine
        self._app = app
        self._queues = queues
        self._connection: Any = None
        self._channel: Any = None

    def __call__(self) -> Mapping[str, str]:
        """Return ``<engine>.broker_connected`` and ``.queue_depths`` or ``.broker_error``. Never raises.

        ``.broker_type`` is kombu's word: ``redis``, ``amqp``, ``sqs``, ``memory``.
        """
        kept = self._channel is not None
        try:
            depths = self._depths()
        except Exception as error:
            self.close()
            if kept:  # what was kept may be older than a broker that has been restarted
                return self()
            # The text may quote the broker's address with its password; the class says enough.
            return self._answer(broker_connected="False", broker_error=type(error).__name__)
        kind = self._connection.transport.driver_type
        return self._answer(
            broker_connected="True",
            broker_error="",
            broker_type=kind,
            queue_depths=json.dumps(depths),
        )

    def close(self) -> None:
        """Drop the connection."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception:
                return

    def _answer(self, **fields: str) -> dict[str, str]:
        return {f"{self.engine}.{name}": value for name, value in fields.items()}

    def _depths(self) -> dict[str, int]:
        if self._connection is None:
            self._connection = broker_connection(self._app, reading=True)
            self._connection.connect()
        names = sorted(set(self._queues()))[:MOST_QUEUES]
        return {name: self._depth(name) for name in names}

    def _depth(self, name: str) -> int:
        if self._channel is None:
            self._channel = self._connection.channel()
        try:
            return int(self._channel.queue_declare(queue=name, passive=True).message_count)
        except self._connection.channel_errors as error:
            if getattr(
                self._channel, "closed", True
            ):  # AMQP's has been; a new one on Redis costs six round trips
                self._channel = None
            if str(getattr(error, "reply_code", "")) == NOT_FOUND:
                return 0  # Redis has no empty lists, so an empty queue is one that does not exist
            raise


def queue_names(app: Any, consumer: Any) -> Callable[[], Iterable[str]]:
    """Return what names the queues: those that this worker consumes, else those that the app declares."""

    def names() -> Iterable[str]:
        task_consumer = getattr(consumer, "task_consumer", None)
        if task_consumer is not None:
            return [queue.name for queue in task_consumer.queues]
        return list(app.amqp.queues)

    return names
