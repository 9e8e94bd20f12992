"""The application of the recording. Its tasks wait in different ways, succeed, retry and fail."""

import os
import socket
import subprocess
import time

from celery import Celery
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

app = Celery("shop", broker=os.environ["BROKER"])
install_agent(engines=[CeleryEngineAdapter(celery_app=app)])


@app.task(name="shop.add")
def add(x, y):
    time.sleep(0.05)
    return x + y


@app.task(name="shop.sync", bind=True, max_retries=2)
def sync(self, number):
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return number


@app.task(name="shop.pay")
def pay(number):
    raise ValueError(f"order {number} has no amount")


@app.task(name="shop.charge")
def charge():
    ours, _theirs = socket.socketpair()
    return ours.recv(1)


@app.task(name="shop.export")
def export():
    subprocess.run(["sleep", "600"], check=True)


@app.task(name="shop.report")
def report():
    return write_pages()


def write_pages():
    time.sleep(600)
