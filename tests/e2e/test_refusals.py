"""Agents that the brain rejects: a long back-off, one warning that names the setting, no loss."""

import re
import secrets

import pytest

from tests.support.e2e_host import TIMEOUT, start_hosts
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

#: Maximum time for which the host's main loop may be blocked, in seconds.
MAX_GAP = 5.0


def assert_warned_once(hosts, setting):
    """Wait for one warning per host, with the setting's name and a wait of at least 10 s."""
    for host in hosts:
        host.until(lambda _stats, host=host: warnings(host), "a warning")
        (said,) = warnings(host)
        assert setting in said[0].upper()
        assert int(said[1]) >= 10


def warnings(host):
    """Return the reason and the seconds to the next attempt of each rejection in the host's log."""
    return re.findall(
        r"WARNING z4j\.runtime\.pipeline\.session z4j: "
        r"no session \(auth\): (.*); next attempt in (\d+) s",
        host.output(),
    )


@pytest.mark.parametrize("end", ["revoked", "archived"])
def test_revoked_agent_keeps_events_and_retries_rarely(brain, tmp_path_factory, end):
    """The session ends, one warning names the setting, and the host runs on and stops cleanly."""
    with start_hosts(brain, tmp_path_factory) as hosts:
        project = hosts[0].credentials.project
        if end == "archived":
            brain.archive_project(project)
        else:
            for host in hosts:
                brain.revoke_agent(project, host.credentials.agent_id)
        assert_warned_once(hosts, "TOKEN")
        sessions = [host.request("stats")["sessions"] for host in hosts]
        for host in hosts:
            host.request("reconnect")
            host.produce(end, 30, 0.2)
            host.wait_produced()
        for host in hosts:
            host.until(lambda stats: "does not know this token" in stats["last_error"], "a refusal")
            host.until(lambda stats: stats["buffered"] == 30, "the buffer")
        assert_warned_once(hosts, "TOKEN")
        for host, before in zip(hosts, sessions, strict=True):
            stats = host.request("stats")
            assert (stats["state"], stats["lost"], stats["restarts"]) == ("running", {}, {})
            assert stats["sessions"] == before
            assert stats["longest_gap"] < MAX_GAP
            assert host.finish() == 0
            assert "Traceback" not in host.output()


def test_rotated_secret_is_named_and_events_arrive_later(tmp_path_factory):
    """When the brain's secret changes a warning names it; with the new one all events arrive."""
    with (
        Brain(tmp_path_factory.mktemp("brain")) as brain,
        start_hosts(brain, tmp_path_factory) as hosts,
    ):
        for host in hosts:
            host.produce("rotated", 20, 0.2)
            host.wait_acked()
        with with_new_secret(brain) as changed:
            for host in hosts:
                host.produce("rotated", 30, 0.2)
            for host in hosts:
                host.request("reconnect")
            assert_warned_once(hosts, "Z4J_HMAC_SECRET")
            fresh = changed.mint_agent(hosts[0].credentials.project, "new").hmac_secret
            for host in hosts:
                assert fresh != host.credentials.hmac_secret
                assert host.finish() == 0
                host.restart(Z4J_HMAC_SECRET=fresh)
                host.produce("rotated", 10, 0.1)
            for host in hosts:
                until(
                    lambda host=host: host.delivered(changed, "rotated"),
                    "all events",
                    timeout=TIMEOUT,
                )


def with_new_secret(brain):
    """Stop the brain and return it with a new secret; its old tokens remain valid."""
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
