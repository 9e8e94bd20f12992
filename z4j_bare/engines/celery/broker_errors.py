"""Explains why a broker refuses a connection, in a text without passwords."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kombu import Connection

#: AMQP's reply codes for a refused virtual host and for a refused login.
_NOT_ALLOWED = 530
_ACCESS_REFUSED = 403

_FIX_ADDRESS = "start the broker, or correct the address"


def explain(error: BaseException, connection: Connection) -> tuple[str, str]:
    """Return why connecting failed, and what to do.

    :param error: the exception that the connection raised. kombu wraps the broker's own exception.
    :param connection: the connection, which need not be open.
    """
    original = error.__cause__ or error
    address = connection.as_uri()  # with ** in place of the password
    user, vhost = connection.userid, connection.virtual_host
    code = getattr(original, "reply_code", None)
    if code == _NOT_ALLOWED:
        fix = (
            "correct the address, or create the virtual host and the user's permissions: "
            f"rabbitmqctl add_vhost '{vhost}'; "
            f"rabbitmqctl set_permissions -p '{vhost}' '{user}' '.*' '.*' '.*'"
        )
        return f"the broker at {address} refuses the virtual host {vhost!r}: {_text(original)}", fix
    if code == _ACCESS_REFUSED or type(original).__name__ == "AuthenticationError":
        return (
            f"the broker at {address} refuses the user: {_text(original)}",
            "correct user and password of the address",
        )
    return f"no broker answers at {address}: {_text(original)}", _FIX_ADDRESS


def _text(error: BaseException) -> str:
    """Return the broker's reply, or the exception's text, without the name of AMQP's method."""
    return str(getattr(error, "reply_text", "") or str(error) or type(error).__name__)
