"""Signatures of bundles: Ed25519, over the manifest, which has the sha256 of every file that is loaded.

signature.json lies beside the manifest. What is signed is a text that nothing else signs with such a key would look like, so that a
signature of one thing cannot be passed off as one of another:

    edgeprune bundle signature 1
    manifest.json sha256 HEX

Engines that a device builds later are not signed by this key: see docs/bundles.md for what they hang on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BundleError, UsageError, require_extra
from edgeprune.io.files import write_new, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature.json"
TrustedKeys = Sequence[str | os.PathLike[str] | bytes]  # public keys: paths of PEM files, or what is in them
_SCHEMA, _MANIFEST = 1, "manifest.json"
_SIGN = "Ask whoever made it to sign it: edgeprune sign BUNDLE --key KEY.pem"
_MAKE = "Make one with: edgeprune keygen KEY.pem"


@dataclass(frozen=True)
class Signature:
    """Who signed which manifest: `key`, the sha256 of the public key's 32 bytes, and `signature`, all in hexadecimal digits."""

    key: str
    manifest_sha256: str
    signature: str

    def save(self, folder: Path) -> None:
        """Write signature.json into a bundle."""
        write_text(folder / SIGNATURE, json.dumps({"schema_version": _SCHEMA, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Signature:
        """Read signature.json; raise BundleError when there is none, or one that cannot be read."""
        try:
            data = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
            if data.pop("schema_version") != _SCHEMA:
                raise BundleError(f"{folder} has a signature of another schema.", hint="Sign it again with this version.")
            found = cls(**data)
            for value in asdict(found).values():
                bytes.fromhex(value)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} is not signed: it has no {SIGNATURE}.", hint=_SIGN) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(f"{folder / SIGNATURE} is malformed: {error!r}.", hint="Sign the bundle again.") from error
        return found


def make_key(path: Path) -> tuple[Path, str]:
    """Write a new private key to `path`, which its user alone can read, and its public key beside it; return that path and the id.

    Both are PEM files, as openssl reads them. Raises UsageError when one of them exists.
    """
    require_extra("sign", "cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_suffix(".pub")
    if public == path:
        raise UsageError(f"{path} is the name of a public key.", hint="Give the private one: edgeprune keygen KEY.pem")
    for each in (path, public):
        if os.path.lexists(each):
            raise _taken(each)
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    open_text = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        write_new(path, secret, private=True)
        write_new(public, open_text)
    except FileExistsError as error:
        raise _taken(Path(error.filename)) from error
    return public, key_id(key.public_key())


def sign_manifest(folder: Path, key: Path, *, force: bool = False) -> Signature:
    """Sign the manifest of a bundle with the private key in a PEM file, and write signature.json.

    The files are not looked at: open the bundle first. Raises UsageError for a file that is no such key, and when the bundle is
    signed already, `force` not given.
    """
    require_extra("sign", "cryptography")
    if (folder / SIGNATURE).exists() and not force:
        raise UsageError(f"{folder} is signed already.", hint="Use --force to replace the signature.")
    private = _private_key(key)
    digest = hashlib.sha256(_manifest_bytes(folder)).hexdigest()
    signature = Signature(key_id(private.public_key()), digest, private.sign(signed_text(digest)).hex())
    signature.save(folder)
    return signature


def check_signature(folder: Path, manifest: bytes, trusted: TrustedKeys) -> str:
    """Raise BundleError unless the manifest of a bundle, given by its bytes, is signed with one of the trusted keys; return its id.

    Raises UsageError for a trusted key that is none.
    """
    require_extra("sign", "cryptography")
    from cryptography.exceptions import InvalidSignature

    keys = {key_id(key): key for key in map(_public_key, trusted)}
    found, digest = Signature.load(folder), hashlib.sha256(manifest).hexdigest()
    if found.key not in keys:
        wanted = ", ".join(key[:16] for key in keys)
        raise BundleError(f"{folder} is signed with the key {found.key[:16]}, which is none of those required ({wanted}).")
    if found.manifest_sha256 != digest:
        raise BundleError(f"The manifest of {folder} was changed after it had been signed.", hint=_SIGN)
    try:
        keys[found.key].verify(bytes.fromhex(found.signature), signed_text(digest))
    except InvalidSignature as error:
        raise BundleError(f"The signature of {folder} is wrong: it was not made with the key that it names.", hint=_SIGN) from error
    return found.key


def signed_text(manifest_sha256: str) -> bytes:
    """Return what is signed."""
    return f"edgeprune bundle signature 1\n{_MANIFEST} sha256 {manifest_sha256}\n".encode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return the sha256 of a public key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"Cannot read the key {path}: {error.strerror}.", hint=_MAKE) from error
    except TypeError as error:  # and nothing else is meant by it
        raise UsageError(
            f"{path} is locked by a password.", hint="Unlock a copy: openssl pkey -in KEY.pem -out OPEN.pem"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no private key in PEM form.", hint=_MAKE) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key.", hint=_MAKE)
    return key


def _public_key(given: str | os.PathLike[str] | bytes) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    name = "The key" if isinstance(given, bytes) else str(os.fspath(given))
    try:
        key: Any = load_pem_public_key(given if isinstance(given, bytes) else Path(given).read_bytes())
    except OSError as error:
        raise UsageError(f"Cannot read the key {name}: {error.strerror}.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{name} is no public key in PEM form.", hint="It is KEY.pub, beside the private KEY.pem.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{name} is no Ed25519 key.", hint=_MAKE)
    return key


def _manifest_bytes(folder: Path) -> bytes:
    try:
        return (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"Cannot read {folder / _MANIFEST}: {error.strerror}.") from error


def _taken(path: Path) -> UsageError:
    return UsageError(f"{path} exists already, and a key is never replaced.", hint="Give another name.")
