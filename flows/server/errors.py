"""Convert errors of the Prefect server to messages of tuneline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectException

from tuneline.errors import TunelineError


@contextmanager
def server_errors() -> Iterator[None]:
    """Raises TunelineError if the server rejects a request or does not answer."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:500]
        raise TunelineError(f"the Prefect server answers HTTP {error.response.status_code} to {error.request.url}: {text}") from None
    except PrefectException as error:
        raise TunelineError(f"the Prefect server rejects the request: {error}") from None
    except httpx.TransportError as error:
        raise TunelineError(f"the Prefect server does not answer: {error}", "run the command again once the server is up") from None
