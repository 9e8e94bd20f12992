"""One scheduler adapter, hosted: connect, capabilities, listing, orders, disconnect."""

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

    from z4j_bare.interfaces import IBridge

logger = logging.getLogger("z4j.runtime.adapters")

#: Seconds for ``connect_signals`` and for ``capabilities``, which may import Django's models.
CONNECT_PATIENCE = 30.0
ASK_PATIENCE = 5.0

#: Bytes of one text in a row. The brain cuts at 8,192 and puts a note behind, also behind ours if that makes it longer.
LONGEST_TEXT = 8000

#: Bytes of one text in an answer, which repeats rows: nothing of those is cut a second time.
LONGEST_ANSWER = 8192


@implementer(ISchedulerHost)
class SchedulerHost:
    """What the agent does with one scheduler adapter, in the bridge's hands."""

    def __init__(self, scheduler: Any, bridge: IBridge, config: Any) -> None:
        self.scheduler = scheduler
        self.name = str(scheduler.name)
        #: Hides what the brain would hide: a row that its rules change fails its digest (``brain-contract`` 5.7).
        self.redactor = Redactor(_engine(config, min(LONGEST_TEXT, config.max_payload_bytes)))
        self.result_redactor = Redactor(_engine(config, LONGEST_ANSWER))
        self._bridge = bridge
        self._able: list[str] = []

    def connect(self, changed: Callable[[], object]) -> None:
        """Have ``changed()`` called whenever the scheduler says that a schedule has changed; never raises."""
        connect = getattr(self.scheduler, "connect_signals", None)
        if connect is None:
            return
        try:
            # What has changed is read anew: the signal's own copy may be of a transaction that is rolled back.
            self._bridge.call(partial(connect, lambda *_: changed()), timeout=CONNECT_PATIENCE)
        except Exception:
            logger.warning(
                "z4j: %s did not connect; its changes are noticed later", self.name, exc_info=True
            )

    def disconnect(self, timeout: float = 5.0) -> None:
        """Undo :meth:`connect` within ``timeout`` seconds; never raises."""
        disconnect = getattr(self.scheduler, "disconnect_signals", None)
        try:
            if disconnect is not None:
                self._bridge.call(disconnect, timeout=timeout)
        except Exception:
            logger.warning("z4j: %s did not disconnect", self.name, exc_info=True)

    def capabilities(self) -> list[str]:
        """Return what the adapter can do now, or could when it last said so; never raises."""
        try:
            self._able = sorted(
                map(str, self._bridge.call(self.scheduler.capabilities, timeout=ASK_PATIENCE))
            )
        except Exception as error:
            logger.debug("z4j: %s does not tell its capabilities: %s", self.name, error)
        return self._able

    def schedules(self, timeout: float) -> list[Any]:
        """Return all schedules; raises whatever the adapter raises, for an incomplete list would delete the rest."""
        return list(self.invoke("list_schedules", timeout=timeout))

    def schedule(self, identity: str, timeout: float) -> Any:
        """Return one schedule, ``None`` when there is none of that id."""
        return self.invoke("get_schedule", identity, timeout=timeout)

    def invoke(self, method_name: str, *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call a method of the adapter; ``CommandError`` when it has none, ``TimeoutError``, or what the adapter raises."""
        method = getattr(self.scheduler, method_name, None)
        if not callable(method):
            raise CommandError(f"scheduler {self.name} does not support {method_name}")
        return self._bridge.call(partial(method, *args, **kwargs), timeout=timeout)


def _engine(config: Any, longest: int) -> RedactionEngine:
    return RedactionEngine(
        RedactionConfig(
            extra_key_patterns=tuple(config.redaction_extra_key_patterns),
            extra_value_patterns=tuple(config.redaction_extra_value_patterns),
            max_value_bytes=longest,
        )
    )
