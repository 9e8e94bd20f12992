"""The standalone agent, ``z4j-bare run``, in a process of its own beside a project's workers."""

import sys

from z4j_bare.demo.process import Service
from z4j_bare.demo.worker import worker_environment

#: Maximum seconds until the brain shows a started agent.
_START_TIMEOUT = 40


def standalone_agent(project, app, **variables):
    """Return the service, not yet started, with secrets in files and its log at DEBUG.

    :param app: the application, as ``MODULE:ATTR``.
    :param variables: further environment variables.
    """
    files = {"--token-file": project.agent.token, "--hmac-secret-file": project.agent.hmac_secret}
    options = []
    for option, secret in files.items():
        path = project.home / option.strip("-")
        path.write_text(secret + "\n")
        options += [option, str(path)]
    command = [sys.executable, "-m", "z4j_bare", "--log-level", "DEBUG", "run"]
    command += ["--engine", "celery", "--celery-app", app]
    command += ["--brain-url", project.brain.url, "--project-id", project.slug, *options]
    environment = project.environment(
        agent=False, Z4J_HOME=str(project.home / "agent"), **variables
    )
    return Service(
        "the agent",
        command,
        environment=worker_environment(environment),
        cwd=project.home,
        log=project.home / "agent.log",
    )


def start_standalone_agent(service, project):
    """Start the service, and wait until the brain shows the agent and a complete row."""
    service.spawn(
        lambda: project.brain.agent(project.slug, project.agent.agent_id)["state"] == "online",
        _START_TIMEOUT,
    )
    project.warm_up()
