"""The web demo, which a browser gets at the endpoint's root: one file, which may run nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "web_demo.html").read_bytes()


def asks_for_page(accept: str | None) -> bool:
    """Whether the header is a browser's: it names HTML, and health probes do not."""
    return "text/html" in (accept or "").lower()


def _hash(tag: str) -> str:
    """Of what stands inside the page's one element of this name, as a content security policy has it."""
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
    "Referrer-Policy": "same-origin",  # with "no-referrer" some browsers hide the origin of a POST, too
    "Vary": "Accept",
    "X-Content-Type-Options": "nosniff",
}
