"""Self-signed certificates for 127.0.0.1 and ``brain.test``."""

import datetime as dt
import ipaddress


def make(path, days=(-1, 1)):
    """Write certificate and key to ``path`` and return it.

    :param days: start and end of the validity, in days from now.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "peer")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("brain.test")]
    first, last = (dt.datetime.now(dt.UTC) + dt.timedelta(days=number) for number in days)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path
