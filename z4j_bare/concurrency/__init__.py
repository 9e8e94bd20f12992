"""The backends. Importing this package imports neither gevent nor eventlet."""

from __future__ import annotations

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.detect import CHOICES, Detection, build, choose, detect

__all__ = ["CHOICES", "BaseConcurrency", "Detection", "Task", "build", "choose", "detect"]
