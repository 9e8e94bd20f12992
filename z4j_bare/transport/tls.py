"""One verifying TLS context for every connection; made at start, because loading the authorities takes 20 ms of CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from z4j_bare.errors import HostConfigurationError


def tls_context(ca_bundle: Path | None, client_cert: Path | None, client_key: Path | None) -> Any:
    """Return an ``ssl.SSLContext`` that verifies certificate and host name.

    Without ``ca_bundle`` (``Z4J_CA_BUNDLE``) the authorities are those of ``REQUESTS_CA_BUNDLE``, ``SSL_CERT_FILE`` or the
    system, in this order. Raises ``HostConfigurationError`` naming the file that cannot be used.
    """
    import ssl

    bundle = ca_bundle or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=None if bundle is None else str(bundle))
    except (OSError, ValueError) as error:
        raise HostConfigurationError(
            f"Z4J_CA_BUNDLE={bundle}: no usable certificates ({error})"
        ) from None
    if client_cert is not None:
        try:
            context.load_cert_chain(client_cert, client_key)
        except (OSError, ValueError) as error:
            raise HostConfigurationError(
                f"Z4J_CLIENT_CERT={client_cert}: not usable ({error})"
            ) from None
    return context
