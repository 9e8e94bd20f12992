"""The backend: detection, one file per runtime, the fork epoch, and a fake with virtual time for tests.

The only room that knows the names gevent and eventlet. Importing it loads neither.
"""

from __future__ import annotations

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.detect import CHOICES, Detection, build, choose, detect

__all__ = ["CHOICES", "BaseConcurrency", "Detection", "Task", "build", "choose", "detect"]
