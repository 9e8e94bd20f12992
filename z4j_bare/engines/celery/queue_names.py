"""Finds the name of the queue that a message came from."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer
    from kombu import Exchange, Queue

#: Maximum number of cached routes. A route is an exchange and a routing key.
MAX_ROUTES = 4096

#: Removes the 28 bits that kombu's native delayed delivery puts before the original routing key.
#: A message that waits for a countdown in one of RabbitMQ's quorum queues has such a key.
_strip_delay = partial(re.compile(r"^(?:[01]\.){28}").sub, "", count=1)


def routing_key(info: object) -> str | None:
    """Return a message's routing key, which a process without a consumer reports as the queue.

    :param info: ``Request.delivery_info``.
    """
    name = info.get("routing_key") if isinstance(info, dict) else None
    return _strip_delay(str(name)) if name else None


class QueueNames:
    """Finds the queue of a message among the worker's queues.

    A message contains its exchange and its routing key, but not its queue. By default, the routing
    key is the queue's name.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._known: dict[tuple[object, object], str] = {}

    def of(self, info: object) -> str | None:
        """Return the queue's name, or ``None`` if it is unknown.

        :param info: ``Request.delivery_info``.
        """
        if not isinstance(info, dict):
            return None
        route = info.get("exchange"), info.get("routing_key")
        return self._known.get(route) or self._find(route)

    def _find(self, route: tuple[object, object]) -> str | None:
        exchange, key = str(route[0] or ""), str(route[1] or "")
        if not exchange and key:  # the default exchange routes by the queue's name
            return self._add(route, key)
        consumer = getattr(self._consumer, "task_consumer", None)
        queues = list(getattr(consumer, "queues", ()))
        original = _strip_delay(key)
        if original != key:  # the exchange belongs to kombu and identifies no queue
            names = [queue.name for queue in queues if _has_key(queue, original)]
        else:
            names = [queue.name for queue in queues if _is_bound(queue, exchange, key)]
        key = original
        if len(names) == 1:
            return self._add(route, names[0])
        candidates = names or [queue.name for queue in queues]
        if len(candidates) == 1 or key in candidates:
            return self._add(route, key if key in candidates else candidates[0])
        return None

    def _add(self, route: tuple[object, object], name: object) -> str:
        if len(self._known) >= MAX_ROUTES:
            self._known.clear()
        self._known[route] = str(name)
        return str(name)


def _is_bound(queue: Queue, exchange: str, key: str) -> bool:
    return any(
        source is not None and source.name == exchange and _routes(source, pattern or "", key)
        for source, pattern in _bindings(queue)
    )


def _has_key(queue: Queue, key: str) -> bool:
    # Native delayed delivery does not support direct exchanges.
    return any(
        source is not None and source.type == "topic" and _routes(source, pattern or "", key)
        for source, pattern in _bindings(queue)
    )


def _bindings(queue: Queue) -> list[tuple[Exchange | None, str | None]]:
    own = [(queue.exchange, queue.routing_key)]
    return own + [(each.exchange, each.routing_key) for each in queue.bindings or ()]


def _routes(exchange: Exchange, pattern: str, key: str) -> bool:
    if exchange.type in {"fanout", "headers"}:
        return True
    if exchange.type == "topic":
        words = re.escape(pattern).replace(r"\*", r"[^.]+").replace(r"\.\#", r"(\..*)?")
        return re.fullmatch(words.replace(r"\#", ".*"), key) is not None
    return pattern == key
