"""The fork epoch: how a copied greenlet learns that it is a copy.

Greenlets survive ``os.fork`` in the child, threads do not. Comparing an integer costs 30 ns, ``os.getpid`` five times that.
"""

from __future__ import annotations

import os

_epoch = 0


def epoch() -> int:
    """Return a number that is different in every forked child."""
    return _epoch


def _bump() -> None:
    # Assigns and nothing else: a hook that yields would run the parent's greenlets inside fork() (gevent #2204).
    global _epoch
    _epoch += 1


os.register_at_fork(after_in_child=_bump)
