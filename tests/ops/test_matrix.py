"""Every operator x backend x dtype x shape x layout against its plain PyTorch definition, and as a torch operator."""

import pytest
import torch
from operator_cases import CASES, LAYOUTS, TOLERANCE, differentiate

from spss_fast.ops import backend
from spss_fast.ops.backends import active, available

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
COMPUTED = [
    pytest.param(case, device, name, id=f"{case.name}-{device}-{name}")
    for case in CASES
    for device in DEVICES
    for name in available(case.operator, device)
    if name != "reference"
]
ON_DEVICE = [pytest.param(case, device, id=f"{case.name}-{device}") for case in CASES for device in DEVICES]



def assert_same(case, actual, expected, what):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape
        tolerance = dict(rtol=0, atol=0) if case.exact or not e.is_floating_point() else TOLERANCE[e.dtype]
        torch.testing.assert_close(a, e, **tolerance, equal_nan=True, msg=lambda m, i=i: f"{what} {i}: {m}")


@pytest.mark.parametrize("case, device, name", COMPUTED)
def test_agrees_with_reference(case, device, name):
    """Loops over dtypes, shapes and layouts inside, so that a backend's whole row is one line of the report."""
    for dtype in case.dtypes:
        for shape in case.shapes:
            for layout in LAYOUTS:
                inputs = case.inputs(shape, dtype, device, layout)
                where = f"{dtype} {shape} {layout}"
                with backend("reference"):
                    expected = differentiate(case, inputs)
                with backend(name):
                    assert active(case.operator, device) == name
                    actual = differentiate(case, inputs)
                assert_same(case, actual[0], expected[0], f"{where}: output")
                assert_same(case, actual[1], expected[1], f"{where}: gradient")


@pytest.mark.parametrize("case, device", [p for p in ON_DEVICE if p.values[0].gradcheck_shape])
def test_gradcheck(case, device):
    inputs = [
        t.requires_grad_() if t.is_floating_point() else t
        for t in case.inputs(case.gradcheck_shape, torch.float64, device)
    ]
    assert torch.autograd.gradcheck(case.call, inputs, nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("case, device", [p for p in ON_DEVICE if p.values[0].raw])
def test_opcheck(case, device):
    inputs = case.inputs(case.shapes[0], torch.float32, device)
    if case.gradients:
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    for overload, arguments in case.raw(*inputs):
        results = torch.library.opcheck(overload, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case, device", ON_DEVICE)
def test_compiles_without_a_graph_break(case, device):
    inputs = case.inputs(case.shapes[0], torch.float32, device)
    expected = differentiate(case, inputs)
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    actual = differentiate(type(case)(**{**vars(case), "call": compiled}), inputs)
    assert_same(case, actual[0], expected[0], "output")
    assert_same(case, actual[1], expected[1], "gradient")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cuda_graph_capture(case):
    inputs = case.inputs(case.shapes[0], torch.float32, "cuda")
    expected = differentiate(case, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            differentiate(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = differentiate(case, inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(case, actual[0], expected[0], "output")
    assert_same(case, actual[1], expected[1], "gradient")
