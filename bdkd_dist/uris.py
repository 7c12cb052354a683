"""Places that are named by URIs, and what of those may be kept and shown."""

import re
from urllib.parse import parse_qs, urlsplit

SECRETS = ("account_key", "client_secret", "sas_token", "secret_key", "session_token", "token")
"""Keys of a URI's query that must not be kept."""


def shown(root: str) -> str:
    """Return a path or URI without what may be secret in it: keys before the host and the query."""
    return re.sub(r"//[^@]*:.*@", "//", root.partition("?")[0]) if is_uri(root) else root


def has_secret(root: str) -> bool:
    """Return whether a URI holds a key that must not be kept."""
    if not is_uri(root):
        return False
    parts = urlsplit(root)
    return parts.password is not None or not parse_qs(parts.query).keys().isdisjoint(SECRETS)


def is_uri(root: str) -> bool:
    """Return whether a place is named by a URI, not by a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", root) is not None
