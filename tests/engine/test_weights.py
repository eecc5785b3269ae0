"""Weights of this literature, however they are wrapped; and files that are none, each with its one line."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from spss_fast.engine.weights import build_network, fingerprint, read_weights, state_dict_of
from spss_fast.errors import UserError
from spss_fast.nets.vnet import VNet
from tests.conftest import SHARED


def _load(path: Path) -> VNet:
    return build_network(state_dict_of(read_weights(path), path), path)


@pytest.fixture
def network() -> VNet:
    torch.manual_seed(0)
    return VNet(classes=3, filters=2, features=8)


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"net": state, "opt": {"lr": 0.01}},
    lambda state: {"net": {"module." + name: value for name, value in state.items()}},
    lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
    lambda state: {name: value for name, value in state.items() if not name.startswith("projector")},
    lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
])
def test_state_dicts_load_however_wrapped(wrap, network, tmp_path):
    torch.save(wrap(network.state_dict()), tmp_path / "w.pth")
    loaded = _load(tmp_path / "w.pth")
    assert not loaded.training and loaded.out_conv.out_channels == 3
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), network.eval()(image), rtol=1e-2, atol=1e-2)


def test_safetensors(network, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert fingerprint(_load(tmp_path / "w.safetensors")) == fingerprint(network)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot read the weights .*cut\.safetensors"):
        _load(tmp_path / "cut.safetensors")


def test_names_and_shapes_of_the_published_checkpoints():
    path = SHARED / "vectors" / "network_keys.json"
    if not path.exists():
        pytest.skip("reference vectors are absent: network_keys.json is not in ../shared/vectors")
    shapes = json.loads(path.read_text())["vnet"]
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert build_network(tensors, path).block_one.conv[0].out_channels == 16


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("change, said", [
    (lambda s: _without(s, "block_six.conv.0.bias"), "it lacks block_six.conv.0.bias$"),
    (lambda s: s | {"out_conv2.weight": torch.zeros(1), "out_conv2.bias": torch.zeros(1)},
     "it has, beyond the V-Net's, out_conv2.weight and 1 more"),
    (lambda s: s | {"block_two.conv.0.bias": torch.zeros(5)}, "it has another shape for block_two.conv.0.bias$"),
    (lambda s: s | {"block_one.conv.0.weight": torch.zeros(2, 4, 3, 3, 3)}, "4 input channels"),
    (lambda s: s | {"out_conv.weight": torch.zeros(1, 2, 1, 1, 1)}, "one output channel"),
    (lambda s: s | {"out_conv.bias": torch.tensor([0, float("nan"), 0])}, "out_conv.bias that are NaN"),
    (lambda s: {"encoder.weight": torch.zeros(2)}, "no V-Net of this literature: .* found encoder.weight$"),
    (lambda s: {}, "found nothing"),
    (lambda s: list(s.values()), "holds a list instead of named tensors"),
])
def test_what_does_not_fit_is_named_in_one_line(change, said, network, tmp_path):
    torch.save(change(network.state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=said) as error:
        _load(tmp_path / "w.pth")
    assert "w.pth" in str(error.value) and "\n" not in str(error.value)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_only_tensors_are_unpickled(network, tmp_path):
    torch.save({"net": network.state_dict(), "args": _Malicious(tmp_path / "owned")}, tmp_path / "w.pth")
    (tmp_path / "w.pickle").write_bytes(pickle.dumps(_Malicious(tmp_path / "owned")))
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("w.pth", "w.pickle", "text.pth"):
        with pytest.raises(UserError, match="more than tensors") as error:
            _load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_missing_and_truncated_files(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:2000])
    for name, said in (("none.pth", "no weights at"), ("cut.pth", "cannot read the checkpoint")):
        with pytest.raises(UserError, match=said) as error:
            _load(tmp_path / name)
        assert "\n" not in str(error.value)
