"""The Celery application of the parity benchmark, the same under both agents."""

import os
import time

from celery import Celery
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

app = Celery("parity")
app.conf.update(
    broker_url=os.environ["PARITY_BROKER"],
    result_backend=os.environ["PARITY_BROKER"],
    task_default_queue="parity",
    task_send_sent_event=True,
    task_track_started=True,
    worker_pool_restarts=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="shop.add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="shop.fails")
def fails(text: str) -> None:
    raise ValueError(text)


@app.task(name="shop.retries", bind=True, max_retries=2)
def retries(self, text: str) -> str:
    """Fail once, then succeed."""
    if not self.request.retries:
        # The brain merges events of one kind within a second, hence 1.5 s.
        raise self.retry(countdown=1.5, exc=ValueError("not yet"))
    return text


@app.task(name="shop.greets")
def greets(name: str, **_details: object) -> dict[str, str]:
    return {"greeting": f"hello {name}", "api_key": "k-123"}


@app.task(name="shop.waits")
def waits(seconds: float) -> None:
    time.sleep(seconds)


@app.task(name="shop.parent", bind=True)
def parent(self) -> str:
    """Send a child task with a known id."""
    return str(add.apply_async((20, 22), task_id=f"{self.request.id}-child").id)


install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
