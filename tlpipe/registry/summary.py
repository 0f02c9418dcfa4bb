"""Command ``summary``: what the last run of the pipeline made, and what to do with it."""

import shlex
from pathlib import Path
from typing import Any

from tlpipe import files
from tlpipe.errors import ArtifactError, RegistryError
from tlpipe.registry import moves, tracking


def run(*, receipt: Path, workspace: Path) -> tuple[list[tuple[str, str]], str]:
    """Return the rows of the table, what it is called and what it is; and what comes next.

    Raises:
        ArtifactError: nothing was registered from this workspace yet, or by another version.
        RegistryError: the registry does not know the version of the receipt.
    """
    content = files.read_json(receipt)
    if "generalisation" not in content:
        raise ArtifactError(
            f"{receipt} was written by another version of tlpipe. Write it anew: 'dvc repro "
            f"--force --single-item register'."
        )
    mine, in_production = _aliases(content, workspace)
    aliases = f"alias {', '.join(mine)}" if mine else "no alias"
    accuracy = content["accuracy"]
    interval = (
        f"{accuracy['value']:.3f} ({accuracy['confidence']:.0%} interval {accuracy['low']:.3f} to "
        f"{accuracy['high']:.3f}, {content['test_images']} images)"
    )
    rows = [
        (
            "data",
            f"{content['images']:,} images, {content['classes']} classes, "
            f"{content['rejected']} rejected",
        ),
        ("backbone", f"{content['backbone']}, frozen: {content['freeze']}"),
        ("test accuracy", interval),
        ("validation accuracy", _validation(content["generalisation"])),
        ("copies in train", _copies(content["copies"])),
        ("ONNX", f"{content['onnx']}, {content['onnx_bytes'] / 1e6:.1f} MB"),
        ("model", f"{content['name']} version {content['version']}, {aliases}"),
    ]
    if in_production:
        return rows, "make ui | tlpipe predict IMAGE | tlpipe serve"
    bundle = Path(content["onnx"]).parent
    answering = f"tlpipe predict IMAGE --model {shlex.quote(str(bundle))}"
    return rows, f"make ui | tlpipe promote: nothing is in production yet | {answering}"


def _validation(found: dict[str, Any]) -> str:
    validation, change = found["validation"], found["difference"]
    verdict = "below it beyond chance" if found["is_below"] else "not below it beyond chance"
    return (
        f"{validation['value']:.3f} ({validation['images']} images held out); test accuracy is "
        f"{verdict}: {change['value']:+.3f} ({change['confidence']:.0%} interval "
        f"{change['low']:+.3f} to {change['high']:+.3f})"
    )


def _copies(found: dict[str, Any]) -> str:
    verdict = "more than clean sets show" if found["is_above_clean"] else "as in clean sets"
    return f"{verdict}: {found['found']}"


def _aliases(content: dict[str, Any], workspace: Path) -> tuple[list[str], bool]:
    """Return the version's aliases, and whether any version is in production."""
    from mlflow.exceptions import MlflowException

    with tracking.connection(workspace) as client:
        try:
            version = client.get_model_version(content["name"], content["version"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RegistryError(
                f"the registry has no {content['name']} version {content['version']}, which was "
                f"registered from here. Register it again: 'dvc repro --force --single-item "
                f"register'."
            ) from None
        found = client.get_registered_model(content["name"]).aliases
    mine = sorted(alias for alias, number in found.items() if str(number) == str(version.version))
    return mine, moves.CHAMPION in found
