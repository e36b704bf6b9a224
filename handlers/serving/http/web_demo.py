"""Web demo at the root of the endpoint: one HTML file, whose policy allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "web_demo.html").read_bytes()


def wants_html(accept: str | None) -> bool:
    """Return whether an `Accept` header names HTML, as browsers do and health probes do not."""
    return "text/html" in (accept or "").lower()


def _hash(tag: str) -> str:
    """Return the hash of an element's content, for the content security policy. The page has one such element."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_hash('script')}",
        f"style-src {_hash('style')}",
        "img-src blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "same-origin",  # "no-referrer" makes some browsers hide the origin of a POST
    "Vary": "Accept",
    "X-Content-Type-Options": "nosniff",
}
