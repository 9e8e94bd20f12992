"""``send.py APP JSON``: enqueue ``[[name, arguments], ...]`` as the app's own producers do, and print the ids."""

import importlib
import json
import sys

app = importlib.import_module(sys.argv[1])
print(json.dumps([app.send(name, args) for name, args in json.loads(sys.argv[2])]))
