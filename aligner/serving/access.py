"""How services are reached: addresses, secrets, certificates."""

from dataclasses import dataclass

from aligner.run.secret import read_bytes, read_secret
from aligner.serving.grpc_transport import Connection, Tls
from aligner.serving.triton_transport import TritonConnection

TRITON = "triton://"  # before the address of a service over PyTriton


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    token_file: str = ""
    """File with the secret of the service."""
    tls_ca: str = ""
    """PEM file of the certificates that the service's own is signed by; with it the connection is encrypted."""
    tls_cert: str = ""
    """PEM file of the certificate to show to a service that asks for one."""
    tls_key: str = ""
    """PEM file of its private key."""

    def connect(self, address: str, options: str = "") -> Connection | TritonConnection:
        """To host:port over gRPC, to triton://host:port over PyTriton. options: their group, for errors.

        Raises ValueError when a file cannot be read.
        """
        prefix = f"{options}." if options else ""
        token = read_secret(self.token_file, f"{prefix}token-file") if self.token_file else ""
        given = {"authority": self.tls_ca, "chain": self.tls_cert, "key": self.tls_key}
        if (self.tls_cert or self.tls_key) and not all(given.values()):
            words = " and ".join(prefix + name for name in ("tls-cert", "tls-key", "tls-ca"))
            raise ValueError(f"{words} come together; give all three.")
        names = {"authority": "tls-ca", "chain": "tls-cert", "key": "tls-key"}
        read = {name: read_bytes(file, prefix + names[name]) for name, file in given.items() if file}
        tls = Tls(**read) if read else None
        if address.startswith(TRITON):
            return TritonConnection(address.removeprefix(TRITON), token=token, tls=tls)
        return Connection(address, token=token, tls=tls)
