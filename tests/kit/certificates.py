"""Certificates for tests, made by the openssl command."""

import shutil
import subprocess
from pathlib import Path

import pytest

_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"


def _openssl(arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A self-signed certificate of localhost with common name `name`, and its private key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    _openssl(
        f"req -x509 {_KEY} -subj /CN={name} -addext subjectAltName=DNS:localhost"
        f" -keyout {key} -out {cert}"
    )
    return cert, key


class Authority:
    """Signs certificates.

    Attributes:
        cert: its own certificate.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl(f"req -x509 {_KEY} -subj /CN={name} -keyout {self._key} -out {self.cert}")

    def sign(self, name: str, alt_names: str = "DNS:localhost") -> tuple[Path, Path]:
        """A certificate with common name `name`, and its private key."""
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        _openssl(
            f"req -x509 {_KEY} -CA {self.cert} -CAkey {self._key} -subj /CN={name}"
            f" -addext subjectAltName={alt_names} -addext basicConstraints=critical,CA:FALSE"
            f" -keyout {key} -out {cert}"
        )
        return cert, key
