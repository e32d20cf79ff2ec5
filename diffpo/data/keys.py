"""Keys of caches and copies."""

from __future__ import annotations

import json
from hashlib import blake2b


def content_key(*parts: object) -> str:
    """A hash of ``parts``, everything that the cached values depend on."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
