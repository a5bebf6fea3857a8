"""InSPyReNet: the authors' numbers, what sizes and encoders it takes, its loss and the blending of two passes."""
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import AxialAttention, PyramidAxialAttention, ScaleInvariantContextAttention
from zoo.layers.image_pyramid import ellipse, expand, reconstruct, reduce, residual, transition
from zoo.layers.pyramid_attention import AxialKernel
from zoo.models.inspyrenet import (
    FiveMaps,
    PaddedSwin,
    Pyramid,
    PyramidDecoder,
    StartingDecoder,
    blend,
    checkpoint_filter_fn,
    scaled,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "inspyrenet"
SMALL = {  # of the same structure
    "inspyrenet_nano": {},
    "inspyrenet_swin_b": dict(dim=8, base_size=(64, 64), encoder_args=dict(
        embed_dim=8, depths=(1, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4)),
    "inspyrenet_res2net50": dict(dim=8, base_size=(64, 64), encoder_args=dict(layers=(1, 1, 2, 3), base_width=4, stem_width=4)),
}
small = pytest.mark.parametrize("name", SMALL)


def make(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL.get(name, {}), **args}).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            if path.endswith("gamma"):  # 0 in a new network, so that attention has no part in it
                value.fill_(0.5)
    return model


def image(*size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * (1 + expected.abs().max())


def axial(config):
    return AxialAttention(config["in_channels"], config["mode"])


def swin(config):
    return PaddedSwin(embed_dim=config["embed_dim"], depths=config["depths"], num_heads=config["num_heads"], window_size=config["window_size"])


def context(config):
    size = tuple(n >> config["stage"] for n in config["base_size"])
    return ScaleInvariantContextAttention(config["in_channel"], config["depth"], size, config["lmap_in"])


BUILD = {
    "axial_attention_h": axial, "axial_attention_w": axial, "sica_plain": context, "sica_laplacian": context, "swin_features": swin,
    "paa_kernel_3": lambda config: AxialKernel(config["in_channel"], config["out_channel"], config["receptive_size"], "as_trained"),
    "paa_encoder": lambda config: PyramidAxialAttention(config["in_channel"], config["out_channel"]),
    "paa_decoder": lambda config: StartingDecoder(config["in_channel"], config["depth"], "as_trained"),
    "decoder": lambda config: PyramidDecoder(config["in_channels"], config["depth"], config["base_size"]),
}


def own_names(state, model):
    return {name.removeprefix("decoder."): value for name, value in checkpoint_filter_fn(state, model).items()}


def on_lists(case, config):
    return {"paa_decoder": lambda *maps: (maps,), "decoder": lambda *maps: (maps, config["image_size"])}.get(case, lambda *inputs: inputs)


def pyramid_functions(x, laplacian):
    return expand(x), reduce(x), reconstruct(x, laplacian), residual(x)


def of_blend(low, *high):
    d3, p2, p1, p0 = high
    found = blend(low, Pyramid(d3, p2, d3, p1, d3, p0, d3))
    return found.d3, found.d2, found.d1, found.d0, scaled(found.d0)


def of_loss(d3, d2, d1, d0, masks):
    return zoo.SaliencyPyramidLoss()(Pyramid(d3, d3, d2, d3, d1, d3, d0), masks), scaled(d0)


FUNCTIONS = {
    "pyramid": pyramid_functions, "pyramid_odd": lambda x: (reduce(x), residual(x)), "blend": of_blend, "loss": of_loss,
    "transition_5": lambda x: (transition(x, 5),), "transition_9": lambda x: (transition(x, 9),),
}
ORDER = {  # inputs and outputs where they are not `input` and `output`
    "sica_plain": (["input", "smap"], ["features", "output"]), "sica_laplacian": (["input", "smap", "lmap"], ["features", "output"]),
    "swin_features": (["input"], [f"features.{i}" for i in range(5)]),
    "paa_decoder": ([f"features.{i}" for i in range(3)], ["features", "output"]),
    "decoder": ([f"features.{i}" for i in range(5)], list(Pyramid._fields)),
    "pyramid": (["input", "laplacian"], ["expand", "reduce", "reconstruct", "residual"]), "pyramid_odd": (["input"], ["reduce", "residual"]),
    "blend": (["lr_d0", "hr_d3", "hr_p2", "hr_p1", "hr_p0"], ["d3", "d2", "d1", "d0", "prediction"]),
    "loss": (["d3", "d2", "d1", "d0", "gt"], ["loss", "prediction"]),
}


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_the_authors_numbers(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        vector, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    state, gradients = ({name.removeprefix(part): value for name, value in vector.items() if name.startswith(part)}
                        for part in ("state/", "grad/state/"))
    given, wanted = ORDER.get(case, (["input"], ["output"]))
    inputs = [vector[name].requires_grad_(f"grad/{name}" in vector) for name in given]
    model = BUILD[case](config).eval() if case in BUILD else nn.Module()
    model.load_state_dict(own_names(state, model))
    outputs = model(*on_lists(case, config)(*inputs)) if case in BUILD else FUNCTIONS[case](*inputs)
    outputs = dict(zip(wanted, [outputs] if isinstance(outputs, torch.Tensor) else outputs, strict=True))
    for name in wanted:
        close(outputs[name], vector[name])
    compared = [name for name in wanted if f"cotangent/{name}" in vector]
    if not compared:
        return
    sum((outputs[name] * vector[f"cotangent/{name}"]).sum() for name in compared).backward()
    for name, x in zip(given, inputs, strict=True):
        if x.requires_grad:
            close(x.grad, vector[f"grad/{name}"], 1e-4)
    parameters = dict(model.named_parameters())
    converted = own_names(gradients, model)
    assert converted.keys() <= parameters.keys()
    assert case == "decoder" or converted.keys() == parameters.keys()
    for name, expected in converted.items():
        close(parameters[name].grad, expected, 1e-4)
