"""Finds and replaces the sleep of kombu that gevent does not patch.

Celery imports kombu before it patches a ``-P gevent`` worker, so ``kombu.utils.functional`` keeps
the builtin ``time.sleep``. While the broker is away, Celery calls this sleep between two attempts
to reconnect, for 2, 4, 6, ... at most 30 s. During this wait the hub is blocked, and no task runs.
No other module that such a worker loads keeps the builtin. Under eventlet kombu's sleep is patched.
"""

from __future__ import annotations

import logging
import sys
import time
from types import BuiltinFunctionType

logger = logging.getLogger("z4j.runtime.engines.celery.green_kombu")

_MODULE = "kombu.utils.functional"

#: What happens and what to do if the sleep is not patched.
ADVICE = (
    f"{_MODULE}.sleep is not patched by gevent: while the broker is away, each wait of Celery for "
    "the next attempt to reconnect blocks the hub for up to 30 s, and no task of this worker runs. "
    "Set Z4J_GREEN_KOMBU=1, so that the agent replaces this function when the worker starts"
)


def has_unpatched_sleep() -> bool:
    """Return whether ``time.sleep`` is patched in this process, but not in kombu."""
    functional = sys.modules.get(_MODULE)
    return isinstance(getattr(functional, "sleep", None), BuiltinFunctionType) and not isinstance(
        time.sleep, BuiltinFunctionType
    )


def replace_sleep() -> None:
    """Replace kombu's sleep by the patched ``time.sleep``, if kombu's sleep is not patched."""
    if has_unpatched_sleep():
        sys.modules[_MODULE].sleep = time.sleep  # type: ignore[attr-defined]
        logger.info(
            "z4j: %s.sleep is replaced by the patched time.sleep (Z4J_GREEN_KOMBU)", _MODULE
        )
