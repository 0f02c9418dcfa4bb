"""Every error of tlpipe, each with the exit code that the command line ends with.

::

    TlpipeError             1
    |-- ParamsError         3   params.yaml, or a built-in data set's own YAML
    |-- DataError           4   the user's images and labels
    |   |-- StoreError          a disk, a network or a store fails: nothing is said of the data
    |   `-- ImageError          one image, with a reason code
    |-- WeightsError        5   pretrained weights: absent, altered, unsafe, of another network
    |-- ArtifactError       6   a stage's file: missing, incomplete, altered, of another run
    |-- ParityError         7   the exported graph differs from the trained model
    |-- RegistryError       8   MLflow: nothing there, content that differs
    |   `-- UnreachableError    it does not answer, or not as expected
    |-- ServingError        9   the address to serve on is not free
    |-- TrainingError      10   training cannot go on: no number, no memory, no room
    |-- GateError           11   a version that must not go into production
    |   `-- ComparisonError 8   versions that cannot be compared here: nothing is said of them
    `-- Interrupted       130   somebody asked it to stop; it can be resumed

A message is one line: what is wrong, what was found, what was expected, what to do.
Exit code 2 is the command line's own (an unknown option, a missing argument).
"""


class TlpipeError(Exception):
    """Base of every error."""

    exit_code = 1


class ParamsError(TlpipeError):
    """A parameter is unknown, of a wrong type or out of its range."""

    exit_code = 3


class DataError(TlpipeError):
    """The labelled images cannot make a data set."""

    exit_code = 4


class StoreError(DataError):
    """A disk, a network, a store or the memory fails while data are read.

    It says nothing of the data, so nothing is rejected for it and everything stays as it was.
    """


class ImageError(DataError):
    """One image cannot be used.

    ``reason`` is one of the codes of ``rejects.csv``, ``detail`` a sentence for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class WeightsError(TlpipeError):
    """Pretrained weights are absent, altered, unsafe or belong to another network."""

    exit_code = 5


class ArtifactError(TlpipeError):
    """A file that a stage wrote is missing, incomplete, altered or of another run."""

    exit_code = 6


class ParityError(TlpipeError):
    """The exported graph does not compute what the trained model computes."""

    exit_code = 7


class RegistryError(TlpipeError):
    """The model registry cannot be reached, or does not hold what was asked for."""

    exit_code = 8


class UnreachableError(RegistryError):
    """The model registry does not answer, or not as expected; it may do so later."""


class ServingError(TlpipeError):
    """The server cannot listen where it was told to."""

    exit_code = 9


class TrainingError(TlpipeError):
    """Training cannot go on."""

    exit_code = 10


class GateError(TlpipeError):
    """A version must not go into production, or cannot be compared with the one that is."""

    exit_code = 11


class ComparisonError(GateError):
    """Two versions cannot be compared here, so nothing is said of either."""

    exit_code = 8


class Interrupted(TlpipeError):  # noqa: N818  as Python's own
    """Somebody asked training to stop; what was done so far is kept."""

    exit_code = 130
