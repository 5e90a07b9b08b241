"""Prefect's settings and small requests to its server, without the seconds that importing Prefect takes.

A setting is looked for where Prefect looks, in its order: the environment, `.env`, `prefect.toml` and `pyproject.toml` of the current
folder, the active profile. A test compares what is found with what Prefect finds. What is more than a few requests goes through
Prefect's own client.
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

SECONDS = 10.0  # for an answer
URL, AUTH, KEY = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"
CERTIFICATES, UNVERIFIED = "PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY"
HEADERS = "PREFECT_CLIENT_CUSTOM_HEADERS"
# Their tables in TOML files; elsewhere they have the names above.
TABLES = {URL: "api.url", AUTH: "api.auth_string", KEY: "api.key", CERTIFICATES: "api.ssl_cert_file", HEADERS: "client.custom_headers"}
TABLES |= {UNVERIFIED: "api.tls_insecure_skip_verify"}


def setting(name: str) -> Any:
    """The value of one of the settings above; None where it is not set, or set to nothing."""
    for source in _sources():
        if name in source:
            return source[name] or None
    return None


def _sources() -> Iterator[Mapping[str, Any]]:
    """What sets something, the strongest first."""
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
    """Empty where it is not there. Raises ConfigError where it cannot be read: what it was to say is not known."""
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
    """The JSON that the server answers, with Prefect's settings for passwords and TLS. A `body` is sent as JSON. Raises OSError, of which
    urllib.error.HTTPError is one (closed), and ValueError for an address or an answer that is none."""
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
    """Whether any certificate will do."""
    return str(setting(UNVERIFIED)).lower() in ("1", "true", "t", "yes", "y", "on")


def _tls() -> ssl.SSLContext:
    if unverified():
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    import certifi  # as Prefect's client does

    return ssl.create_default_context(cafile=setting(CERTIFICATES) or os.environ.get("SSL_CERT_FILE") or certifi.where())


def admitted(address: str) -> None:
    """Raises ConfigError where the server refuses our password or key."""
    try:
        ask(f"{address}/flows/name/tuneline")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return  # 404: there is no such flow, and we may ask
        name = KEY if setting(KEY) and not setting(AUTH) else AUTH
        found = f"found {'another one' if setting(name) else 'none'}, expected the one that {address} requires (HTTP {error.code})"
        hint = "`export PREFECT_API_KEY=...`" if name == KEY else "`export PREFECT_API_AUTH_STRING=user:password`"
        raise ConfigError([Problem("", found, hint, place=name)]) from None
    except (OSError, ValueError):
        return  # that it does not answer is said elsewhere
