"""Finds the name of the queue that a message came from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer
    from kombu import Exchange, Queue

#: Maximum number of cached routes. A route is an exchange and a routing key.
MAX_ROUTES = 4096


def routing_key(info: object) -> str | None:
    """Return the routing key of a message. A process without a consumer reports it as the queue.

    :param info: ``Request.delivery_info``.
    """
    name = info.get("routing_key") if isinstance(info, dict) else None
    return str(name) if name else None


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
        names = [queue.name for queue in queues if _is_bound(queue, exchange, key)]
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
    bindings = [(queue.exchange, queue.routing_key)]
    bindings += [(each.exchange, each.routing_key) for each in queue.bindings or ()]
    return any(
        source is not None and source.name == exchange and _routes(source, pattern or "", key)
        for source, pattern in bindings
    )


def _routes(exchange: Exchange, pattern: str, key: str) -> bool:
    if exchange.type in {"fanout", "headers"}:
        return True
    if exchange.type == "topic":
        words = re.escape(pattern).replace(r"\*", r"[^.]+").replace(r"\.\#", r"(\..*)?")
        return re.fullmatch(words.replace(r"\#", ".*"), key) is not None
    return pattern == key
