"""Sets an agent's settings in the environment of a test."""

from tests.support.peer import SECRET_TEXT, TOKEN


def set_connection(monkeypatch, url, **settings):
    """Set the variables of an agent that connects to the brain at ``url``.

    :param settings: additional or changed variables, by their names without ``Z4J_``.
    """
    values = {
        "brain_url": url,
        "project_id": "p",
        "token": TOKEN,
        "hmac_secret": SECRET_TEXT,
        **settings,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"Z4J_{name.upper()}", str(value))
