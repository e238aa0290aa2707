"""Commands about signatures: keygen, sign."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli.options import bundle_argument, json_option


@click.command()
@click.argument("key", type=click.Path(path_type=Path))
@json_option
def keygen(key: Path, as_json: bool) -> None:
    """Make a key pair to sign bundles with: KEY (such as robots.pem), which is secret, and robots.pub, which robots are given."""
    from edgeprune.bundle.signing import make_key
    from edgeprune.cli.show import show_facts

    public, name = make_key(key)
    show_facts({"private": str(key), "public": str(public), "key": name}, as_json)


@click.command()
@bundle_argument
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private Ed25519 key: see `edgeprune keygen`.")
@click.option("--force", is_flag=True, help="Replace a signature.")
@json_option
def sign(bundle: Path, key: Path, force: bool, as_json: bool) -> None:
    """Check every file of BUNDLE and sign its manifest, for those who load it with --require-signature."""
    from edgeprune.bundle import Bundle
    from edgeprune.bundle.signing import SIGNATURE, sign_manifest
    from edgeprune.cli.show import show_facts

    Bundle.load(bundle)
    signature = sign_manifest(bundle, key, force=force)
    show_facts({"signature": str(bundle / SIGNATURE), "key": signature.key}, as_json)
