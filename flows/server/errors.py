"""What a Prefect server refuses, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectException

from tuneline.errors import TunelineError


@contextmanager
def told_errors() -> Iterator[None]:
    """A server's refusal, or its absence, in our words."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:500]
        raise TunelineError(f"the Prefect server answers HTTP {error.response.status_code} to {error.request.url}: {text}") from None
    except PrefectException as error:
        raise TunelineError(f"the Prefect server rejects the request: {error}") from None
    except httpx.TransportError as error:
        raise TunelineError(f"the Prefect server does not answer: {error}", "run the command again once the server is up") from None
