"""The CIFAR networks: the published sizes, and timm's interface."""

import dtokd.networks  # noqa: F401  registers them
import pytest
import timm
import torch

#: Parameters with 100 classes: in millions as the benchmark's papers print them.
PUBLISHED = {
    "cifar_resnet20": 0.28,
    "cifar_resnet56": 0.86,
    "cifar_wrn_40_1": 0.57,
    "cifar_wrn_40_2": 2.26,
    "cifar_resnet8x4": 1.23,
    "cifar_resnet32x4": 7.43,
    "cifar_resnet50": 23.71,
    "cifar_mobilenetv2": 0.81,
    "cifar_shufflenetv1": 0.95,
    "cifar_shufflenetv2": 1.36,
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_size_and_interface(name, millions):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.0051)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        final, maps = model.forward_intermediates(images, indices=3)
    torch.testing.assert_close(model.forward_head(final), logits)
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)
    for info, found in zip(model.feature_info[-3:], maps, strict=True):
        assert found.shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]), info
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert logits.std() > 1e-3


def test_other_channels_and_no_weights():
    assert timm.create_model("cifar_wrn_40_1", in_chans=1)(torch.randn(1, 1, 28, 28)).shape == (1, 100)
    with pytest.raises(RuntimeError, match="no pretrained weights"):
        timm.create_model("cifar_resnet20", pretrained=True)
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model("cifar_resnet20", no_such_option=1)
    assert timm.create_model("cifar_resnet20", device="meta").fc.weight.is_meta
