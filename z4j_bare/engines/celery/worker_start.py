"""Follows the start of a Celery worker, and starts the agent when the worker is ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from z4j_bare import _process_singleton as singleton
from z4j_bare.engines.celery import green_kombu
from z4j_bare.engines.celery.broker_errors import RefusalHint
from z4j_bare.errors import HostConfigurationError
from z4j_bare.process import mark_celery_worker, track_worker_ready
from z4j_bare.safety import safe_call
from z4j_bare.settings import load_settings

if TYPE_CHECKING:
    from celery.worker import WorkController
    from celery.worker.consumer import Consumer

#: Environment variable with the path of the channel's directory, for children that are not forked.
#: The path ends with the pid of the parent.
CHANNEL_VARIABLE = "_Z4J_CELERY_CHANNEL"

#: Celery's names of the pools that do not fork.
_OTHER_POOLS = ("gevent", "eventlet", "solo", "threads")


class Runtime(Protocol):
    """The part of ``AgentRuntime`` that :class:`WorkerStart` uses."""

    @property
    def engines(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def state(self) -> str: ...  # noqa: D102

    def stop(self) -> None: ...  # noqa: D102


class WorkerStart:
    """The handlers of the signals that Celery sends while a worker starts.

    A worker is recognised by its first signal, ``worker_init``. No other process sends this signal.
    The command line does not suffice: it does not show a worker that ``app.worker_main()`` started.

    :param start: starts a runtime.
    :param bootstrap: called when a worker is ready but has no registered runtime.
    """

    def __init__(
        self, start: Callable[[Any], object], bootstrap: Callable[[Consumer], object]
    ) -> None:
        self._start = start
        self._bootstrap = bootstrap
        self._connected = False

    def connect(self) -> None:
        """Connect the handlers, if this process uses Celery. A second call does nothing.

        z4j_celery imports this package before Celery. If z4j_celery is being imported, this method
        therefore imports Celery itself.
        """
        if self._connected or not ("celery" in sys.modules or "z4j_celery" in sys.modules):
            return
        try:
            from celery import signals
        except ImportError:
            return
        self._connected = True
        track_worker_ready()
        signals.worker_init.connect(self._on_init, weak=False)
        signals.worker_before_create_process.connect(self._open_channel, weak=False)
        if is_spawned_child():
            from z4j_bare.engines.celery.prefork import prefork

            safe_call(prefork.attach, os.environ[CHANNEL_VARIABLE])

    def start_when_ready(self, runtime: Runtime) -> None:
        """Start ``runtime`` at ``worker_ready``, and stop it at ``worker_shutdown``."""
        from celery import signals

        def ready(sender: Consumer | None = None, **_kwargs: object) -> None:
            if singleton.current_runtime() is not runtime:
                return
            for engine in runtime.engines.values():
                # With a node name, the adapter's inspect calls do not wait 10 s for other nodes.
                if getattr(engine, "worker_hostname", "") is None:
                    engine.worker_hostname = getattr(sender, "hostname", None)
            safe_call(self._start, runtime)

        signals.worker_ready.connect(ready, weak=False)
        stop_with_worker(runtime)

    def _on_init(self, sender: WorkController | None = None, **_kwargs: object) -> None:
        """Prepare the worker's start. The pool does not exist yet.

        The handlers of ``worker_ready`` are connected in this order: first the handlers of
        z4j_celery and of the application, at their import; then the handlers of this method; last
        the handler of :meth:`Prefork.open`. That last handler stops the children's messages if no
        agent is installed.
        """
        if _is_program(sender):
            mark_celery_worker()
            safe_call(self._restart_when_ready)
            safe_call(self._bootstrap_when_ready)
        self._open_channel(sender)
        safe_call(replace_kombu_sleep)
        safe_call(_explain_refusals, sender)

    def _restart_when_ready(self) -> None:
        """Stop an agent that runs already, and start it again when the worker is ready.

        The command line of a program that calls ``app.worker_main()`` does not show that the
        program is a worker. If such a program installs an agent before the call, the agent starts
        immediately, and would not capture the worker's signals.
        """
        runtime = singleton.current_runtime()
        if runtime is not None and runtime.state == "running":
            runtime.stop()
            self.start_when_ready(runtime)

    def _bootstrap_when_ready(self) -> None:
        from celery import signals

        def ready(sender: Consumer | None = None, **_kwargs: object) -> None:
            if sender is not None and singleton.current_runtime() is None:
                safe_call(self._bootstrap, sender)

        signals.worker_ready.connect(ready, weak=False)

    def _open_channel(self, sender: object = None, **_kwargs: object) -> None:
        """Make the channel of a prefork worker before the first child is forked.

        The children inherit the channel. At ``worker_ready``, when an agent may be installed, the
        children exist already.
        """
        pool = str(getattr(sender, "pool_cls", ""))
        spawn = getattr(sender, "pool_start_method", "fork") == "spawn"
        if "z4j_celery" not in sys.modules or any(name in pool for name in _OTHER_POOLS):
            return
        from z4j_bare.engines.celery.prefork import prefork

        safe_call(prefork.open, spawn=spawn)


def replace_kombu_sleep() -> None:
    """Replace kombu's unpatched sleep if ``Z4J_GREEN_KOMBU`` is set."""
    try:
        settings = load_settings()
    except HostConfigurationError:
        return  # ``install_agent`` reports the setting
    if settings.green_kombu and not settings.disabled:
        green_kombu.replace_sleep()


def _explain_refusals(worker: object) -> None:
    """Log the fix if the broker refuses the worker, unless ``Z4J_DISABLED`` is set."""
    app = getattr(worker, "app", None)
    if app is not None and "z4j_celery" in sys.modules and not load_settings().disabled:
        RefusalHint(app).install()


def stop_with_worker(runtime: Runtime) -> None:
    """Stop ``runtime`` at ``worker_shutdown``."""
    from celery import signals

    def shutdown(**_kwargs: object) -> None:
        safe_call(runtime.stop)

    signals.worker_shutdown.connect(shutdown, weak=False)


def is_spawned_child() -> bool:
    """Whether this process is a prefork worker's child that was spawned, not forked."""
    return os.environ.get(CHANNEL_VARIABLE, "").endswith(f"-{os.getppid()}")


def _is_program(sender: object) -> bool:
    """Whether ``worker_init`` comes from a worker that runs as a program.

    The other workers run within a test or a program of the user. They send no ``worker_ready``.
    """
    module = sys.modules.get("celery.apps.worker")
    return module is not None and isinstance(sender, module.Worker)
