"""Calls a scheduler adapter through the asyncio bridge."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_core.redaction.engine import RedactionConfig, RedactionEngine
from zope.interface import implementer

from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import Redactor
from z4j_bare.interfaces import ISchedulerHost

if TYPE_CHECKING:
    from collections.abc import Callable

    from z4j_core.models import Config, Schedule
    from z4j_core.protocols import SchedulerAdapter

    from z4j_bare.interfaces import IBridge

logger = logging.getLogger("z4j.runtime.schedules.host")

#: Timeout in seconds for connecting the adapter's signals.
CONNECT_TIMEOUT = 30.0

#: Timeout in seconds for listing the adapter's capabilities. This may import Django's models.
CAPABILITIES_TIMEOUT = 5.0

#: Maximum bytes of a text in a published row.
#: A longer text is truncated, and a note of the truncation is appended.
#: Text and note together stay below 8,192 bytes, because the brain truncates a longer text.
MAX_ROW_TEXT_BYTES = 8000

#: Maximum bytes of a text in a command's result.
#: A text that was truncated for a row (8,000 bytes and a note) must fit.
MAX_RESULT_TEXT_BYTES = 8192


@implementer(ISchedulerHost)
class SchedulerHost:
    """Calls one scheduler adapter through the bridge."""

    def __init__(self, scheduler: SchedulerAdapter, bridge: IBridge, config: Config) -> None:
        self.scheduler = scheduler
        self.name = str(scheduler.name)
        #: Redacts rows by the brain's rules.
        #: If the brain's own redaction changed a row, the row would not match its digest.
        self.redactor = Redactor(
            _redaction_engine(config, min(MAX_ROW_TEXT_BYTES, config.max_payload_bytes))
        )
        self.result_redactor = Redactor(_redaction_engine(config, MAX_RESULT_TEXT_BYTES))
        self._bridge = bridge
        self._capabilities: list[str] = []

    def connect(self, changed: Callable[[], object]) -> None:
        """Make each signal of the adapter call ``changed()``; never raises."""
        connect = getattr(self.scheduler, "connect_signals", None)
        if connect is None:
            return
        try:
            # The schedule in the signal is ignored, because its transaction may be rolled back.
            self._bridge.call(partial(connect, lambda *_: changed()), timeout=CONNECT_TIMEOUT)
        except Exception:
            logger.warning(
                "z4j: could not connect the signals of %s: changes are published only periodically",
                self.name,
                exc_info=True,
            )

    def disconnect(self, timeout: float = 5.0) -> None:
        """Disconnect the adapter's signals within ``timeout`` seconds; never raises."""
        disconnect = getattr(self.scheduler, "disconnect_signals", None)
        try:
            if disconnect is not None:
                self._bridge.call(disconnect, timeout=timeout)
        except Exception:
            logger.warning("z4j: could not disconnect the signals of %s", self.name, exc_info=True)

    def capabilities(self) -> list[str]:
        """Return the adapter's capabilities; never raises.

        If the adapter fails, return the capabilities that it last reported.
        """
        try:
            names = self._bridge.call(self.scheduler.capabilities, timeout=CAPABILITIES_TIMEOUT)
            self._capabilities = sorted(map(str, names))
        except Exception as error:
            logger.debug("z4j: could not read the capabilities of %s: %s", self.name, error)
        return self._capabilities

    def schedules(self, timeout: float) -> list[Schedule]:
        """Return all schedules.

        Raises any exception of the adapter. An incomplete list is not returned, because a schedule
        that is missing from the list would count as deleted.
        """
        return list(self.invoke("list_schedules", timeout=timeout))

    def schedule(self, identity: str, timeout: float) -> Schedule | None:
        """Return the schedule with this id, or ``None`` if the adapter has no such schedule."""
        found: Schedule | None = self.invoke("get_schedule", identity, timeout=timeout)
        return found

    def invoke(self, method_name: str, *args: object, timeout: float, **kwargs: object) -> Any:
        """Call a method of the adapter and return its result.

        Raises ``CommandError`` if the adapter has no such method, ``TimeoutError`` after
        ``timeout`` seconds, and any exception that the adapter raises.
        """
        method = getattr(self.scheduler, method_name, None)
        if not callable(method):
            raise CommandError(f"scheduler {self.name} does not support {method_name}")
        return self._bridge.call(partial(method, *args, **kwargs), timeout=timeout)


def _redaction_engine(config: Config, max_text_bytes: int) -> RedactionEngine:
    return RedactionEngine(
        RedactionConfig(
            extra_key_patterns=tuple(config.redaction_extra_key_patterns),
            extra_value_patterns=tuple(config.redaction_extra_value_patterns),
            max_value_bytes=max_text_bytes,
        )
    )
