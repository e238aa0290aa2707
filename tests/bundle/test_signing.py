"""Signatures: made, required, and refused each for its own reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from edgeprune.bundle import MANIFEST, Bundle, signing
from edgeprune.bundle.signing import SIGNATURE, Signature, make_key, sign_manifest, signed_text
from edgeprune.cli import main
from edgeprune.errors import BundleError, MissingExtraError, UsageError
from edgeprune.runtime import load

pytest.importorskip("cryptography", reason='needs pip install "edgeprune[sign]"')


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a private key, whose public one ends in .pub."""
    path = tmp_path_factory.mktemp("keys") / "robots.pem"
    make_key(path)
    return path


@pytest.fixture
def signed(altered_bundle: Path, key: Path) -> Path:
    """Return a private copy of the tiny bundle with a signature."""
    sign_manifest(altered_bundle, key)
    return altered_bundle


def refusal(folder: Path, *keys: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder, require_signature=keys)
    assert "\n" not in str(caught.value)
    return caught.value.message


def openssl(*words: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_signed_bundle_loads(signed: Path, key: Path, as_bytes: bool) -> None:
    public = key.with_suffix(".pub")
    assert load(signed, threads=1, require_signature=[public.read_bytes() if as_bytes else public]).name


def test_one_of_several_keys_suffices(signed: Path, key: Path, tmp_path: Path) -> None:
    other, _ = make_key(tmp_path / "other.pem")
    assert Bundle.load(signed, require_signature=[other, key.with_suffix(".pub")])


def test_without_the_wish_a_signature_is_not_looked_at(signed: Path) -> None:
    (signed / SIGNATURE).write_text("{")
    assert Bundle.load(signed)


def test_an_unsigned_bundle(altered_bundle: Path, key: Path) -> None:
    assert "is not signed" in refusal(altered_bundle, key.with_suffix(".pub"))


def test_an_unknown_key(signed: Path, tmp_path: Path) -> None:
    other, name = make_key(tmp_path / "other.pem")
    assert f"none of those required ({name[:16]})" in refusal(signed, other)


def test_a_wrong_signature(signed: Path, key: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other.pem")
    made = sign_manifest(signed, tmp_path / "other.pem", force=True)
    mine = sign_manifest(signed, key, force=True)
    Signature(mine.key, mine.manifest_sha256, made.signature).save(signed)
    assert "The signature of" in refusal(signed, key.with_suffix(".pub"))


def test_a_changed_manifest(signed: Path, key: Path) -> None:
    (signed / MANIFEST).write_text((signed / MANIFEST).read_text() + "\n")
    assert Bundle.load(signed)
    assert "changed after" in refusal(signed, key.with_suffix(".pub"))
    # And with its new sha256 put into the signature's file.
    data = json.loads((signed / SIGNATURE).read_text())
    made = sign_manifest(signed, key, force=True)
    data["manifest_sha256"] = made.manifest_sha256
    (signed / SIGNATURE).write_text(json.dumps(data))
    assert "is wrong" in refusal(signed, key.with_suffix(".pub"))


def test_a_signature_covers_every_file(signed: Path, key: Path) -> None:
    for name in Bundle.load(signed).manifest.files:
        whole = (signed / name).read_bytes()
        (signed / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert name in refusal(signed, key.with_suffix(".pub"))
        (signed / name).write_bytes(whole)
    assert Bundle.load(signed, require_signature=[key.with_suffix(".pub")])


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"schema_version": 1}', '{"schema_version": 2}', "[" * 10**5])
def test_a_malformed_signature(signed: Path, key: Path, text: str) -> None:
    (signed / SIGNATURE).write_text(text)
    assert "signature" in refusal(signed, key.with_suffix(".pub"))


@pytest.mark.parametrize("field", ["key", "manifest_sha256", "signature"])
@pytest.mark.parametrize("value", [None, 1, "zz", ""])
def test_a_signature_with_a_malformed_field(signed: Path, key: Path, field: str, value: object) -> None:
    data = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(data | {field: value}))
    refusal(signed, key.with_suffix(".pub"))


def test_engines_that_are_built_later_do_not_break_it(signed: Path, key: Path) -> None:
    (signed / "engines").mkdir()
    (signed / "engines" / "engines.json").write_text("{}")
    assert Bundle.load(signed, require_signature=[key.with_suffix(".pub")])


def test_a_key_is_private_from_its_first_moment(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_replaced(key: Path) -> None:
    with pytest.raises(UsageError, match="never replaced"):
        make_key(key)
    lonely = key.with_name("lonely.pem")
    lonely.with_suffix(".pub").touch()
    with pytest.raises(UsageError, match="never replaced"):
        make_key(lonely)
    assert not lonely.exists()
    with pytest.raises(UsageError, match="public key"):
        make_key(key.with_suffix(".pub"))


def test_a_signature_is_replaced_only_when_told(signed: Path, key: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        sign_manifest(signed, key)


def test_openssl_reads_the_keys_and_agrees(signed: Path, key: Path, tmp_path: Path) -> None:
    assert openssl("pkey", "-in", key, "-pubout").stdout == key.with_suffix(".pub").read_text()
    found = Signature.load(signed)
    (tmp_path / "text").write_bytes(signed_text(found.manifest_sha256))
    (tmp_path / "signature").write_bytes(bytes.fromhex(found.signature))
    words = ("pkeyutl", "-verify", "-pubin", "-inkey", key.with_suffix(".pub"), "-rawin")
    assert openssl(*words, "-in", tmp_path / "text", "-sigfile", tmp_path / "signature").returncode == 0


def test_keys_of_openssl_are_taken(altered_bundle: Path, tmp_path: Path) -> None:
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k.pem")
    openssl("pkey", "-in", tmp_path / "k.pem", "-pubout", "-out", tmp_path / "k.pub")
    sign_manifest(altered_bundle, tmp_path / "k.pem")
    assert Bundle.load(altered_bundle, require_signature=[tmp_path / "k.pub"])


@pytest.mark.parametrize(
    ("algorithm", "words"), [(("ed25519", "-aes256", "-pass", "pass:x"), "password"), (("ed448",), "no Ed25519")]
)
def test_other_keys_are_refused(altered_bundle: Path, tmp_path: Path, algorithm: tuple[str, ...], words: str) -> None:
    assert openssl("genpkey", "-algorithm", *algorithm, "-out", tmp_path / "k.pem").returncode == 0
    with pytest.raises(UsageError, match=words):
        sign_manifest(altered_bundle, tmp_path / "k.pem")
    assert not (altered_bundle / SIGNATURE).exists()


def test_files_that_are_no_keys(signed: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    for wrong in (tmp_path / "text", tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="key"):
            sign_manifest(signed, wrong, force=True)
    for wrong in (tmp_path / "text", tmp_path / "none", tmp_path, key):
        with pytest.raises(UsageError, match="key"):
            Bundle.load(signed, require_signature=[wrong])
    with pytest.raises(UsageError, match="key"):
        Bundle.load(signed, require_signature=[b"bytes"])


def test_without_the_package_the_remedy_is_said(signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(extra: str, *packages: str) -> None:
        raise MissingExtraError(f"{packages} {extra}")

    monkeypatch.setattr(signing, "require_extra", missing)
    assert Bundle.load(signed)
    with pytest.raises(MissingExtraError, match=r"cryptography.* sign"):
        Bundle.load(signed, require_signature=[key.with_suffix(".pub")])


def test_loading_without_the_wish_imports_no_cryptography(tiny_bundle: Bundle) -> None:
    code = (
        f"import sys\nfrom pathlib import Path\nfrom edgeprune.bundle import Bundle\nBundle.load(Path({str(tiny_bundle.path)!r}))"
    )
    command = [sys.executable, "-I", "-c", f"{code}\nassert 'cryptography' not in sys.modules"]
    assert subprocess.run(command, check=False).returncode == 0


def test_the_commands(altered_bundle: Path, tiny_image: Image.Image, tmp_path: Path) -> None:
    made = CliRunner().invoke(main, ["keygen", str(tmp_path / "k.pem"), "--json"])
    assert json.loads(made.output)["public"] == str(tmp_path / "k.pub")
    assert "PRIVATE" not in made.output
    signed = CliRunner().invoke(main, ["sign", str(altered_bundle), "--key", str(tmp_path / "k.pem"), "--json"])
    assert json.loads(signed.output)["key"] == json.loads(made.output)["key"]
    make_key(tmp_path / "other.pem")
    tiny_image.save(tmp_path / "i.png")
    asked = ["run", str(altered_bundle), "--image", str(tmp_path / "i.png"), "--prompt", "What?", "--max-tokens", "2"]
    for name, code in (("k.pub", 0), ("other.pub", 1)):
        answer = CliRunner().invoke(main, [*asked, "--require-signature", str(tmp_path / name)])
        assert answer.exit_code == code, answer.output
    assert "none of those required" in answer.output
    for command in (["verify"], ["check"], ["build", "--dry-run"]):
        answer = CliRunner().invoke(main, [*command, str(altered_bundle), "--require-signature", str(tmp_path / "other.pub")])
        assert answer.exit_code == 1 and "none of those required" in answer.output


def test_what_is_broken_is_not_signed(altered_bundle: Path, key: Path) -> None:
    (altered_bundle / "plan.json").write_text("{}")
    signed = CliRunner().invoke(main, ["sign", str(altered_bundle), "--key", str(key)])
    assert signed.exit_code == 1 and "plan.json" in signed.output
    assert not (altered_bundle / SIGNATURE).exists()
