"""Files that options name: certificates, and secrets that two sides share."""

from pathlib import Path


def read_bytes(file: str, option: str) -> bytes:
    """Raises ValueError, which names the option, when the file cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--{option} {file!r} cannot be read ({error.strerror}); name a file.") from None


def read_secret(file: str, option: str) -> str:
    """The secret in a file, without white space around it. Raises ValueError when there is none."""
    secret = read_bytes(file, option).decode(errors="replace").strip()
    if not secret.isascii() or not secret.isprintable() or len(secret) < 16:
        raise ValueError(
            f"--{option} {file!r} holds no secret of 16 or more printable characters; make one: openssl rand -hex 32."
        )
    return secret
