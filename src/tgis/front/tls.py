"""TLS: certificates that are checked before they are used, and replaced while the server runs."""

import calendar
import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front.reload import BadFileError, Watched
from tgis.observe.metrics import Metrics

_PEM_END = b"-----END CERTIFICATE-----"
_EXPIRY_METRIC = "tgi_tls_certificate_expiry_seconds"


class KeyPair(NamedTuple):
    """A private key and its certificate, in PEM, that fit each other."""

    chain: bytes
    key: bytes
    client_ca: bytes | None  # authorities of clients' certificates; None = clients need none
    expires: float  # Unix time

    def load_into(self, context: ssl.SSLContext) -> None:
        """Let new handshakes of a context use it.

        Raises:
            BadFileError: it cannot be used.
        """
        with _as_file(self.chain) as chain, _as_file(self.key) as key:
            try:
                # Without the password function OpenSSL would ask on the terminal for one.
                context.load_cert_chain(chain, key, password=lambda: b"")
            except (ssl.SSLError, ValueError) as error:
                raise BadFileError(_reason(error)) from error


def make_pair(contents: list[bytes]) -> KeyPair:
    """Check what the files hold: chain, key, and the clients' authorities if there are any.

    Raises:
        BadFileError: a part is broken, or key and certificate do not fit.
    """
    chain, key, *rest = contents
    client_ca = rest[0] if rest else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = KeyPair(chain, key, client_ca, 0.0)
    pair.load_into(context)
    if client_ca is not None:
        try:
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise BadFileError(f"client ca cert: {_reason(error)}") from error
    return pair._replace(expires=_expiry(chain))


class Tls:
    """The certificates in use.

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        assert config.tls_cert_path is not None
        assert config.tls_key_path is not None
        paths = [Path(config.tls_cert_path), Path(config.tls_key_path)]
        if config.tls_client_ca_cert_path is not None:
            paths.append(Path(config.tls_client_ca_cert_path))
        self._metrics = metrics
        self._contexts: list[ssl.SSLContext] = []
        try:
            self.watched = Watched("tls", paths, make_pair, metrics, self._changed)
        except BadFileError as error:
            raise ConfigError(
                f"--tls-cert-path={paths[0]} and --tls-key-path={paths[1]}: "
                f"tls configuration error: {error}"
            ) from error
        metrics.set(_EXPIRY_METRIC, self.watched.value.expires)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials by which each handshake uses the pair of the moment."""
        first = self.watched.value
        return grpc.dynamic_ssl_server_credentials(
            _configuration(first),
            self._fetcher(first),  # type: ignore[arg-type]  # may return None
            require_client_authentication=first.client_ca is not None,
        )

    def http_context(self) -> ssl.SSLContext:
        """A context that follows the pair; clients need no certificate, since probes have none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.watched.value.load_into(context)
        self._contexts.append(context)
        return context

    def _changed(self, pair: KeyPair) -> None:
        self._metrics.set(_EXPIRY_METRIC, pair.expires)
        for context in self._contexts:
            pair.load_into(context)

    def _fetcher(self, first: KeyPair) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        """What gRPC calls before each handshake, on threads of its own; None = no change."""
        handed = first

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal handed
            pair = self.watched.value
            if pair is handed:
                return None
            handed = pair
            return _configuration(pair)

        return fetch


def _configuration(pair: KeyPair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], pair.client_ca)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path to bytes in memory: `ssl` reads files, and those on disk may change meanwhile."""
    fd = os.memfd_create("pem")
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or (error.args[-1] if error.args else error)
    return str(reason).replace("_", " ").lower()


def _expiry(chain: bytes) -> float:
    """When the first certificate of a chain expires, in Unix time.

    It is `tbsCertificate.validity.notAfter` of RFC 5280, read from the DER form.
    """
    try:
        return _time(_not_after(chain))
    except (ValueError, IndexError) as error:
        raise BadFileError("the certificate's time of expiry cannot be read") from error


def _not_after(chain: bytes) -> str:
    """Year with century to second, and `Z`."""
    first = chain[: chain.index(_PEM_END) + len(_PEM_END)].decode("ascii")
    der = ssl.PEM_cert_to_DER_cert(first[first.index("-----BEGIN CERTIFICATE") :])
    _, certificate, _ = _element(der, 0)
    _, offset, _ = _element(der, certificate)  # tbsCertificate
    tag, _, end = _element(der, offset)
    if tag == _VERSION_TAG:
        _, _, end = _element(der, end)  # serialNumber
    for _ in ("signature", "issuer"):
        _, _, end = _element(der, end)
    _, validity, _ = _element(der, end)
    _, _, not_before_end = _element(der, validity)
    tag, start, end = _element(der, not_before_end)
    text = der[start:end].decode("ascii")
    return text if tag == _GENERALIZED_TIME_TAG else _with_century(text)


_VERSION_TAG = 0xA0
_GENERALIZED_TIME_TAG = 0x18
_LONG_LENGTH = 0x80
_CENTURY_PIVOT = 50  # two digits of a year: 50 to 99 are 1950 to 1999


def _element(der: bytes, offset: int) -> tuple[int, int, int]:
    """Tag, and where the content of a DER element begins and ends."""
    tag, length, start = der[offset], der[offset + 1], offset + 2
    if length & _LONG_LENGTH:
        size = length & ~_LONG_LENGTH
        length, start = int.from_bytes(der[start : start + size], "big"), start + size
    return tag, start, start + length


def _with_century(text: str) -> str:
    return ("19" if int(text[:2]) >= _CENTURY_PIVOT else "20") + text


def _time(text: str) -> float:
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))
