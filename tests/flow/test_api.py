"""Settings are read from where Prefect reads them, and requests use their passwords and TLS."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, Project

from flows.server import api
from flows.server.connect import connect, find_server
from tuneline.errors import ConfigError

ENV = "http://env/api"
# The sources of settings: files by name, and variables.
CASES: list[dict[str, str]] = [
    {},
    {".env": f"PREFECT_API_URL={ENV}\nPREFECT_API_AUTH_STRING='me:x'"},
    {".env": "prefect_api_url=http://small/api"},
    {"prefect.toml": f'[api]\nurl = "{ENV}"\ntls_insecure_skip_verify = true\n[client]\ncustom_headers = {{a = "b"}}'},
    {"pyproject.toml": f'[tool.prefect.api]\nurl = "{ENV}"\nkey = "k"'},
    {"pyproject.toml": '[tool.other]\nx = 1'},
    {"prefect.toml": '[api]\nurl = "http://toml/api"', ".env": "PREFECT_API_URL=http://dotenv/api", "PREFECT_API_URL": ENV},
    {"prefect.toml": '[api]\nurl = "http://toml/api"', "pyproject.toml": '[tool.prefect.api]\nurl = "http://py/api"'},
    {"prefect.toml": '[api]\nurl = "http://toml/api"', ".env": "PREFECT_API_URL=http://dotenv/api"},
    {"prefect.toml": '[api]\nurl = "http://toml/api"', "PREFECT_API_URL": ""},
    {"home/profiles.toml": f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{ENV}"\nPREFECT_API_KEY = "k"'},
    {"home/profiles.toml": f'active = "no"\n[profiles.mine]\nPREFECT_API_URL = "{ENV}"'},
    {"home/profiles.toml": f'active = "no"\n[profiles.mine]\nPREFECT_API_URL = "{ENV}"', "PREFECT_PROFILE": "mine"},
    {"home/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://a/api"', "pyproject.toml": '[tool.prefect.api]\nurl = "http://py/api"'},
    {"other.toml": f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{ENV}"', "prefect.toml": 'profiles_path = "other.toml"'},
    {"other.toml": f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{ENV}"', ".env": "PREFECT_PROFILES_PATH=other.toml"},
    {"PREFECT_API_SSL_CERT_FILE": "/ca.pem", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY": "1", "PREFECT_CLIENT_CUSTOM_HEADERS": '{"a": "b"}'},
]  # fmt: skip
PREFECT = """
import json, os, sys
from prefect.settings import Settings

def secret(value):
    return value.get_secret_value() if value else None

found = []
for folder, variables in json.load(sys.stdin):
    os.chdir(folder)
    os.environ |= variables
    its = Settings()
    found.append([its.api.url, secret(its.api.auth_string), secret(its.api.key), its.api.ssl_cert_file,
                  its.api.tls_insecure_skip_verify, its.client.custom_headers])
    for name in variables:
        del os.environ[name]
print(json.dumps(found))
"""


def test_settings_are_those_that_prefect_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "SSL_CERT_FILE"))]:
        monkeypatch.delenv(name)
    tried, ours = [], []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        (folder / "home").mkdir(parents=True)
        variables = {"PREFECT_HOME": str(folder / "home")} | {name: value for name, value in case.items() if name.isupper()}
        for name, text in case.items():
            if not name.isupper():
                (folder / name).write_text(text)
        tried.append((str(folder), variables))
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in variables.items():
                patch.setenv(name, value)
            headers = api.setting(api.HEADERS) or {}
            ours.append(
                [
                    *map(api.setting, (api.URL, api.AUTH, api.KEY, api.CERTIFICATES)),
                    api.unverified(),
                    json.loads(headers) if isinstance(headers, str) else headers,
                ]
            )
    done = subprocess.run([sys.executable, "-c", PREFECT], input=json.dumps(tried), capture_output=True, text=True, check=True, cwd=ROOT)
    theirs = json.loads(done.stdout)
    for case, our, their in zip(CASES, ours, theirs, strict=True):
        assert our == [their[0] or None, *their[1:]], case
    assert sum(their[0] == ENV for their in theirs) == 8  # the cases differ


@pytest.mark.slow
def test_a_settings_file_that_cannot_be_read_is_an_error(project: Project) -> None:
    project.write("version: 1\npipelines: {p: {stages: {d: {kind: dataset, sources: [{type: files, path: x}]}}}}\n")
    project.write("api = [", "prefect.toml")
    assert project.tuneline("status", status=2).stderr.startswith("prefect.toml: found a file that cannot be read as TOML (")


# --- requests -------------------------------------------------------------------------------------------------------------


class Guarded(http.server.BaseHTTPRequestHandler):
    """A server that requires a password and records the headers of requests."""

    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        type(self).seen.append(dict(self.headers))
        health, right = self.path.endswith("/health"), self.headers.get("Authorization") in ("Basic bWU6eA==", "Bearer k")
        self.send_response(200 if health else 404 if right else 401)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=["http", "https"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Return its address, and the certificate that signed its own."""
    before = dict(os.environ)  # restored afterwards: connecting sets some
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(Guarded, "seen", [], raising=False)
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    certificate = tmp_path / "certificate.pem"
    if request.param == "https":
        certify(certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"{request.param}://127.0.0.1:{server.server_port}/api", certificate
    server.shutdown()
    server.server_close()
    os.environ.clear()
    os.environ.update(before)


def certify(file: Path) -> None:
    """Write a key and a self-signed certificate for 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    building = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    signed = building.add_extension(address, critical=False).sign(key, hashes.SHA256())
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain) + signed.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"PREFECT_API_AUTH_STRING": "me:x"}, ""),
        ({"PREFECT_API_KEY": "k"}, ""),
        ({}, "PREFECT_API_AUTH_STRING: found none, expected"),
        ({"PREFECT_API_AUTH_STRING": "me:y"}, "PREFECT_API_AUTH_STRING: found another one, expected"),
        ({"PREFECT_API_KEY": "j"}, "PREFECT_API_KEY: found another one, expected"),
    ],
)
def test_a_server_is_asked_with_the_password_of_the_settings(
    guarded: tuple[str, Path], given: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, certificate = guarded
    (tmp_path / "prefect.toml").write_text(
        f'[api]\nurl = "{address}"\nssl_cert_file = "{certificate}"\n[client]\ncustom_headers = {{X-Door = "7"}}'
    )
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert find_server(tmp_path) == address
    if problem:
        with pytest.raises(ConfigError, match=problem):
            connect(tmp_path)
    else:
        assert connect(tmp_path) == os.environ["PREFECT_API_URL"] == address
    assert {seen["X-Door"] for seen in Guarded.seen} == {"7"}


@pytest.mark.parametrize("guarded", ["https"], indirect=True)
def test_a_certificate_that_nobody_vouches_for_is_refused_unless_told(
    guarded: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", guarded[0])
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:x")
    with pytest.raises(ConfigError, match="certificate verify failed(?s:.*)hint: PREFECT_API_SSL_CERT_FILE must name a file"):
        connect(tmp_path)
    monkeypatch.setenv("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "true")
    assert connect(tmp_path) == guarded[0]
    with pytest.raises(urllib.error.HTTPError):
        api.ask(f"{guarded[0]}/flows/name/tuneline")


def test_a_socks_proxy_does_not_stand_in_the_way_of_loopback(project: Project) -> None:
    """Without socksio, httpx fails on such a proxy at once, for any address."""
    import httpx

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        httpx.Client().close()
