"""Certificates on disk, as an operator has them, from a CA that lives as long as the test."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import trustme

LONG_AGO: Final = datetime(2001, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, both PEM."""

    certificate: Path
    key: Path


def save(leaf: trustme.LeafCert, directory: Path, name: str) -> Pair:
    """Write ``name``.pem and ``name``.key, over what is there."""
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.key")
    pair.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(pair.key))
    return pair


def save_ca(ca: trustme.CA, directory: Path, name: str = "ca") -> Path:
    """Write ``name``.pem: what those who trust the CA need."""
    path = directory / f"{name}.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


def expired(ca: trustme.CA, host: str) -> trustme.LeafCert:
    """A certificate that was good once."""
    return ca.issue_cert(host, not_before=datetime(2000, 1, 1, tzinfo=UTC), not_after=LONG_AGO)
