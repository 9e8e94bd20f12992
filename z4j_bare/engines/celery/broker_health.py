"""Checks whether Celery's broker is reachable, and measures the depths of the queues.

The adapter's ``get_health`` is not used: its ``broker_connected`` stays true while the broker is
down, and its ``queue_depths`` are empty on both Redis and AMQP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from z4j_bare.engines.celery.broker_errors import causes
from z4j_bare.engines.celery.engine import broker_connection, open_connection
from z4j_bare.wire.fit import fit_name

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker.consumer import Consumer
    from kombu import Connection
    from kombu.transport.virtual import Channel

#: Maximum number of queues whose depth a probe measures.
#: The brain reads at most 1,024 queues from a heartbeat.
MAX_QUEUES = 100

#: Seconds after which a request of a probe fails. A probe with a broken connection makes up to
#: three requests. Short requests let the probe report soon that the broker is back.
MAX_WAIT = 2.0

#: Seconds by which a reply of Redis may be late before :class:`BrokerProbe` checks the broker.
MAX_SILENCE = 2.0

#: Seconds by which a reply may be late before the worker's connection counts as broken, although
#: the broker answers a probe.
BROKEN_AFTER = 10.0

#: The error that is reported for a broken connection of the worker.
BROKEN = "no reply on the worker's own connection; if this lasts, restart the worker"

#: AMQP's reply code for a missing queue.
#: RabbitMQ sends the code as a number, kombu's virtual transports (such as Redis) as text.
NOT_FOUND = "404"


class BrokerProbe:
    """Probes the broker over a separate connection. A failed connection is replaced.

    A worker whose own connection is broken runs no tasks. The probe reports the broker of such
    a worker as not connected, although the broker answers. Celery 5.7 replaces a broken connection
    after a minute in prefork, and never in gevent, eventlet and threads.

    :param queues: returns the names of the queues to measure. Each probe calls this function,
        because the queues can change.
    :param silence: returns by how many seconds a reply on the worker's own connection is late.
    """

    def __init__(
        self,
        engine: str,
        app: Celery,
        queues: Callable[[], Iterable[str]],
        silence: Callable[[], float] = float,
    ) -> None:
        self.engine = engine
        #: Whether the broker answered the last probe.
        self.connected = True
        self._app = app
        self._queues = queues
        self._silence = silence
        self._connection: Connection | None = None
        self._channel: Channel | None = None

    def __call__(self) -> Mapping[str, str]:
        """Return ``<engine>.broker_connected`` and other entries for the heartbeat.

        ``.broker_error`` is the class of the error, or empty. If the broker is reachable, the
        result also contains ``.queue_depths`` and ``.broker_type``, kombu's name of the transport:
        ``redis``, ``amqp``, ``sqs`` or ``memory``. Does not raise.
        """
        reused = self._channel is not None
        try:
            connection = self._connect()
            depths = {
                name: depth
                for name in sorted(set(self._queues()))[:MAX_QUEUES]
                if (depth := self._depth(connection, name)) is not None
            }
        except Exception as error:
            self.close()
            if reused:  # the broker may have been restarted since the channel was opened
                return self()
            return self.failed(error)
        if self._silence() > BROKEN_AFTER:
            self.connected = False
            return self._entries(broker_connected="False", broker_error=BROKEN)
        self.connected = True
        return self._entries(
            broker_connected="True",
            broker_error="",
            broker_type=connection.transport.driver_type,
            queue_depths=json.dumps({fit_name(name): depth for name, depth in depths.items()}),
        )

    def failed(self, error: Exception) -> Mapping[str, str]:
        """Return the heartbeat's entries for a probe that failed with ``error``."""
        self.connected = False
        return self._entries(broker_connected="False", broker_error=describe_cause(error))

    def close(self) -> None:
        """Close the connection. Does not raise."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception:
                return

    def _entries(self, **fields: str) -> dict[str, str]:
        return {f"{self.engine}.{name}": value for name, value in fields.items()}

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = broker_connection(self._app, reading=True)
            open_connection(self._connection, MAX_WAIT)
        return self._connection

    def _depth(self, connection: Connection, name: str) -> int | None:
        """Return the number of messages in a queue, ``None`` if the broker refuses the request.

        RabbitMQ refuses the request if the queue is exclusive to another connection, or if the user
        has no permission for the queue.
        """
        channel = self._channel = self._channel or connection.channel()
        try:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
        except connection.channel_errors as error:
            # After an error, AMQP closes the channel. Redis keeps the channel open. An open channel
            # is used again, because a new channel costs six round trips.
            if getattr(channel, "closed", True):
                self._channel = None
            if str(getattr(error, "reply_code", "")) == NOT_FOUND:
                return 0  # Redis deletes an empty list, so an empty queue does not exist
            return None


class ConsumerWatch:
    """Reads the state of a worker's connection to detect a broker that is down. Sends nothing.

    :param consumer: the Consumer of this process's worker; ``None`` outside a worker.
    """

    def __init__(self, consumer: Consumer | None) -> None:
        self._consumer = consumer

    def in_trouble(self) -> bool:
        """Return whether the worker has lost its connection, or waits too long for a reply.

        Celery sets the worker's ``connection`` to ``None`` as soon as the connection fails.
        """
        if self._consumer is None or not hasattr(self._consumer, "connection"):
            return False  # there is no Consumer, or it has not started
        return self._consumer.connection is None or self.silence() > MAX_SILENCE

    def silence(self) -> float:
        """Return by how many seconds a reply to the worker is late; 0 if this is unknown.

        On Redis a worker always has a request open, and Redis replies within ``brpop_timeout``.
        Only kombu 5.7 and later store the time of the request.
        """
        connection = getattr(self._consumer, "connection", None)
        # ``connection.transport`` would connect if the connection has no transport.
        channels = getattr(getattr(connection, "_transport", None), "channels", None) or ()
        return max(map(_late_by, list(channels)), default=0.0)


def _late_by(channel: Channel) -> float:
    sent_at = getattr(channel, "_brpop_sent_at", None)
    if not sent_at or not getattr(channel, "_in_poll", None):
        return 0.0
    allowed = getattr(channel, "brpop_timeout", None) or 0.0
    return max(0.0, float(monotonic() - sent_at - allowed))


def describe_cause(error: BaseException) -> str:
    """Return the class of the operating system's error, or else of the error that kombu wraps.

    A reply code of AMQP is added.
    The error's text is omitted, because it may contain the broker's password.
    """
    chain = causes(error)
    system_errors = (each for each in chain if isinstance(each, OSError))
    unwrapped = next((each for each in chain if not _is_wrapper(each)), error)
    found: BaseException = next(system_errors, None) or unwrapped
    code = getattr(found, "reply_code", None)
    return f"{type(found).__name__} {code}" if code else type(found).__name__


def _is_wrapper(error: BaseException) -> bool:
    return type(error).__module__.startswith("kombu.") and error.__cause__ is not None


def queue_names(app: Celery, consumer: Consumer | None) -> Callable[[], Iterable[str]]:
    """Return a function for the names of the worker's queues; without ``consumer``, the app's."""

    def names() -> Iterable[str]:
        task_consumer = getattr(consumer, "task_consumer", None)
        if task_consumer is not None:
            return [queue.name for queue in task_consumer.queues]
        return list(app.amqp.queues)

    return names
