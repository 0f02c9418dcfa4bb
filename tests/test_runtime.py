"""Which providers ONNX Runtime is asked for, and what is said where one does not start."""

import logging

import onnx
import onnxruntime
import pytest

from tlpipe import runtime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
IDENTITY = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 20]> '
    "same (float[n] given) => (float[n] found) { found = Identity (given) }"
).SerializeToString()


@pytest.mark.fault("E09")
def test_a_gpu_computes_in_fp32_and_by_the_same_algorithm_every_time() -> None:
    """The names and values are those of ONNX Runtime's cuda_execution_provider_info.cc."""
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    available = ["TensorrtExecutionProvider", CUDA, CPU]
    assert runtime.providers(available, "auto") == [(CUDA, options), (CPU, {})]


def test_the_cpu_is_asked_for_where_there_is_no_gpu_and_where_told_so() -> None:
    assert runtime.providers(["AzureExecutionProvider", CPU], "auto") == [(CPU, {})]
    assert runtime.providers([CUDA, CPU], "cpu") == [(CPU, {})]


@pytest.mark.fault("E07")
def test_a_session_on_the_cpu_has_no_other_provider() -> None:
    session = runtime.open_session(IDENTITY, threads=1, device="cpu")
    assert session.get_providers() == [CPU]
    assert session.get_session_options().intra_op_num_threads == 1


@pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="needs a provider that cannot start"
)
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """This build of ONNX Runtime has no CUDA, which it passes over."""
    wanted = runtime.providers([CUDA, CPU], "auto")
    options = onnxruntime.SessionOptions()
    with caplog.at_level(logging.WARNING, "tlpipe.runtime"):
        session = runtime.start_session(IDENTITY, options, wanted)
        assert caplog.messages == [f"{CUDA} did not start; running on the CPU"]
        caplog.clear()
        runtime.start_session(IDENTITY, options, runtime.providers([CPU], "auto"))
        assert caplog.messages == []
    assert session.get_providers() == [CPU]
