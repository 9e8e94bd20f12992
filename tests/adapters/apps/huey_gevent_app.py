"""The same for greenlet workers, which the application has to patch."""

from gevent import monkey

monkey.patch_all()

from huey_app import huey, send  # noqa: E402 - patch first

__all__ = ["huey", "send"]
