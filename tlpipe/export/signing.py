"""Sign bundles and check signatures, with OpenSSF's model-signing: by a key pair, offline.

A signature is a file beside the bundle, so that the bundle's own files stay as they were exported.
"""

from pathlib import Path

from tlpipe.errors import ArtifactError, ParamsError

ARTIFACT = "bundle.sig"  # beside the bundle of a registered version


def beside(bundle: Path) -> Path:
    """Return where the signature of a bundle lies by default."""
    return bundle.with_name(f"{bundle.name}.sig")


def sign(bundle: Path, key: Path, signature: Path) -> None:
    """Sign every file of a bundle with a private key (PEM, elliptic curve).

    Raises:
        ParamsError: the key cannot be used, or the package is missing.
    """
    _need_package()
    from model_signing import signing

    if not key.is_file():
        raise ParamsError(f"the private key {key} does not exist; expected a PEM file.")
    temporary = signature.with_name(f".{signature.name}.tmp")
    try:
        config = signing.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_signer(private_key=key).sign(bundle, temporary)
        temporary.replace(signature)
    except (ValueError, TypeError) as error:
        raise ParamsError(
            f"{key} is no private key to sign with: {_line(error)}. Expected an elliptic curve's, "
            f"as PEM: openssl ecparam -name prime256v1 -genkey -noout"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def check(bundle: Path, key: Path, signature: Path) -> None:
    """Check that a bundle is what the owner of a key has signed: no file more, less or other.

    Raises:
        ArtifactError: it is not, or there is no signature.
        ParamsError: the key cannot be used, or the package is missing.
    """
    _need_package()
    from model_signing import verifying

    if not key.is_file():
        raise ParamsError(f"the public key {key} does not exist; expected a PEM file.")
    if not signature.is_file():
        raise ArtifactError(
            f"{bundle} is not signed: {signature} does not exist. Sign it with 'tlpipe sign', or "
            f"fetch it from where signed ones are."
        )
    try:
        config = verifying.Config()  # type: ignore[no-untyped-call]
        verifier = config.use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError) as error:
        raise ParamsError(f"{key} is no public key: {_line(error)}. Expected PEM.") from None
    try:
        verifier.verify(bundle, signature)
    except Exception as error:  # the package raises what its parts raise
        raise ArtifactError(
            f"the signature {signature} is not of {bundle} by the owner of {key}: {_line(error)}. "
            f"Do not use it."
        ) from None


def _need_package() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise ParamsError(
            "signatures need the package model-signing, which is not installed: "
            "pip install 'tlpipe[signing]'"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
