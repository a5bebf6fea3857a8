"""All decoders of segmentation_models_pytorch around all families; plain vision transformers are for one of them."""
import pytest
import segmentation_models_pytorch as smp
import torch

import zoo

FAMILIES = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
PLAIN = ["deit_nano_patch16_224_cb", "lambda_deit_nano_02", "vidat_nano_patch16_224"]  # whose maps are all of one stride
ANY_STRIDE = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer", "DPT"]


def check(decoder: str, encoder: str, **args) -> None:
    model = getattr(smp, decoder)(f"tu-{encoder}", encoder_weights=None, in_channels=1, classes=3, **args).eval()
    out = model(torch.randn(2, 1, 128, 128))
    assert out.shape == (2, 3, 128, 128) and out.isfinite().all()
    out.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


@pytest.mark.parametrize("decoder", ANY_STRIDE)
def test_decoder_around_every_family(decoder):
    for encoder in FAMILIES:
        if encoder not in PLAIN or decoder == "DPT":
            check(decoder, encoder)


@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_decoder_with_finer_maps_around_every_family(decoder):
    for encoder in FAMILIES:
        if encoder not in PLAIN:
            check(decoder, encoder, encoder_output_stride=16)  # PAN pools the last map three times
