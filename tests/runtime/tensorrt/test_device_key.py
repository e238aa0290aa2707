"""The device's own key, by which its engines are known: private, made once, whoever asks first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeprune.errors import EngineError
from edgeprune.runtime.backends.tensorrt.store import device_key


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the key is kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "edgeprune" / "device.key"


def test_it_is_made_once_and_its_user_alone_can_read_it(place: Path) -> None:
    secret = device_key()
    assert len(secret) == 32 and device_key() == secret == place.read_bytes()
    assert place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.parent.iterdir()] == ["device.key"]


def test_all_who_ask_at_once_get_the_same() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: device_key(), range(32)))) == 1


def test_what_is_no_key_is_refused(place: Path) -> None:
    place.parent.mkdir()
    place.write_bytes(b"short")
    with pytest.raises(EngineError, match="no device key"):
        device_key()


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"Cannot keep this device's key at .*: Not a directory") as caught:
        device_key()
    assert "XDG_DATA_HOME" in caught.value.hint
