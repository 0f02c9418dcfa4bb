"""Sign what is registered, and check who did: the signature is kept beside the version's bundle."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tlpipe.errors import ArtifactError
from tlpipe.export import signing
from tlpipe.export.bundle import Bundle
from tlpipe.registry import tracking


def sign(workspace: Path, reference: str, key: Path) -> Bundle:
    """Sign the bundle of ``NAME@ALIAS`` or ``NAME@VERSION`` with a private key; return it.

    Raises:
        ParamsError: the key cannot be used.
        RegistryError: there is no such version.
    """
    name, which = tracking.parse(reference)
    with tracking.connection(workspace) as client, TemporaryDirectory() as folder:
        version = tracking.find_version(client, name, which)
        bundle = tracking.bundle_of(client, version)
        target = Path(folder, signing.ARTIFACT)
        signing.sign(bundle.folder, key, target)
        client.log_artifact(version.run_id, str(target))
    return bundle


def verify(workspace: Path, reference: str, key: Path | None) -> Bundle:
    """Check and return the bundle of a version; with a public key, also who signed it.

    Raises:
        ArtifactError: it is damaged, not signed, or by somebody else.
        RegistryError: there is no such version.
    """
    name, which = tracking.parse(reference)
    with tracking.connection(workspace) as client:
        version = tracking.find_version(client, name, which)
        bundle = tracking.bundle_of(client, version)
        if key is not None:
            signature = tracking.artifact(client, version.run_id, signing.ARTIFACT)
            if signature is None:
                raise ArtifactError(f"{reference} is not signed. Sign it: 'tlpipe sign'.")
            signing.check(bundle.folder, key, signature)
    return bundle
