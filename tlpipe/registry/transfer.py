"""Copy a version to another MLflow server, such as from where one tries to where it counts."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tlpipe.errors import RegistryError
from tlpipe.export import signing
from tlpipe.lineage import without_credentials
from tlpipe.registry import publishing, tracking
from tlpipe.registry.publishing import Content

_KEPT = ("tlpipe.git_", "tlpipe.dvc_", "tlpipe.purpose", "mlflow.source.git.")


def copy(workspace: Path, name: str, which: str, to: str) -> str:
    """Copy the version of a number or alias to the server at ``to``; return its number there.

    Run, metrics, curves, artifacts, card and signature go along. Copied again, or after a kill, it
    is the same run and version. What arrived is fetched back, and its digest compared.

    Raises:
        ArtifactError: the bundle, here or there, is damaged.
        RegistryError: there is no such version here, or what arrived is something else.
    """
    with TemporaryDirectory() as folder:
        with tracking.connection(workspace) as client:
            version = tracking.find_version(client, name, which)
            if version.run_id is None:
                raise RegistryError(f"{name} version {version.version} has no run to be copied.")
            tags = client.get_run(version.run_id).data.tags
            client.download_artifacts(version.run_id, "", folder)
            expected = tracking.verified(version, Path(folder, tracking.BUNDLE_FOLDER)).digest
            address, _, _ = without_credentials(client.tracking_uri).partition("?")
            origin = f"{address} version {version.version}"
        lineage = {key: value for key, value in tags.items() if key.startswith(_KEPT)}
        with tracking.connection(workspace, address=to) as client:
            published = publishing.publish(
                client,
                tracking.experiment(client, name, workspace),
                name,
                Content.stored(Path(folder)),
                lineage=lineage | {"tlpipe.copied_from": origin},
            )
            if (signature := Path(folder, signing.ARTIFACT)).is_file():
                client.log_artifact(published.run_id, str(signature))
            arrived = tracking.bundle_of(client, client.get_model_version(name, published.version))
            if arrived.digest != expected:
                raise RegistryError(
                    f"{name} version {version.version} has the digest {expected[:16]}..., what "
                    f"arrived at {without_credentials(to)} {arrived.digest[:16]}...; do not use it."
                )
            tracking.challenge(client, name, published.version)
    return published.version
