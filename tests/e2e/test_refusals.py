"""Agents that the brain wants nothing to do with: a long back-off, one warning that names the setting, and nothing lost."""

import re
import secrets

import pytest

from tests.support.e2e_host import PATIENCE, start_hosts
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

#: Seconds for which nobody may keep a host from running.
HANG = 5.0


def each_complains(hosts, setting):
    """Wait until each has warned, once, of a refusal: with that setting's name, and a long wait to the next attempt."""
    for host in hosts:
        host.until(lambda _stats, host=host: refusals(host), "a warning")
        (said,) = refusals(host)
        assert setting in said[0].upper()
        assert int(said[1]) >= 10


def refusals(host):
    """What an operator sees of refusals in the host's log: what is wrong, and the seconds to the next attempt."""
    return re.findall(
        r"WARNING z4j\.runtime\.supervisor z4j: no session \(auth\): (.*); next attempt in (\d+) s",
        host.output(),
    )


@pytest.mark.parametrize("end", ["revoked", "archived"])
def test_an_agent_that_is_not_wanted_any_more(brain, tmp_path_factory, end):
    """The session ends; one warning names the setting; the next attempt is far away; the host goes on, and ends cleanly."""
    with start_hosts(brain, tmp_path_factory) as hosts:
        project = hosts[0].credentials.project
        if end == "archived":
            brain.archive_project(project)
        else:
            for host in hosts:
                brain.revoke_agent(project, host.credentials.agent_id)
        each_complains(hosts, "TOKEN")
        sessions = [host.ask("stats")["sessions"] for host in hosts]
        for host in hosts:
            host.ask("reconnect")
            host.produce(end, 30, 0.2)
            host.produced()
        for host in hosts:
            host.until(lambda stats: "does not know it" in stats["last_error"], "a refusal")
            host.until(lambda stats: stats["buffered"] == 30, "the buffer")
        each_complains(hosts, "TOKEN")
        for host, before in zip(hosts, sessions, strict=True):
            stats = host.ask("stats")
            assert (stats["state"], stats["lost"], stats["restarts"]) == ("running", {}, {})
            assert stats["sessions"] == before
            assert stats["longest_gap"] < HANG
            assert host.leave() == 0
            assert "Traceback" not in host.output()


def test_a_rotated_secret(tmp_path_factory):
    """When the brain's secret changes, agents say which setting is wrong; with the new one they deliver what had to wait."""
    with (
        Brain(tmp_path_factory.mktemp("brain")) as brain,
        start_hosts(brain, tmp_path_factory) as hosts,
    ):
        for host in hosts:
            host.produce("rotated", 20, 0.2)
            host.settle()
        with rotated(brain) as changed:
            for host in hosts:
                host.produce("rotated", 30, 0.2)
            for host in hosts:
                host.ask("reconnect")
            each_complains(hosts, "Z4J_HMAC_SECRET")
            fresh = changed.mint_agent(hosts[0].credentials.project, "new").hmac_secret
            for host in hosts:
                assert fresh != host.credentials.hmac_secret
                assert host.leave() == 0
                host.come_back(Z4J_HMAC_SECRET=fresh)
                host.produce("rotated", 10, 0.1)
            for host in hosts:
                until(
                    lambda host=host: host.delivered(changed, "rotated"),
                    "all events",
                    timeout=PATIENCE,
                )


def rotated(brain):
    """Stop the brain, and return it with another secret, under which the tokens it has given out stay good."""
    lines = (brain.home / "secret.env").read_text().splitlines()
    old = next(
        value for name, _, value in (line.partition("=") for line in lines) if name == "Z4J_SECRET"
    )
    changed = Brain(
        brain.home,
        port=brain.port,
        environment={
            "Z4J_SECRET": secrets.token_urlsafe(48),
            "Z4J_PREVIOUS_SECRETS": old.strip('"'),
        },
    )
    changed.password = brain.password
    brain.stop()
    return changed
