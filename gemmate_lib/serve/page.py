"""The server's own page at `/`: one prompt, two models, two answers side by side.

It is one document with its style and script in it, and asks nobody but the server it came from.
What a model wrote is put in as text; a policy by hashes stops any script but ours.
"""

import hashlib
from base64 import b64encode
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from fastapi import FastAPI


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page as HTML, and the headers it is sent with."""
    assets = resources.files("gemmate_lib") / "assets"
    html, style, script = ((assets / f"serve.{end}").read_text("utf-8")
                           for end in ("html.j2", "css", "js"))  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    made = environment.from_string(html).render(style=Markup(style), script=Markup(script))
    policy = (
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return made, {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _hash(source: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def add_page(app: "FastAPI") -> None:
    """Serve the page at `/`; it holds no secret, so that it needs no key."""
    from fastapi.responses import HTMLResponse

    @app.get("/", include_in_schema=False)
    def root() -> HTMLResponse:
        made, headers = page()
        return HTMLResponse(made, headers=headers)
