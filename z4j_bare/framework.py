"""The framework adapter of a process without a framework."""

from __future__ import annotations

from collections.abc import Callable

from z4j_core.models import Config, DiscoveryHints, RequestContext, User


class BareFrameworkAdapter:
    """Hands the configuration through and keeps start-up and shutdown hooks; see z4j_core's ``FrameworkAdapter``."""

    name = "bare"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._startup: list[Callable[[], None]] = []
        self._shutdown: list[Callable[[], None]] = []

    def discover_config(self) -> Config:
        """Return the configuration that it was built with."""
        return self._config

    def discovery_hints(self) -> DiscoveryHints:
        """Return hints without any path or name."""
        return DiscoveryHints(framework_name=self.name)

    def current_context(self) -> RequestContext | None:
        """Return ``None``: there are no requests here."""
        return None

    def current_user(self) -> User | None:
        """Return ``None``: there are no users here."""
        return None

    def on_startup(self, hook: Callable[[], None]) -> None:
        """Run ``hook`` in :meth:`fire_startup`."""
        self._startup.append(hook)

    def on_shutdown(self, hook: Callable[[], None]) -> None:
        """Run ``hook`` in :meth:`fire_shutdown`."""
        self._shutdown.append(hook)

    def register_admin_view(self, view: object) -> None:
        """Do nothing: there is nowhere to show it."""

    def fire_startup(self) -> None:
        """Run the start-up hooks in order; their exceptions pass."""
        for hook in self._startup:
            hook()

    def fire_shutdown(self) -> None:
        """Run the shutdown hooks in order; their exceptions pass."""
        for hook in self._shutdown:
            hook()
