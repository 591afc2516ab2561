"""Who may talk to the Lab: its own page, in a browser that was given the token.

* ``Host`` has to name this machine, so that no other name can be made to mean it.
* ``Origin`` and ``Sec-Fetch-Site``, which browsers set and pages cannot, have to be
  those of the page itself, so that a page elsewhere can neither act nor read.
* The token was printed in the terminal; the address with it is exchanged for a cookie.
"""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_TOKEN = (
    "Open the address that `mlx-optiq-ext lab` printed in the terminal: it holds the "
    "token without which nothing is shown here."
)
USUAL_PORT = 80  # Browsers leave it out.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Lets requests through that may come through.

    Args:
        app (ASGIApp): Behind it.
        token (str): That was printed.
        host (str): Where the Lab listens.
        port (int): Of the Lab, in the name of the cookie: browsers send cookies to
          every port of a host.
    """

    def __init__(self, app: ASGIApp, token: str, host: str, port: int):
        self._app = app
        self._token = token.encode()
        self._cookie = f"mlx_lab_{port}"
        names = {host if ":" not in host else f"[{host}]", "127.0.0.1", "localhost"}
        self._hosts = {f"{name}:{port}" for name in names}
        if port == USUAL_PORT:
            self._hosts |= names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        response = self._refuse(HTTPConnection(scope))
        answer = self._app if response is None else response
        await answer(scope, receive, _with_headers(send))

    def _refuse(self, request: HTTPConnection) -> Response | None:
        """What to answer instead, None for a request that may come through."""
        if request.headers.get("host", "") not in self._hosts:
            return PlainTextResponse("This is not the name of the Lab.", 403)
        if not self._is_from_page(request):
            return PlainTextResponse("This may only be asked by the Lab's page.", 403)
        if self._knows(request.cookies.get(self._cookie, "")):
            return self._without_token(request)
        if request.url.path == "/" and self._knows(_token_in(request)):
            return self._with_cookie()
        return PlainTextResponse(NO_TOKEN, 401)

    def _is_from_page(self, request: HTTPConnection) -> bool:
        origin = request.headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return False
        if request.url.path == "/" and request.scope["method"] == "GET":
            return True  # A link to the page may be anywhere.
        site = request.headers.get("sec-fetch-site", "none")
        return site in ("same-origin", "none")

    def _without_token(self, request: HTTPConnection) -> Response | None:
        """Send a browser on, so that the token is not kept in its address bar."""
        return RedirectResponse("/", 303) if _token_in(request) else None

    def _with_cookie(self) -> Response:
        """Give a browser the cookie, and send it on.

        A redirection would not do where a link to the Lab was followed: to a browser it
        comes from the page with the link, so that the cookie is not sent with it.
        """
        response = Response(headers={"Refresh": "0; url=/"})
        response.set_cookie(
            self._cookie, self._token.decode(), httponly=True, samesite="strict"
        )
        return response

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token)


def _token_in(request: HTTPConnection) -> str:
    return parse_qs(request.url.query).get("token", [""])[0]


def _with_headers(send: Send) -> Send:
    added = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return send_with_headers
