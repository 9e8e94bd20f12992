"""Settings and views of a Django site."""

import sample_tasks
from django.http import JsonResponse
from django.urls import path

SECRET_KEY = "none"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["z4j_django"]
ROOT_URLCONF = "django_app"
USE_TZ = True
CELERY_APP = "web_tasks:app"


def add(request, x, y):
    from web_tasks import add as task

    return JsonResponse({"id": task.apply((x, y)).id})


def check_loop(request):
    sample_tasks.checks_loop(1)
    return JsonResponse({})


urlpatterns = [path("add/<int:x>/<int:y>", add), path("check_loop", check_loop)]
