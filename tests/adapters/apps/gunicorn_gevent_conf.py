"""The same for gevent workers, patched before the application is loaded."""

from gevent import monkey

monkey.patch_all()

from gunicorn_conf import post_worker_init, preload_app  # noqa: E402 - patch first

__all__ = ["post_worker_init", "preload_app"]
