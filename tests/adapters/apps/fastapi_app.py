"""A FastAPI site."""

import sample_tasks
from fastapi import FastAPI
from web_tasks import add as task
from web_tasks import app as celery_app
from z4j_fastapi import z4j_lifespan

app = FastAPI(lifespan=z4j_lifespan(celery_app=celery_app))


@app.get("/add/{x}/{y}")
def add(x: int, y: int):
    return {"id": task.apply((x, y)).id}


@app.get("/check_loop")
async def check_loop():
    await sample_tasks.checks_loop_async(1)
    return {}
