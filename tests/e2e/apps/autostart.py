"""The sample tasks with only z4j_celery imported, which starts the agent from the environment."""

import z4j_celery
from sample_tasks import app

__all__ = ["app", "z4j_celery"]
