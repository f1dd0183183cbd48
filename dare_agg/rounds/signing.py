"""What a client's signature covers, and whether it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dare_agg.errors import UpdateError


def reply_digest(
    plan_digest: bytes,
    blob: bytes,
    dense_blob: bytes | None,
    metrics: Mapping[str, object],
    statistics: bytes = b"",
) -> bytes:
    """SHA-256 over everything of a reply that decides the merged model, canonically.

    ``metrics`` are the numbers sent along (the weight among them), as plain values.
    """
    digest = hashlib.sha256(b"dare-agg reply 1\0" + plan_digest)
    for part in (blob, dense_blob or b""):
        digest.update(hashlib.sha256(part).digest())
    text = json.dumps(metrics, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest.update(hashlib.sha256(text.encode()).digest())
    if statistics:
        digest.update(hashlib.sha256(statistics).digest())
    return digest.digest()


def check_signature(public: str, digest: bytes, signature: object, name: str) -> None:
    """Raise `UpdateError` (reason "signature") unless ``name`` signed the digest."""
    if not isinstance(signature, bytes) or len(signature) != 64:
        raise UpdateError(
            f"client {name!r} sent no signature; start its SuperNode with identity=KEY in "
            "--node-config",
            reason="signature",
        )
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, digest)
    except (InvalidSignature, ValueError) as error:
        raise UpdateError(
            f"the signature does not fit client {name!r}; the update was altered or comes from "
            "someone else",
            reason="signature",
        ) from error
