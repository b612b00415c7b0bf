"""The metrics' networks, with random weights from files, against the original implementations."""

import pickle
import socket
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image.lpips import _LPIPS

from layerdecomp.errors import InputError
from layerdecomp.metric_networks import FILES, INCEPTION, MeasureConfig, load_lpips, open_networks
from layerdecomp.metrics.distribution import inception_features


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket, "socket", fail)
    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


def images(seed: int, size: tuple[int, int] = (72, 80)) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("net", FILES)
def test_lpips_equals_the_original_and_torchmetrics(net: str, metric_weights: Path) -> None:
    network = load_lpips(net, metric_weights / FILES[net])
    original = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    torchmetric = _LPIPS(net=net, pnet_rand=True)
    state = torch.load(metric_weights / FILES[net], weights_only=True)
    for reference in (original, torchmetric):
        for name, parameter in reference.net.named_parameters():  # slice2.3.weight, or slices.1.3.weight
            place = name.removeprefix("slices.").partition(".")[2]
            parameter.data.copy_(state[f"features.{place}"])
    a, b = images(0), images(1)
    found = network(a, b)
    assert found.min() > 1e-3
    torch.testing.assert_close(found, original(a, b).flatten(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found, torchmetric(a, b).flatten(), rtol=1e-3, atol=0)  # a different epsilon
    assert network(a, a).abs().max() == 0


def test_lpips_of_a_region_averages_cells_weighted_by_their_share(metric_weights: Path) -> None:
    network = load_lpips("alex", metric_weights / FILES["alex"])
    a, b = images(0), images(1)
    region = torch.zeros(2, 1, 72, 80, dtype=torch.bool)
    region[0, :, 10:50, 20:60] = True
    value, empty = network(a, b, region)
    assert empty.isnan()
    assert torch.equal(network(a, b, torch.ones_like(region)), network(a, b))
    pasted = torch.where(region, a, b)
    expected = 0.0
    for head, x, y in zip(
        network.heads, network._unit_features(pasted[:1]), network._unit_features(b[:1]), strict=True
    ):
        distance = (head * (x - y) ** 2).sum(1)[0]
        rows, columns = distance.shape
        share = torch.zeros_like(distance)
        for row in range(rows):
            for column in range(columns):
                top, bottom = row * 72 // rows, -(-(row + 1) * 72 // rows)
                left, right = column * 80 // columns, -(-(column + 1) * 80 // columns)
                share[row, column] = region[0, 0, top:bottom, left:right].float().mean()
        expected += (share * distance).sum() / share.sum()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    outside = torch.where(region, a, a + 0.3)  # pixels outside do not matter
    torch.testing.assert_close(network(outside, b, region)[0], value, rtol=1e-6, atol=0)


def test_inception_features_equal_those_of_torch_fidelity(metric_weights: Path) -> None:
    network = open_networks(MeasureConfig(weights=str(metric_weights))).measures.inception
    assert network is not None and not network.training and not any(p.requires_grad for p in network.parameters())
    reference = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=metric_weights / INCEPTION)
    levels = torch.randint(0, 256, (2, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = reference(levels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = inception_features(network, levels.float() / 127.5 - 1)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_missing_files_are_named_with_their_metrics(tmp_path: Path, metric_weights: Path) -> None:
    nothing = open_networks(MeasureConfig(weights=str(tmp_path)))
    assert nothing.measures.lpips is None and nothing.measures.inception is None and nothing.files == {}
    assert nothing.missing.keys() == {"background/lpips", "background/fid", "background/kid", "recomposition/lpips"}
    assert "alexnet-owt-7be5be79.pth does not exist; checkpoints/README.md" in nothing.missing["background/lpips"]
    assert INCEPTION in nothing.missing["background/kid"]
    (tmp_path / FILES["squeeze"]).write_bytes((metric_weights / FILES["squeeze"]).read_bytes())
    some = open_networks(MeasureConfig(weights=str(tmp_path), lpips="squeeze", region="mask", resolution=64))
    assert some.measures.lpips is not None and some.measures.lpips.net == "squeeze"
    assert some.missing.keys() == {"background/fid", "background/kid"} and len(some.files[FILES["squeeze"]]) == 64
    assert (some.measures.region, some.measures.resolution) == ("mask", 64)


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("harm.txt"), "done"))


def test_files_with_other_content_are_refused(
    tmp_path: Path, metric_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / FILES["squeeze"]
    config = MeasureConfig(weights=str(tmp_path), lpips="squeeze")
    whole = (metric_weights / FILES["squeeze"]).read_bytes()
    state = torch.load(metric_weights / FILES["squeeze"], weights_only=True)
    short = {name: tensor for name, tensor in state.items() if "classifier" not in name}

    def saved(content: Any) -> bytes:
        torch.save(content, path)
        return path.read_bytes()

    invalid = {
        "cannot be opened as weights": [pickle.dumps(Harmful()), saved({"a": Harmful()}), whole[:-100], b"text"],
        "holds something other": [saved([1, 2]), saved({"epoch": 3})],
        "2 missing: classifier.1.weight, classifier.1.bias": [saved(short)],
    }
    for message, contents in invalid.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError, match=message) as raised:
                open_networks(config)
            assert str(path) in str(raised.value)
    assert not (tmp_path / "harm.txt").exists()
    path.unlink()
    torch.save(short, tmp_path / INCEPTION)
    with pytest.raises(InputError, match="does not fit Inception"):
        open_networks(config)


def test_an_unpublished_file_logs_a_warning(metric_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_lpips("squeeze", metric_weights / FILES["squeeze"])
    assert "squeezenet1_1-b8a52dc0.pth is not the published file" in caplog.text


def test_invalid_settings_are_refused() -> None:
    for key, value in {"region": "hole", "lpips": "resnet", "resolution": 8}.items():
        with pytest.raises(InputError, match=f"evaluate.measure.{key} is .*{value}"):
            MeasureConfig(**{key: value})
