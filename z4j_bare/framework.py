"""The framework adapter of a process without a web framework."""

from __future__ import annotations

from collections.abc import Callable

from z4j_core.models import Config, DiscoveryHints, RequestContext, User


class BareFrameworkAdapter:
    """Implements z4j_core's ``FrameworkAdapter`` with a fixed configuration and no requests.

    :param config: the configuration that :meth:`discover_config` returns.
    """

    name = "bare"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._startup: list[Callable[[], None]] = []
        self._shutdown: list[Callable[[], None]] = []

    def discover_config(self) -> Config:
        """Return the configuration that was passed to the constructor."""
        return self._config

    def discovery_hints(self) -> DiscoveryHints:
        """Return hints that contain no paths and no task names."""
        return DiscoveryHints(framework_name=self.name)

    def current_context(self) -> RequestContext | None:
        """Return ``None``, because there are no requests."""
        return None

    def current_user(self) -> User | None:
        """Return ``None``, because there are no users."""
        return None

    def on_startup(self, hook: Callable[[], None]) -> None:
        """Register ``hook`` for :meth:`fire_startup`."""
        self._startup.append(hook)

    def on_shutdown(self, hook: Callable[[], None]) -> None:
        """Register ``hook`` for :meth:`fire_shutdown`."""
        self._shutdown.append(hook)

    def register_admin_view(self, view: object) -> None:
        """Do nothing, because there is no admin site."""

    def fire_startup(self) -> None:
        """Run the start-up hooks in registration order; a hook's exception propagates."""
        for hook in self._startup:
            hook()

    def fire_shutdown(self) -> None:
        """Run the shutdown hooks in registration order; a hook's exception propagates."""
        for hook in self._shutdown:
            hook()
