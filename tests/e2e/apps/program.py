"""Runs a Celery worker without Celery's command line: ``program.py APP worker [OPTION ...]``."""

import sys
from importlib import import_module

import_module(sys.argv[1]).app.worker_main(sys.argv[2:])
