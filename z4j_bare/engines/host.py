"""One engine adapter, hosted: connect, capabilities, health, commands, disconnect."""

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

    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.controls import CeleryControls
    from z4j_bare.interfaces import IProcessRestart

logger = logging.getLogger("z4j.runtime.adapters")

#: Seconds for ``connect_signals``, which may publish to a broker and start a thread.
CONNECT_PATIENCE = 30.0
#: Queues that adapters keep for life although an ``asyncio.Queue`` binds to the first loop that waits in it.
_QUEUES = ("_event_queue", "_registry_delta_queue")


class EngineHost:
    """What the agent does with one engine adapter; each probe is for an attribute that some adapters lack."""

    def __init__(
        self,
        engine: Any,
        bridge: Bridge,
        backend: BaseConcurrency,
        sink: Callable[[Any], object],
    ) -> None:
        self.engine = engine
        self.description = describe_engine(engine)
        self.name = str(getattr(engine, "name", type(engine).__name__))
        self._bridge = bridge
        self._backend = backend
        self._sink = sink
        self._controls: CeleryControls | None = None
        redaction = getattr(engine, "redaction", None)
        #: How this process ends for a new one, for the engine that cannot restart a worker itself.
        self.process_restart: IProcessRestart | None = None
        #: Hides in answers what the adapter hides in events.
        self.redactor = Redactor(
            redaction if isinstance(redaction, RedactionEngine) else RedactionEngine()
        )
        self._end_pump: Callable[[], None] | None = None
        self._health: dict[str, str] = {}
        self._probing = False

    def connect(self, *, events: bool = True) -> None:
        """With ``events``, connect the adapter's signals and pump its events into the sink.

        Never raises: an adapter that fails to connect is logged and stays usable for commands.
        """
        if not events:
            return
        self._unbind_queues()
        self._connect_signals()
        if self._end_pump is None and hasattr(self.engine, "subscribe_events"):
            stream = self.engine.subscribe_events
            self._end_pump = self._bridge.pump(stream, self._sink, f"z4j-events-{self.name}")

    def disconnect(self, timeout: float = 5.0) -> None:
        """Disconnect the signals within ``timeout`` seconds, then drain and end the pump; never raises."""
        disconnect = getattr(self.engine, "disconnect_signals", None)
        try:
            if disconnect is not None:
                self._bridge.call(disconnect, timeout=timeout)
        except Exception:
            logger.warning("z4j: %s did not disconnect", self.name, exc_info=True)
        end, self._end_pump = self._end_pump, None
        if end is not None:
            end()

    def capabilities(self) -> list[str]:
        """Return what the adapter can do now; ask again at every hello, celery-beat's answer changes."""
        able = {str(name) for name in self.engine.capabilities()}
        if self.retries_by_reference:
            able.add(RETRY_BY_REFERENCE_CAPABILITY)
        if self.process_restart is not None and self.process_restart.is_supervised:
            able.add("restart_worker")
        return sorted(able)

    @property
    def controls(self) -> CeleryControls | None:
        """Our own way of controlling workers, for the engine whose adapter does not wait for their answers."""
        if self._controls is None:
            self._controls = self.description.make_controls(self._backend)
        return self._controls

    @property
    def retries_by_reference(self) -> bool:
        """Whether the adapter promises never to retry with the brain's copy of the arguments, which is redacted."""
        return getattr(self.engine, "safe_retry_by_reference", None) is True

    def has_method(self, method_name: str) -> bool:
        """Whether the adapter has such a method."""
        return callable(getattr(self.engine, method_name, None))

    def health(self, timeout: float = 5.0) -> dict[str, str]:
        """Return ``<engine>.<key>`` entries for the heartbeat, after at most ``timeout`` seconds.

        Celery's probe takes 10 s when its worker does not answer: never two at a time, and what comes late is
        kept for the next heartbeat. A probe that fails yields ``<engine>.error``.
        """
        if not hasattr(self.engine, "get_health"):
            return {}
        try:
            if not self._probing:
                self._bridge.call(self._probe, timeout=timeout)
        except TimeoutError:
            logger.debug("z4j: the health of %s takes longer than %g s", self.name, timeout)
        except Exception as error:
            logger.debug("z4j: the health check of %s failed: %s", self.name, error)
            self._health = {}
        return self._health or {f"{self.name}.error": "health check failed"}

    def dropped(self) -> int:
        """Return how many events the adapter itself has lost so far."""
        try:
            return int(getattr(self.engine, "dropped_event_count", 0))
        except Exception:
            return 0

    def invoke(
        self,
        method_name: str,
        *args: Any,
        timeout: float,
        hints: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call an action of the adapter and return its result; never twice.

        Of the keywords, those that are ``None`` or mere ``hints`` are left out if this adapter's method does not take
        them. ``CommandError`` for any other and for a method that it does not have, ``TimeoutError`` after ``timeout``
        seconds, else whatever the adapter raises.
        """
        method = getattr(self.engine, method_name, None)
        if not callable(method):
            raise CommandError(f"engine {self.name} does not support {method_name}")
        taken = supported_kwargs(method, {**kwargs, **(hints or {})})
        refused = [key for key, value in kwargs.items() if value is not None and key not in taken]
        if refused:
            raise CommandError(
                f"engine {self.name} does not support {method_name} with {' and '.join(refused)}"
            )
        return self._bridge.call(partial(method, *args, **taken), timeout=timeout)

    def control(self, action: str, *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call one of our own :attr:`controls`, which take the time they have as ``seconds``; errors as ``invoke``."""
        act = getattr(self.controls, action)
        return self._bridge.call(partial(act, *args, seconds=timeout, **kwargs), timeout=timeout)

    def _connect_signals(self) -> None:
        connect = getattr(self.engine, "connect_signals", None)
        if connect is None:
            return
        keywords = supported_kwargs(connect, {"loop": self._bridge.loop()})
        try:
            self._bridge.call(partial(connect, **keywords), timeout=CONNECT_PATIENCE)
        except Exception:
            logger.warning(
                "z4j: %s did not connect; its commands still work", self.name, exc_info=True
            )

    def _unbind_queues(self) -> None:
        """Free the adapter's queues from the loop of an earlier agent or of the parent process.

        Its getters go as well: an item would wake the dead one first.
        """
        for name in _QUEUES:
            queue = getattr(self.engine, name, None)
            if getattr(queue, "_loop", None) not in (None, self._bridge.loop()):
                queue._loop = None  # type: ignore[union-attr]  # noqa: SLF001
                queue._getters.clear()  # type: ignore[union-attr]  # noqa: SLF001

    def _probe(self) -> None:
        self._probing = True
        try:
            health = self.engine.get_health()
            self._health = {f"{self.name}.{key}": _text(value) for key, value in health.items()}
        finally:
            self._probing = False


def supported_kwargs(method: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return those of ``keywords`` that ``method`` takes; all of them when it does not tell.

    Read off the signature: catching ``TypeError`` and calling again would run an action twice.
    """
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return keywords
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    named = {name for name, parameter in parameters.items() if parameter.kind in _NAMED}
    return {key: value for key, value in keywords.items() if key in named}


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
