"""What a run was trained on, in a few words and one hash, for its record and its model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Fingerprinted(Protocol):
    """A dataset that can name what it holds."""

    def fingerprint(self) -> str | None:
        """A sha256 of what the dataset holds; None where that can't be told."""
        ...


def data_facts(dataset: Any) -> dict[str, Any]:
    """{"source", "items", "sha256"}: class, length and a hash of what the dataset holds; and
    "buckets" where it is to be put into those, "degradation" where images are made smaller.

    The hash is None for a stream, and for a dataset of the user's own class without `fingerprint`.
    """
    sha256 = dataset.fingerprint() if isinstance(dataset, Fingerprinted) else None
    buckets = {"buckets": True} if getattr(dataset, "by_ratio", False) else {}
    rule = getattr(dataset, "degradation", None)
    made = {} if rule is None else {"degradation": rule.model_dump()}
    facts = {"source": type(dataset).__name__, "items": len(dataset), "sha256": sha256}
    return {**facts, **buckets, **made}


def list_digest(values: Iterable[Any]) -> str:
    """sha256 of the values as a JSON list, which is never held."""
    sha, joint = hashlib.sha256(b"["), b""
    for value in values:
        sha.update(joint + json.dumps(value, sort_keys=True, default=str).encode())
        joint = b", "
    sha.update(b"]")
    return sha.hexdigest()
