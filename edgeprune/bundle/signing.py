"""Ed25519 signatures of bundles, over the manifest, and of the engines in them, over their records.

The manifest has the sha256 of every file that is loaded, the records have those of the engines. A signature lies beside what it
signs, as signature.json. The signed text begins with its purpose, so that no signature of one kind is valid as one of the other:

    edgeprune bundle signature 1            edgeprune engines signature 1
    manifest.json sha256 HEX                manifest.json sha256 HEX
                                            engines/engines.json sha256 HEX

Engines that are not signed are trusted where they were built alone: see docs/bundles.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BundleError, EdgePruneError, EngineError, UsageError, require_extra
from edgeprune.io.files import write_new, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature.json"
ENGINE_RECORDS = "engines/engines.json"
TrustedKeys = Sequence[str | os.PathLike[str] | bytes]  # public keys: paths or contents of PEM files
_SCHEMA, _MANIFEST = 1, "manifest.json"
_KEYGEN_HINT = "Make one with: edgeprune keygen KEY.pem"


@dataclass(frozen=True)
class _Kind:
    # What a signature can be of. `changed`: the message, by field of the signature, when a file has another sha256.
    error: type[EdgePruneError]
    hint: str
    changed: Mapping[str, str]


_BUNDLE = _Kind(
    BundleError,
    "Ask whoever made it to sign it: edgeprune sign BUNDLE --key KEY.pem",
    {"manifest_sha256": "The manifest of {} was changed after it had been signed."},
)
_ENGINES = _Kind(
    EngineError,
    "Sign engines where they are built: edgeprune build BUNDLE --sign KEY.pem",
    {
        "manifest_sha256": "{} was signed for another bundle: the manifest has another sha256.",
        "engines_sha256": "The records in {} were changed after they had been signed.",
    },
)


@dataclass(frozen=True)
class Signature:
    """A signature in hexadecimal digits; `key` is the sha256 of the public key's 32 bytes.

    `engines_sha256`: that of the engines' records, in their signature; empty in a bundle's.
    """

    key: str
    manifest_sha256: str
    signature: str
    engines_sha256: str = ""

    def save(self, folder: Path) -> None:
        """Write signature.json into a folder: a bundle's, or that of its engines."""
        values = {name: value for name, value in asdict(self).items() if value}
        write_text(folder / SIGNATURE, json.dumps({"schema_version": _SCHEMA, **values}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Signature:
        """Read signature.json; raise BundleError if it is missing or malformed."""
        return _load(folder, _BUNDLE)


def make_key(path: Path) -> tuple[Path, str]:
    """Write a new private key to `path`, readable by its owner only, and the public key beside it; return the latter's path and id.

    Both are PEM files that openssl reads. Raises UsageError if one of them exists.
    """
    require_extra("sign", "cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_suffix(".pub")
    if public == path:
        raise UsageError(f"{path} is the name of a public key.", hint="Give the private one: edgeprune keygen KEY.pem")
    for file in (path, public):
        if os.path.lexists(file):
            raise _exists_error(file)
    key = Ed25519PrivateKey.generate()
    private_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        write_new(path, private_pem, private=True)
        write_new(public, public_pem)
    except FileExistsError as error:
        raise _exists_error(Path(error.filename)) from error
    return public, key_id(key.public_key())


def sign_manifest(folder: Path, key: Path, *, force: bool = False) -> Signature:
    """Sign the manifest of a bundle with the private key in a PEM file, and write signature.json.

    The bundle's files are not checked: load the bundle first. Raises UsageError if the file is no Ed25519 private key, or if the
    bundle is signed already and `force` is false.
    """
    if (folder / SIGNATURE).exists() and not force:
        raise UsageError(f"{folder} is signed already.", hint="Use --force to replace the signature.")
    private = read_private_key(key)
    digest = hashlib.sha256(_manifest_bytes(folder)).hexdigest()
    signature = Signature(key_id(private.public_key()), digest, private.sign(signed_text(digest)).hex())
    signature.save(folder)
    return signature


def sign_engines(folder: Path, key: Path) -> Signature:
    """Sign the records of a bundle's engines with the private key in a PEM file, and write engines/signature.json.

    Whether the engines are those of the records is not checked. Raises UsageError if the file is no Ed25519 private key.
    """
    private, records = read_private_key(key), folder / ENGINE_RECORDS
    manifest, engines = (hashlib.sha256(content).hexdigest() for content in (_manifest_bytes(folder), records.read_bytes()))
    signed = private.sign(signed_text(manifest, engines)).hex()
    signature = Signature(key_id(private.public_key()), manifest, signed, engines)
    signature.save(records.parent)
    return signature


def check_signature(folder: Path, manifest: bytes, trusted: TrustedKeys) -> str:
    """Return the id of the trusted key that signed the manifest, given by its bytes; raise BundleError if none did.

    Raises UsageError for a trusted key that is not an Ed25519 public key.
    """
    return _check(folder, _BUNDLE, trusted, hashlib.sha256(manifest).hexdigest())


def check_engines_signature(folder: Path, records: bytes, trusted: TrustedKeys) -> str:
    """Return the id of the trusted key that signed the records of a bundle's engines, given by their bytes, for its manifest.

    Raises EngineError if none did, and UsageError for a trusted key that is not an Ed25519 public key.
    """
    digests = (hashlib.sha256(content).hexdigest() for content in (_manifest_bytes(folder), records))
    return _check((folder / ENGINE_RECORDS).parent, _ENGINES, trusted, *digests)


def signed_text(manifest_sha256: str, engines_sha256: str | None = None) -> bytes:
    """Return the bytes that are signed: of a bundle, or of its engines if the sha256 of their records is given."""
    purpose, files = "bundle", {_MANIFEST: manifest_sha256}
    if engines_sha256 is not None:
        purpose, files = "engines", {**files, ENGINE_RECORDS: engines_sha256}
    lines = [f"edgeprune {purpose} signature 1", *(f"{name} sha256 {digest}" for name, digest in files.items())]
    return "".join(f"{line}\n" for line in lines).encode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return the sha256 of a public key's 32 bytes in hexadecimal digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file; raise UsageError if it has no Ed25519 private key."""
    require_extra("sign", "cryptography")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"Cannot read the key {path}: {error.strerror}.", hint=_KEYGEN_HINT) from error
    except TypeError as error:  # raised only for a missing password
        raise UsageError(
            f"{path} is locked by a password.", hint="Unlock a copy: openssl pkey -in KEY.pem -out OPEN.pem"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no private key in PEM form.", hint=_KEYGEN_HINT) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key.", hint=_KEYGEN_HINT)
    return key


def _public_key(source: str | os.PathLike[str] | bytes) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    name = "The key" if isinstance(source, bytes) else str(os.fspath(source))
    try:
        key: Any = load_pem_public_key(source if isinstance(source, bytes) else Path(source).read_bytes())
    except OSError as error:
        raise UsageError(f"Cannot read the key {name}: {error.strerror}.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{name} is no public key in PEM form.", hint="It is KEY.pub, beside the private KEY.pem.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{name} is no Ed25519 key.", hint=_KEYGEN_HINT)
    return key


def _load(folder: Path, kind: _Kind) -> Signature:
    try:
        data = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        if data.pop("schema_version") != _SCHEMA:
            raise kind.error(f"{folder} has a signature of another schema.", hint="Sign it again with this version.")
        signature = Signature(**data)
        for value in asdict(signature).values():
            bytes.fromhex(value)
    except FileNotFoundError as error:
        raise kind.error(f"{folder} is not signed: it has no {SIGNATURE}.", hint=kind.hint) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise kind.error(f"{folder / SIGNATURE} is malformed: {error!r}.", hint="Sign it again.") from error
    return signature


def _check(folder: Path, kind: _Kind, trusted: TrustedKeys, *digests: str) -> str:
    # `digests`: what `signed_text` takes.
    require_extra("sign", "cryptography")
    from cryptography.exceptions import InvalidSignature

    keys = {key_id(key): key for key in map(_public_key, trusted)}
    signature = _load(folder, kind)
    if signature.key not in keys:
        ids = ", ".join(key[:16] for key in keys)
        message = f"{folder} is signed with the key {signature.key[:16]}, which is none of those required ({ids})."
        raise kind.error(message, hint=kind.hint)
    for (name, message), digest in zip(kind.changed.items(), digests, strict=True):
        if getattr(signature, name) != digest:
            raise kind.error(message.format(folder), hint=kind.hint)
    try:
        keys[signature.key].verify(bytes.fromhex(signature.signature), signed_text(*digests))
    except InvalidSignature as error:
        message = f"The signature of {folder} is wrong: it was not made with the key that it names."
        raise kind.error(message, hint=kind.hint) from error
    return signature.key


def _manifest_bytes(folder: Path) -> bytes:
    try:
        return (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"Cannot read {folder / _MANIFEST}: {error.strerror}.") from error


def _exists_error(path: Path) -> UsageError:
    return UsageError(f"{path} exists already, and a key is never replaced.", hint="Give another name.")
