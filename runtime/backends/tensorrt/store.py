"""Store the engines of a bundle, and decide which of them may be loaded.

A serialized engine is code that runs with the rights of the process that loads it. Therefore only engines that this device built
are loaded. Their records are stored beside them and signed with a key that never leaves the device. Engines that arrive with a
copied bundle, or whose records somebody else wrote, must be rebuilt, unless the user names a public key that signed their records
(`build --sign`): then those it signed are loaded, and no others.

engines/engines.json    the records and the device's signature
engines/signature.json  a fleet's signature, if `build --sign` made one: see edgeprune.bundle.signing
engines/KEY.plan        one engine, named by the hash of its inputs

The key and the builder's timing cache are the device's: they lie in the user's data folder, and serve all bundles.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import EMBED, VISION_UNPRUNED, Bundle, files_of
from edgeprune.bundle.integrity import sha256_of
from edgeprune.bundle.signing import ENGINE_RECORDS, TrustedKeys, check_engines_signature
from edgeprune.errors import EdgePruneError, EngineError
from edgeprune.io.files import sweep, write_bytes, write_new, write_text
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, ShapeProfile, shape_profiles

FOLDER, RECORDS = "engines", ENGINE_RECORDS
REBUILD = "Build it here: edgeprune build BUNDLE"
_SIGN_AGAIN = "Leave --trust out and build it here, or on a board like this one: edgeprune build BUNDLE --sign KEY.pem"
_KEY_BYTES = 32


@dataclass(frozen=True)
class EngineRecord:
    """One engine: what it was built from and for, and the size and hash of its file.

    `sms`: streaming multiprocessors of the GPU in the power mode of the build; 0 in records that do not say. `processor`: that of
    the machine of the build, such as "aarch64"; empty in records that do not say.
    """

    graph: str
    key: str
    tensorrt: str
    capability: str
    precision: str
    limits: ProfileLimits
    level: int
    bytes: int
    sha256: str
    seconds: float
    sms: int = 0
    processor: str = ""

    @property
    def file(self) -> str:
        """The engine's path in the bundle."""
        return f"{FOLDER}/{self.key}.plan"


def engine_key(bundle: Bundle, graph: str, identity: DeviceIdentity, profiles: Sequence[ShapeProfile], level: int) -> str:
    """Return the key of an engine: a hash of graph, weights, TensorRT version, GPU, precision, profiles and builder level."""
    files = bundle.manifest.files
    weights = {name: record.sha256 for name, record in files.items() if name in files_of(graph)}
    gpu = {"tensorrt": identity.tensorrt, "capability": identity.capability}
    inputs = [weights, gpu, bundle.manifest.precision, list(profiles), level]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def usable_engines(
    bundle: Bundle, store: Store, identity: DeviceIdentity
) -> dict[str, tuple[EngineRecord, tuple[ShapeProfile, ...]]]:
    """Return the engine of every graph with its profiles. Raises EngineError for one that is missing or does not fit.

    The vision encoder without cuts may be missing, as engines can be built for pruned answers only. The token embedding has none.
    """
    records, usable = {record.graph: record for record in store.records()}, {}
    for graph in bundle.manifest.graphs:
        if graph == EMBED:
            continue
        record = records.get(graph)
        if record is None and graph == VISION_UNPRUNED:
            continue
        if record is None:
            raise EngineError(f"There is no engine of {graph} in {bundle.path}.", hint=store.remedy)
        built_for = DeviceIdentity(record.tensorrt, record.capability)
        if built_for != identity:
            raise EngineError(
                f"The engine of {graph} is of TensorRT {built_for.tensorrt} for SM {built_for.capability}, "
                f"this is {identity.tensorrt} on SM {identity.capability}.",
                hint=store.remedy,
            )
        if store.is_of_fleet:
            _check_board(record, identity)
        profiles = shape_profiles(bundle, record.limits)[graph]
        if record.key != engine_key(bundle, graph, identity, profiles, record.level):
            raise EngineError(f"The engine of {graph} was built from another bundle.", hint=store.remedy)
        usable[graph] = record, profiles
    return usable


def _check_board(record: EngineRecord, here: DeviceIdentity) -> None:
    # What else an engine of another board needs. Its kernels were chosen for the SMs that its builder saw.
    if record.processor != here.processor:
        machine = record.processor or "unknown"
        message = f"The engine of {record.graph} was built on a machine of {machine}, and this one is {here.processor}."
        raise EngineError(message, hint=_SIGN_AGAIN)
    if record.sms > here.sms:
        raise EngineError(
            f"The engine of {record.graph} was built for {record.sms} SMs, and this GPU has {here.sms} in its power mode.",
            hint="Choose a mode with more (sudo nvpmodel -q shows it), or build with fewer: edgeprune build BUNDLE --sign KEY.pem",
        )


class Store:
    """The engines of one bundle: those that this device built, or with `trust` those that one of these public keys signed.

    `secret`: this device's key, by default the one in the user's data folder.
    """

    def __init__(self, folder: Path, secret: bytes | None = None, *, trust: TrustedKeys = ()) -> None:
        self._folder, self._trust = folder, tuple(trust)
        self._secret = device_key() if secret is None and not trust else secret

    @property
    def is_of_fleet(self) -> bool:
        """Whether a key vouches for the engines, and not this device."""
        return bool(self._trust)

    @property
    def remedy(self) -> str:
        """The hint of an error about engines that cannot be used."""
        return _SIGN_AGAIN if self._trust else REBUILD

    def records(self) -> tuple[EngineRecord, ...]:
        """Return the records. Raises EngineError when they are malformed, or not signed by this device or a trusted key."""
        path = self._folder / RECORDS
        if not path.is_file():
            return ()
        try:
            content = path.read_bytes()
            if self._trust:
                check_engines_signature(self._folder, content, self._trust)
            data = json.loads(content)
            entries, signature = list(data["engines"]), str(data["signature"])
            records = tuple(EngineRecord(**{**entry, "limits": ProfileLimits(**entry["limits"])}) for entry in entries)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineError(f"Cannot read {path}: {error!r}.", hint=self.remedy) from error
        if not self._trust and not hmac.compare_digest(signature, self._signature(entries)):
            raise EngineError(f"The engines in {path.parent} were not built on this device.", hint=REBUILD)
        return records

    def remove_stale(self) -> None:
        """Remove temporary files of interrupted builds."""
        sweep(self._folder / FOLDER)

    def find(self, graph: str, key: str) -> EngineRecord | None:
        """Return the record of an engine, or None when it has no record or its file has changed."""
        record = next((record for record in self.records() if (record.graph, record.key) == (graph, key)), None)
        return record if record is not None and self._is_intact(record) else None

    @contextmanager
    def mapped(self, record: EngineRecord) -> Iterator[mmap.mmap]:
        """Map a recorded engine, so that its pages are the file's and no memory of this process.

        Raises EngineError when the file is missing or has changed, also when it changes before the block ends.
        """
        path = self._folder / record.file
        try:
            with path.open("rb") as file:
                before = _state(os.fstat(file.fileno()))
                plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise EngineError(f"Cannot read {path}: {error.strerror}.", hint=self.remedy) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise self._changed(path) from error
        with plan:
            if not hmac.compare_digest(hashlib.sha256(plan).hexdigest(), record.sha256):
                raise self._changed(path)
            yield plan
        if not path.is_file() or _state(path.stat()) != before:
            raise self._changed(path)

    def add(self, record: EngineRecord, plan: bytes | memoryview) -> None:
        """Write an engine and its record, and delete engines without a record."""
        self._make_folder()
        write_bytes(self._folder / record.file, plan)
        try:
            others = [other for other in self.records() if other.graph != record.graph]
        except EngineError:
            others = []
        records = tuple(sorted((*others, record), key=lambda each: each.graph))
        self._sign(records)
        for path in (self._folder / FOLDER).glob("*.plan"):
            if not any(path == self._folder / each.file for each in records):
                path.unlink()

    def _changed(self, path: Path) -> EngineError:
        return EngineError(f"{path} is not the engine that was {'signed' if self._trust else 'built here'}.", hint=self.remedy)

    def _make_folder(self) -> None:
        try:
            (self._folder / FOLDER).mkdir(exist_ok=True)
        except OSError as error:
            raise EdgePruneError(f"Cannot write {self._folder / FOLDER}: {error.strerror}.") from error

    def _is_intact(self, record: EngineRecord) -> bool:
        path = self._folder / record.file
        return path.is_file() and path.stat().st_size == record.bytes and sha256_of(path) == record.sha256

    def _sign(self, records: tuple[EngineRecord, ...]) -> None:
        entries = [asdict(record) for record in records]
        data = {"engines": entries, "signature": self._signature(entries)}
        write_text(self._folder / RECORDS, json.dumps(data, indent=2) + "\n")

    def _signature(self, entries: Sequence[Mapping[str, Any]]) -> str:
        # Of what the file says: older records have fewer fields.
        return hmac.new(self._secret or device_key(), json.dumps(entries, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def timing_cache() -> Path:
    """Return the file of the builder's timing cache. TensorRT refuses what another version or GPU has timed."""
    return _data_folder() / "timings.cache"


def read_timings() -> bytes:
    """Return this device's timing cache, empty when there is none."""
    try:
        return timing_cache().read_bytes()
    except OSError:
        return b""


def keep_timings(timings: bytes) -> None:
    """Write this device's timing cache, if the builder has one and it can be written: without it the next build is only slower."""
    with suppress(OSError, EdgePruneError):
        if timings:
            timing_cache().parent.mkdir(parents=True, exist_ok=True)
            write_bytes(timing_cache(), timings)


def _data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edgeprune"


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def device_key() -> bytes:
    """Return this device's key. It is created on first use and readable only by its user."""
    path = _data_folder() / "device.key"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another process has just created it
                write_new(path, secrets.token_bytes(_KEY_BYTES), private=True)
        secret = path.read_bytes()
    except (OSError, EdgePruneError) as error:
        reason = f"{error.strerror}." if isinstance(error, OSError) else error
        raise EngineError(f"Cannot keep this device's key at {path}: {reason}", hint="Set XDG_DATA_HOME.") from error
    if len(secret) != _KEY_BYTES:
        raise EngineError(f"{path} is no device key.", hint="Delete it and build the engines again.")
    return secret
