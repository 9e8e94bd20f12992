"""A Flask site."""

import sample_tasks
from flask import Flask
from web_tasks import add as task
from web_tasks import app as celery_app
from z4j_flask import Z4J

app = Flask("site")
app.config["CELERY_APP"] = celery_app
Z4J(app)


@app.get("/add/<int:x>/<int:y>")
def add(x, y):
    return {"id": task.apply((x, y)).id}


@app.get("/check_loop")
def check_loop():
    sample_tasks.checks_loop(1)
    return {}
