"""Connects one engine adapter, reads the adapter's events and health, and runs commands."""

from __future__ import annotations

import inspect
import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_core.redaction.engine import RedactionEngine
from z4j_core.transport.frames import RETRY_BY_REFERENCE_CAPABILITY

from z4j_bare.engines.engine import describe_engine
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from z4j_core.models import Event
    from z4j_core.protocols import QueueEngineAdapter

    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.controls import CeleryControls
    from z4j_bare.interfaces import IProcessRestart

logger = logging.getLogger("z4j.runtime.engines.host")

#: Timeout of ``connect_signals`` in seconds. The method may publish to a broker or start a thread.
CONNECT_TIMEOUT = 30.0

#: Names of the adapters' attributes that hold an ``asyncio.Queue``.
#: An adapter creates these queues once. A queue belongs to the first loop that waits for an item.
_QUEUES = ("_event_queue", "_registry_delta_queue")


class EngineHost:
    """Runs one engine adapter. Every method of an adapter except ``capabilities`` is optional.

    :param sink: receives the events of the adapter's stream.
    """

    def __init__(
        self,
        adapter: QueueEngineAdapter,
        bridge: Bridge,
        backend: BaseConcurrency,
        sink: Callable[[Event], object],
    ) -> None:
        self.adapter = adapter
        self.description = describe_engine(adapter)
        self.name = str(getattr(adapter, "name", type(adapter).__name__))
        self._bridge = bridge
        self._backend = backend
        self._sink = sink
        self._controls: CeleryControls | None = None
        #: Restarts the worker by ending its process. ``None`` if the worker can be restarted in
        #: another way, or not at all.
        self.process_restart: IProcessRestart | None = None
        redaction = getattr(adapter, "redaction", None)
        #: Redacts results with the adapter's rules.
        self.redactor = Redactor(
            redaction if isinstance(redaction, RedactionEngine) else RedactionEngine()
        )
        self._stop_pump: Callable[[], None] | None = None
        self._health: dict[str, str] = {}
        self._probing = False

    def connect(self, *, events: bool = True) -> None:
        """If ``events``, connect the adapter's signals and pump its events into the sink.

        Never raises. A failure is logged, and does not affect the adapter's commands.
        """
        if not events:
            return
        self._unbind_queues()
        self._connect_signals()
        if self._stop_pump is None and hasattr(self.adapter, "subscribe_events"):
            stream = self.adapter.subscribe_events
            self._stop_pump = self._bridge.pump(stream, self._sink, f"z4j-events-{self.name}")

    def disconnect(self, timeout: float = 5.0) -> None:
        """Disconnect the signals within ``timeout`` seconds, then drain and stop the pump.

        Never raises.
        """
        disconnect = getattr(self.adapter, "disconnect_signals", None)
        try:
            if disconnect is not None:
                self._bridge.call(disconnect, timeout=timeout)
        except Exception:
            logger.warning("z4j: %s did not disconnect its signals", self.name, exc_info=True)
        stop_pump, self._stop_pump = self._stop_pump, None
        if stop_pump is not None:
            stop_pump()

    def capabilities(self) -> list[str]:
        """Return the adapter's current capabilities, which can change while the process runs."""
        names = {str(name) for name in self.adapter.capabilities()}
        if self.retries_by_reference:
            names.add(RETRY_BY_REFERENCE_CAPABILITY)
        if self.process_restart is not None and self.process_restart.is_supervised:
            names.add("restart_worker")
        return sorted(names)

    @property
    def controls(self) -> CeleryControls | None:
        """The agent's own worker controls, or ``None`` if the engine has none.

        The first command creates the controls. They replace the controls of an adapter that does
        not wait for the workers' replies.
        """
        if self._controls is None:
            self._controls = self.description.make_controls(self._backend)
        return self._controls

    @property
    def retries_by_reference(self) -> bool:
        """Whether the adapter guarantees that no retry uses the brain's redacted arguments."""
        return getattr(self.adapter, "safe_retry_by_reference", None) is True

    @property
    def retry_problem(self) -> str:
        """Why the adapter cannot retry a task safely; empty if it can."""
        return self.description.retry_problem()

    def has_method(self, name: str) -> bool:
        """Return whether the adapter has a method of this name."""
        return callable(getattr(self.adapter, name, None))

    def health(self, timeout: float = 5.0) -> dict[str, str]:
        """Return ``<engine>.<key>`` entries for the heartbeat within ``timeout`` seconds.

        A failed check returns the entry ``<engine>.error``. A check may continue after the timeout:
        the check of Celery's adapter takes 10 s if the worker does not reply. Until that check
        ends, calls return the entries of the previous check.
        """
        if not hasattr(self.adapter, "get_health"):
            return {}
        try:
            if not self._probing:
                self._bridge.call(self._probe, timeout=timeout)
        except TimeoutError:
            logger.debug("z4j: the health check of %s takes longer than %g s", self.name, timeout)
        except Exception as error:
            logger.debug("z4j: the health check of %s failed: %s", self.name, error)
            self._health = {}
        return self._health or {f"{self.name}.error": "health check failed"}

    def dropped(self) -> int:
        """Return how many events the adapter itself has lost."""
        try:
            return int(getattr(self.adapter, "dropped_event_count", 0))
        except Exception:
            return 0

    def invoke(
        self,
        method_name: str,
        *args: object,
        timeout: float,
        hints: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> Any:
        """Call a method of the adapter once and return its result.

        A keyword that the method does not accept is omitted if the keyword is ``None`` or in
        ``hints``. Other unaccepted keywords and a missing method raise ``CommandError``. Raises
        ``TimeoutError`` after ``timeout`` seconds, and every exception of the adapter.
        """
        method = getattr(self.adapter, method_name, None)
        if not callable(method):
            raise CommandError(f"engine {self.name} does not support {method_name}")
        accepted = supported_kwargs(method, {**kwargs, **(hints or {})})
        refused = [
            key for key, value in kwargs.items() if value is not None and key not in accepted
        ]
        if refused:
            raise CommandError(
                f"engine {self.name} does not support {method_name} with {' and '.join(refused)}"
            )
        return self._bridge.call(partial(method, *args, **accepted), timeout=timeout)

    def control(self, action: str, *args: object, timeout: float, **kwargs: object) -> Any:
        """Call the method ``action`` of :attr:`controls` with ``seconds=timeout``."""
        method = getattr(self.controls, action)
        return self._bridge.call(partial(method, *args, seconds=timeout, **kwargs), timeout=timeout)

    def _connect_signals(self) -> None:
        connect = getattr(self.adapter, "connect_signals", None)
        if connect is None:
            return
        keywords = supported_kwargs(connect, {"loop": self._bridge.loop()})
        try:
            self._bridge.call(partial(connect, **keywords), timeout=CONNECT_TIMEOUT)
        except Exception:
            logger.warning(
                "z4j: %s did not connect its signals: its events are missing, its commands work",
                self.name,
                exc_info=True,
            )

    def _unbind_queues(self) -> None:
        """Unbind the adapter's queues from the loop of an earlier agent or of the parent process.

        Each queue's list of waiting getters is also emptied. If a getter of the old loop stayed,
        the first item would wake this getter instead of the new loop's getter.
        """
        for name in _QUEUES:
            queue = getattr(self.adapter, name, None)
            if getattr(queue, "_loop", None) not in (None, self._bridge.loop()):
                queue._loop = None  # type: ignore[union-attr]  # noqa: SLF001
                queue._getters.clear()  # type: ignore[union-attr]  # noqa: SLF001

    def _probe(self) -> None:
        self._probing = True
        try:
            health = self.adapter.get_health()  # type: ignore[attr-defined]  # optional method
            self._health = {f"{self.name}.{key}": _text(value) for key, value in health.items()}
        finally:
            self._probing = False


def supported_kwargs(method: Callable[..., object], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that ``method`` accepts, or all keywords if its signature is unknown.

    The signature is inspected, because a trial call with an unknown keyword is not safe: the call
    may run the action before it raises ``TypeError``.
    """
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return keywords
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    names = {name for name, parameter in parameters.items() if parameter.kind in _KEYWORD_KINDS}
    return {key: value for key, value in keywords.items() if key in names}


_KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _text(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
