"""Enqueue ``[[name, arguments], ...]`` with an app's producer: ``send.py APP JSON``; print ids."""

import importlib
import json
import sys

app = importlib.import_module(sys.argv[1])
print(json.dumps([app.send(name, args) for name, args in json.loads(sys.argv[2])]))
