"""Cheap connects: one TLS context for an engine, which never is another than the user's choice."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import typing as t
from pathlib import Path

import pymysql
import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flask_commondb import pools
from flask_commondb.dialects import dialect_for
from flask_commondb.options import PoolSettings
from flask_commondb.patience import Patience

from .apps import Lab
from .conftest import started
from .servers import MariaDBCluster
from .servers import MariaDBServer

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy


class Authority:
    """Signs certificates; each object is one that nobody else trusts."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(f"{name}.pem", self._sign(self._name, self._key, is_authority=True))

    def certify(self, name: str) -> tuple[Path, Path]:
        """A certificate for this machine, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        certificate = self._write(f"{name}.pem", self._sign(subject, key, is_authority=False))
        key_file = self.directory / f"{name}.key"
        key_file.write_bytes(private)
        return certificate, key_file

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool
    ) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, content: bytes) -> Path:
        file = self.directory / name
        file.write_bytes(content)
        return file


class EncryptedServer(MariaDBServer):
    """A MariaDB that speaks TLS."""

    tls: tuple[Path, Path]

    def _argv(self) -> list[str]:
        certificate, key = self.tls
        return [*super()._argv(), f"--ssl-cert={certificate}", f"--ssl-key={key}"]


class EncryptedCluster(MariaDBCluster):
    """One such server."""

    def __init__(self, tls: tuple[Path, Path]) -> None:
        super().__init__()
        self._tls = tls

    def _make_servers(self, directory: Path) -> list[MariaDBServer]:
        server = EncryptedServer(directory / "1", 1, read_only=False)
        server.tls = self._tls
        return [server]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def encrypted(authority: Authority) -> c.Iterator[MariaDBServer]:
    authority.directory.chmod(0o755)
    with started(EncryptedCluster(authority.certify("server"))) as cluster:
        yield cluster.primary


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLContext]:
    """The TLS contexts that are made from now on."""
    contexts: list[ssl.SSLContext] = []
    original = ssl.create_default_context

    def create(*args: t.Any, **kwargs: t.Any) -> ssl.SSLContext:
        contexts.append(original(*args, **kwargs))
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", create)
    return contexts


def plain(server: MariaDBServer, **connect_args: t.Any) -> str:
    """What PyMySQL itself makes of the user's choice: the cipher, or what it complains of."""
    url = sa.make_url(server.url())
    try:
        connection = pymysql.connect(
            host="127.0.0.1", port=url.port or 0, user="app", password="app", **connect_args
        )
    except pymysql.err.OperationalError as error:
        return str(error)
    with connection, connection.cursor() as cursor:
        cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
        return str(cursor.fetchone()[1])


def lab_for(server: MariaDBServer, **connect_args: t.Any) -> Lab:
    return Lab(
        server.url(),
        config={"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": connect_args}},
    )


def verified_by(authority: Path) -> dict[str, t.Any]:
    return {"ssl_ca": str(authority), "ssl_verify_cert": True, "ssl_verify_identity": True}


def ciphers(lab: Lab, connections: int = 3) -> set[str]:
    """What so many new connections are encrypted with, as the server sees it."""
    engine = lab.engines[0]
    engine.dispose()
    held = [engine.connect() for _ in range(connections)]
    seen = {
        connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'").one()[1] for connection in held
    }
    for connection in held:
        connection.close()
    return seen


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"ssl": {"check_hostname": False, "verify_mode": "none"}},
        {"ssl_verify_cert": False, "ssl_verify_identity": False},
    ],
    ids=["none", "dict", "words"],
)
def test_one_context(
    encrypted: MariaDBServer, made: list[ssl.SSLContext], choice: dict[str, t.Any]
) -> None:
    """All connections of an engine have one TLS context, and the cipher they would have had."""
    expected = plain(encrypted, **choice)
    made.clear()
    lab = lab_for(encrypted, **choice)
    assert ciphers(lab) == {expected}
    assert ciphers(lab) == {expected}
    assert len(made) == bool(expected)
    lab.dispose()


def test_server_without_tls(mariadb: MariaDBCluster, made: list[ssl.SSLContext]) -> None:
    """With no choice made, a server without TLS is talked to in the clear, as PyMySQL does."""
    lab = lab_for(mariadb.primary)
    assert ciphers(lab) == {""}
    assert len(made) <= 1
    lab.dispose()


def test_required(mariadb: MariaDBCluster) -> None:
    """TLS that was asked for is done without exactly when PyMySQL does, which 1.2 never does."""
    choice = {"ssl": {"check_hostname": False, "verify_mode": "none"}}
    expected = plain(mariadb.primary, **choice)
    lab = lab_for(mariadb.primary, **choice)
    for _ in range(2):
        if expected:
            with pytest.raises(sa.exc.OperationalError, match="SSL is required"):
                lab.engines[0].connect()
        else:
            assert ciphers(lab) == {""}
    lab.dispose()


def test_disabled(encrypted: MariaDBServer, made: list[ssl.SSLContext]) -> None:
    """Who wants no TLS gets none."""
    lab = lab_for(encrypted, ssl_disabled=True)
    assert ciphers(lab) == {""}
    assert made == []
    lab.dispose()


def test_verified(
    encrypted: MariaDBServer, authority: Authority, stranger: Authority, made: list[t.Any]
) -> None:
    """Each connection verifies the server, whatever another engine does."""
    careless = lab_for(encrypted, ssl={"check_hostname": False, "verify_mode": "none"})
    assert "" not in ciphers(careless)
    verified = lab_for(encrypted, **verified_by(authority.file))
    assert "" not in ciphers(verified)
    suspicious = lab_for(encrypted, **verified_by(stranger.file))
    for _ in range(2):
        with pytest.raises(sa.exc.OperationalError, match=r"(?i)certificate verify failed"):
            suspicious.engines[0].connect()
    assert len(made) == 3
    assert made[0].verify_mode is ssl.CERT_NONE
    assert made[1].verify_mode is made[2].verify_mode is ssl.CERT_REQUIRED
    assert made[1].check_hostname
    for lab in (careless, verified, suspicious):
        lab.dispose()


def test_context_of_the_user(encrypted: MariaDBServer, authority: Authority) -> None:
    """A context that the user has made is used as it is."""
    context = ssl.create_default_context(cafile=authority.file)
    handshakes: list[t.Any] = []
    original = context.wrap_socket
    context.wrap_socket = lambda *args, **kwargs: (  # type: ignore[method-assign]
        handshakes.append(args) or original(*args, **kwargs)  # type: ignore[func-returns-value]
    )
    lab = lab_for(encrypted, ssl=context)
    assert "" not in ciphers(lab, 3)
    assert len(handshakes) == 3
    lab.dispose()


def test_renewed_file(
    encrypted: MariaDBServer, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """An authority that is taken off the list is not trusted any more, without a restart."""
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.file.read_bytes())
    lab = lab_for(encrypted, **verified_by(trusted))
    assert "" not in ciphers(lab)
    trusted.write_bytes(stranger.file.read_bytes())
    os.utime(trusted, ns=(1, 1))
    with pytest.raises(sa.exc.OperationalError, match=r"(?i)certificate verify failed"):
        ciphers(lab)
    trusted.write_bytes(authority.file.read_bytes())
    assert "" not in ciphers(lab)
    lab.dispose()


def test_missing_file(encrypted: MariaDBServer, tmp_path: Path) -> None:
    """A file that is not there is the driver's error, each time."""
    lab = lab_for(encrypted, ssl_ca=str(tmp_path / "none.pem"))
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="No such file"):
            lab.engines[0].connect()
    lab.dispose()


def test_silence(encrypted: MariaDBServer, authority: Authority, proxy: MakeProxy) -> None:
    """With TLS, too, the slow are waited for, and the dead are found out, mid-answer as well."""
    link = proxy(encrypted.port, None)
    engine = sa.create_engine(
        sa.make_url(encrypted.url()).set(port=link.port),
        connect_args={"ssl": {"ca": str(authority.file)}},
    )
    pools.prepare(engine, PoolSettings(), None, lambda: None)
    dialect_for(engine).be_patient(Patience(engine, dialect_for(engine)))
    t.cast(t.Any, engine.dialect.connect).patience.seconds = 0.2
    many = sa.text("SELECT REPEAT('x', 1000) FROM seq_1_to_20000")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT SLEEP(0.5)")) == 0
        assert len(connection.scalars(many).all()) == 20_000
        result = connection.execution_options(stream_results=True).execute(many)
        assert result.fetchone()
        link.stall()
        with pytest.raises(sa.exc.OperationalError, match="Lost connection") as caught:
            result.fetchall()
        assert caught.value.connection_invalidated
    link.resume()
    with engine.connect() as connection:
        cipher = connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'").one()[1]
        assert cipher
    engine.dispose()
