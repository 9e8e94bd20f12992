"""The chores with z4j_celery imported and nothing else: it starts the agent itself, from the environment."""

import z4j_celery
from chores import app

__all__ = ["app", "z4j_celery"]
