"""Read Prefect's settings and make small requests to its server, without importing Prefect, which takes seconds.

Settings are read from the same places as Prefect's, in its order: the environment, `.env`, `prefect.toml` and `pyproject.toml` of the
current folder, the active profile. A test compares the results with Prefect's. Larger exchanges use Prefect's own client.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tuneline.errors import ConfigError, Problem

SECONDS = 10.0  # timeout of a request
URL, AUTH, KEY = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"
CERTIFICATES, UNVERIFIED = "PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY"
HEADERS = "PREFECT_CLIENT_CUSTOM_HEADERS"
# Their names in TOML files; elsewhere they have the names above.
TABLES = {URL: "api.url", AUTH: "api.auth_string", KEY: "api.key", CERTIFICATES: "api.ssl_cert_file", HEADERS: "client.custom_headers"}
TABLES |= {UNVERIFIED: "api.tls_insecure_skip_verify"}


def setting(name: str) -> Any:
    """Return the value of one of the settings above, or None if it is unset or empty."""
    for source in _sources():
        if name in source:
            return source[name] or None
    return None


def _sources() -> Iterator[Mapping[str, Any]]:
    """Yield the sources of settings, highest priority first."""
    yield {name.upper(): value for name, value in os.environ.items()}
    dotenv = _dotenv()
    yield dotenv
    project, python_project = _toml(Path("prefect.toml")), _toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {})
    yield _flat(project)
    yield _flat(python_project)
    home = os.environ.get("PREFECT_HOME")
    chosen = os.environ.get("PREFECT_PROFILES_PATH") or dotenv.get("PREFECT_PROFILES_PATH")
    chosen = chosen or project.get("profiles_path") or python_project.get("profiles_path")
    profiles = _toml(Path(chosen) if chosen else Path(home or "~/.prefect").expanduser() / "profiles.toml")
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    yield profiles.get("profiles", {}).get(active, {})


def _dotenv() -> dict[str, Any]:
    if not Path(".env").is_file():
        return {}
    from dotenv import dotenv_values

    return {name.upper(): value for name, value in dotenv_values(".env").items()}


def _toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, empty if it does not exist. Raises ConfigError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            [Problem("", f"found a file that cannot be read as TOML ({error})", "Prefect's settings are read from it", place=str(path))]
        ) from None


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, path in TABLES.items():
        table, _, field = path.partition(".")
        if isinstance(tables.get(table), Mapping) and field in tables[table]:
            found[name] = tables[table][field]
    return found


def ask(address: str, body: Any = None) -> Any:
    """Return the server's JSON answer to a GET, or to a POST of `body` as JSON. Uses Prefect's settings for passwords and TLS.

    Raises OSError, of which urllib.error.HTTPError (closed) is a subclass, and ValueError for an invalid address or answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **_headers()})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=_tls() if address.startswith("https:") else None) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _headers() -> dict[str, str]:
    custom, password, key = setting(HEADERS) or {}, setting(AUTH), setting(KEY)
    if isinstance(custom, str):
        with suppress(ValueError):
            custom = json.loads(custom)
    headers = {name: str(value) for name, value in custom.items()} if isinstance(custom, Mapping) else {}
    if password or key:
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}" if password else f"Bearer {key}"
    return headers


def unverified() -> bool:
    """Return whether certificates are not verified."""
    return str(setting(UNVERIFIED)).lower() in ("1", "true", "t", "yes", "y", "on")


def _tls() -> ssl.SSLContext:
    if unverified():
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    import certifi  # as Prefect's client does

    return ssl.create_default_context(cafile=setting(CERTIFICATES) or os.environ.get("SSL_CERT_FILE") or certifi.where())


def admitted(address: str) -> None:
    """Raises ConfigError if the server rejects our password or key."""
    try:
        ask(f"{address}/flows/name/tuneline")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return  # 404: no such flow, so the password was accepted
        name = KEY if setting(KEY) and not setting(AUTH) else AUTH
        found = f"found {'another one' if setting(name) else 'none'}, expected the one that {address} requires (HTTP {error.code})"
        hint = "`export PREFECT_API_KEY=...`" if name == KEY else "`export PREFECT_API_AUTH_STRING=user:password`"
        raise ConfigError([Problem("", found, hint, place=name)]) from None
    except (OSError, ValueError):
        return  # reported elsewhere: the server does not answer
