"""The same for greenlet workers: huey leaves the patching to the application."""

from gevent import monkey

monkey.patch_all()

from huey_app import huey, send  # noqa: E402 - patch first

__all__ = ["huey", "send"]
