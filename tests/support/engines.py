"""A fake engine adapter and a fake engine host for the unit tests."""

from types import SimpleNamespace

from z4j_core.models import CommandResult
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.commands.actions import ENGINE_ACTIONS
from z4j_bare.events.redaction import Redactor


class FakeEngine:
    """An adapter that records the first argument of each call in ``calls``.

    Tests set ``result`` and ``error``, or override a method.
    """

    def __init__(self, *capabilities, name="stub", result=None):
        self.name = name
        self.calls = []
        self.result = {} if result is None else result
        self.error = None
        self._capabilities = set(capabilities)

    def capabilities(self):
        return self._capabilities

    async def submit_task(self, name, **_options):
        return self.respond(name)

    async def retry_task(self, task_id, **_options):
        return self.respond(task_id)

    async def cancel_task(self, task_id):
        return self.respond(task_id)

    def respond(self, argument):
        """Record a call; raise ``error`` or return ``result``."""
        self.calls.append(argument)
        if self.error is not None:
            raise self.error
        return CommandResult(status="success", result=self.result)


def success(**result):
    """Return what an adapter returns for a successful command."""
    return SimpleNamespace(status="success", result=result, error=None)


class FakeEngineHost:
    """An engine host whose calls take ``seconds`` and return the result of ``act``.

    ``calls`` holds the method, arguments and keywords of each call.
    """

    controls = process_restart = None
    retries_by_reference = True
    retry_problem = ""
    redactor = Redactor(RedactionEngine())

    def __init__(self, backend, name="celery"):
        self.name = name
        self.calls = []
        self.seconds = 0.0
        self.act = lambda *_: success(ok=True)
        self._backend = backend

    def capabilities(self):
        return sorted(ENGINE_ACTIONS)

    def has_method(self, _name):
        return True

    def invoke(self, method, *args, timeout, **options):
        self.calls.append((method, args, options))
        seconds = self.seconds(*args) if callable(self.seconds) else self.seconds
        self._backend.sleep(min(seconds, timeout))
        if seconds > timeout:
            raise TimeoutError
        return self.act(method, *args)
