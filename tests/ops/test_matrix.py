"""Every operator x backend x dtype x shape x layout against its plain PyTorch definition, and as a torch operator."""

import pytest
import torch
from devices import DEVICES
from operator_cases import CASES, LAYOUTS, TOLERANCE, differentiate, spread
from torch.utils._python_dispatch import TorchDispatchMode

from spss_fast.ops import backend
from spss_fast.ops.backends import PARTS, active, available

COMPUTED = [
    pytest.param(case, device, name, id=f"{case.name}-{device}-{name}")
    for case in CASES
    for device in DEVICES
    for name in available(case.operator, device)
    if name != "reference"
]
ON_DEVICE = [pytest.param(case, device, id=f"{case.name}-{device}") for case in CASES for device in DEVICES]


def computed(case, device):
    """Whether the operator has a backend of its own on the device, and with it a kernel of its name."""
    return available(case.operator, device)[0] != "reference"


ON_GPU = [pytest.param(p.values[0], p.values[2], id=p.id) for p in COMPUTED if p.values[1] == "cuda"]
WITHOUT_GPU = pytest.param(None, None, marks=pytest.mark.skip(reason="CUDA graphs need a GPU"))


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
                    expected = differentiate(case, inputs, layout)
                with backend(name):
                    assert active(case.operator, device) == name
                    actual = differentiate(case, inputs, layout)
                assert_same(case, actual[0], expected[0], f"{where}: output")
                assert_same(case, actual[1], expected[1], f"{where}: gradient")


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("case, device, name", COMPUTED)
def test_strides_beyond_32_bits(case, device, name, axis):
    shape = max(case.shapes, key=lambda shape: (shape[1] > 2, shape[0] * shape[-1], len(shape)))  # no axis of 1
    inputs = case.inputs(shape, torch.float32, device)
    with backend("reference"):
        expected = differentiate(case, inputs)
    try:
        inputs = [spread(t, axis) if t.is_floating_point() and t.ndim > 2 else t for t in inputs]
    except RuntimeError as error:
        pytest.skip(f"no room for strides beyond 32 bits: {error}")
    with backend(name):
        actual = differentiate(case, inputs)
    assert_same(case, actual[0], expected[0], "output")
    assert_same(case, actual[1], expected[1], "gradient")


@pytest.mark.parametrize("case, device", [p for p in ON_DEVICE if p.values[0].gradcheck_shape])
def test_gradcheck(case, device):
    inputs = [
        t.requires_grad_() if t.is_floating_point() else t
        for t in case.inputs(case.gradcheck_shape, torch.float64, device)
    ]
    assert torch.autograd.gradcheck(case.call, inputs, nondet_tol=1e-12 if device == "cuda" else 0.0)


@pytest.mark.parametrize("case, device", [p for p in ON_DEVICE if p.values[0].raw and computed(*p.values)])
def test_opcheck(case, device):
    inputs = case.inputs(case.shapes[0], torch.float32, device)
    if case.gradients:
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    for overload, arguments in case.raw(*inputs):
        results = torch.library.opcheck(overload, arguments)
        assert set(results.values()) == {"SUCCESS"}


class Names(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.seen.append(operator._opname)
        return operator(*arguments, **named or {})


@pytest.mark.parametrize("case, device", [p for p in ON_DEVICE if p.values[0].gradients and computed(*p.values)])
def test_backward_makes_no_zeros_for_outputs_without_a_gradient(case, device):
    inputs = case.inputs(case.shapes[0], torch.float32, device)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    for overload, arguments in case.raw(*inputs) if case.raw else ():
        outputs = overload(*arguments)
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        if leaves:
            with Names() as names:
                torch.autograd.grad(first, leaves, torch.ones_like(first), allow_unused=True)
            assert names.seen and not {"zeros", "new_zeros", "zeros_like"} & set(names.seen)


def test_every_raw_operator_is_checked():
    inputs = [(case, case.inputs(case.shapes[0], torch.float32, "cpu")) for case in CASES if case.raw]
    checked = {overload._schema.name for case, tensors in inputs for overload, _ in case.raw(*tensors)}
    checked.add("spss_fast::convolve_moments")  # of bfloat16 alone, in test_convolution.py
    assert checked == {f"spss_fast::{part}" for parts in PARTS.values() for part in parts}


@pytest.mark.parametrize("case, device, name", [p for p in COMPUTED if p.values[0].raw])
def test_raw_operators_name_an_argument_of_another_shape(case, device, name):
    """Calls that pass by the public functions' checks: from torch.ops, from C++."""
    for overload, arguments in case.raw(*case.inputs(case.shapes[0], torch.float32, device)):
        names = [argument.name for argument in overload._schema.arguments]
        for i, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor) or (i == 0 and not names[0] == "grad"):
                continue  # the first tensor sets the shape of the others
            wrong = argument[..., :-1] if argument.ndim else argument[None]
            with backend(name), pytest.raises((ValueError, TypeError), match=rf"^({'|'.join(names)}) "):
                overload(*arguments[:i], wrong, *arguments[i + 1 :])


@pytest.mark.parametrize("case, device, name", COMPUTED)
def test_autocast_changes_nothing(case, device, name):
    """Operators choose their own precision: whatever a network under autocast hands over, the result is the same."""
    for dtype in (torch.bfloat16, torch.float16):
        for of_inputs in {torch.float32, dtype} & set(case.dtypes):
            inputs = case.inputs(case.shapes[0], of_inputs, device)
            with backend(name):
                expected = differentiate(case, inputs)
                with torch.autocast(device, dtype):
                    actual = differentiate(case, inputs)
            assert_same(case, actual[0], expected[0], f"{of_inputs} under {dtype}: output")
            assert_same(case, actual[1], expected[1], f"{of_inputs} under {dtype}: gradient")


@pytest.mark.parametrize("case, device", ON_DEVICE)
def test_compiles_without_a_graph_break(case, device):
    inputs = case.inputs(case.shapes[0], torch.float32, device)
    expected = differentiate(case, inputs)
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    actual = differentiate(type(case)(**{**vars(case), "call": compiled}), inputs)
    assert_same(case, actual[0], expected[0], "output")
    assert_same(case, actual[1], expected[1], "gradient")


@pytest.mark.parametrize("case, name", ON_GPU or [WITHOUT_GPU])
def test_cuda_graph_capture(case, name):
    """An operator that waited for the host would end the capture."""
    inputs = case.inputs(case.shapes[0], torch.float32, "cuda")
    with backend(name):
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
