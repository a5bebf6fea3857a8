"""InSPyReNet: the authors' numbers, what sizes and encoders it takes, its loss and the blending of two passes."""
import json
from pathlib import Path

import cv2
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
    model = timm.create_model(name, **{**SMALL.get(name, {}), **args})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(image(64, 64, batch=2))  # whose statistics norms take, as logits of thousands say little
        model.eval()
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
    return PaddedSwin(embed_dim=config["embed_dim"], depths=config["depths"], num_heads=config["num_heads"],
                      window_size=config["window_size"])


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
    "pyramid": (["input", "laplacian"], ["expand", "reduce", "reconstruct", "residual"]),
    "pyramid_odd": (["input"], ["reduce", "residual"]),
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



@small
@pytest.mark.parametrize("size", [(1, 1), (7, 45), (64, 96), (33, 131)], ids=str)
def test_any_size(name, size):
    """As that of the picture whose last row and column are repeated up to multiples of 32."""
    model, x = make(name), image(*size)
    whole = x
    for axis in (2, 3):
        missing = -x.shape[axis] % 32
        whole = torch.cat([whole, *[whole.narrow(axis, -1, 1)] * missing], axis)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (1, 1, *size) and out.isfinite().all()
        close(out, model(whole)[..., : size[0], : size[1]])


@small
def test_an_image_does_not_depend_on_its_batch_or_its_place_in_memory(name):
    model, x = make(name).double(), image(64, 96, batch=3).double()
    with torch.no_grad():
        alone = model(x[1:2])
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, -1)[..., ::2]):
            found = model(given)[1:2]
            close(found, alone)
            close(scaled(found), scaled(alone))


@small
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
def test_dtypes(name, dtype, bound):
    model, x = make(name), image(64, 64)
    with torch.no_grad():
        expected = scaled(model(x))
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and (scaled(out.float()) - expected).abs().mean() < bound


def test_autocast_holds_the_sums_over_all_positions():
    """Of 90,000 positions, which float16 does not; batch norm then brings them back, as in a trained network."""
    torch.manual_seed(0)
    layer = ScaleInvariantContextAttention(16, 16, (304, 304)).train()
    x, saliency = 4 + image(304, 304, batch=2).mean(1, keepdim=True).expand(-1, 16, -1, -1), image(304, 304, batch=2)[:, :1]
    for module in layer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        for _ in range(3):
            layer(x, saliency)
        layer.eval()
        expected = layer(x, saliency)
        assert layer._contexts(x, saliency, None).abs().max() > torch.finfo(torch.float16).max
        with torch.autocast("cpu", torch.float16):
            found = layer(x, saliency)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float16 and ours.isfinite().all() and (ours.float() - theirs).abs().mean() < 0.02 * theirs.abs().mean()


@small
def test_every_parameter_learns_and_gradient_checkpointing_changes_nothing(name):
    """But what the last level's features are for nobody: the finest level has no next."""
    grads = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        masks = (image(64, 64, batch=2)[:, :1] > 0).float()
        zoo.SaliencyPyramidLoss()(model.pyramid(image(64, 64, batch=2)), masks).backward()
        grads.append({path: p.grad for path, p in model.named_parameters()})
    assert not [path for path, grad in grads[0].items() if grad is None or not grad.isfinite().all()]
    for path, grad in grads[0].items():
        close(grads[1][path], grad, 1e-4)


@pytest.mark.parametrize("name", [name for name in SMALL if "nano" not in name])
def test_encoders_of_their_own_are_compiled_whole(name):
    """What comes after them is the nano's: test_tracing."""
    encoder = make(name).backbone
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, expected in zip(compiled(image(64, 64)), encoder(image(64, 64)), strict=True):
            close(found, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("reshapes", ["as_trained", "meant"])
def test_reshapes_fix_neither_batch_nor_size(reshapes):
    """In exported graphs."""
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.axial = PyramidAxialAttention(8, 8, reshapes=reshapes)
            self.contexts = ScaleInvariantContextAttention(8, 8, (7, 9), True, reshapes)

        def forward(self, x):
            return self.contexts(self.axial(x), x[:, :1], x[:, 1:2])

    def maps(batch, *size):
        return torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(1))

    model, free = Both().eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (maps(2, 12, 14),), dynamic_shapes=(free,)).module()
        for x in (maps(1, 12, 14), maps(3, 13, 6)):
            for found, expected in zip(program(x), model(x), strict=True):
                close(found, expected)


@small
def test_saved_and_loaded(name, tmp_path):
    model = make(name)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    again = timm.create_model(name, **SMALL[name], pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth"))).eval()
    with torch.no_grad():
        assert torch.equal(again(image(40, 50)), model(image(40, 50)))
    with pytest.raises(InputError, match="does not hold the weights of"):
        torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
        timm.create_model(name, **SMALL[name], pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "sknet_nano", "tap_fan_nano"])
def test_any_hierarchical_model_is_an_encoder(encoder):
    model = timm.create_model("inspyrenet", encoder=encoder, dim=8, base_size=(64, 64), in_chans=2).train()
    out = model(torch.randn(2, 2, 97, 80))  # the coarsest maps of which have more than one position, as batch norm wants
    assert out.shape == (2, 1, 97, 80)
    out.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    reductions = model.backbone.reductions
    first, second = (model.eval().backbone(torch.randn(1, 2, 64, 64))[i] for i in range(2))
    assert first.shape[2] == (32 if 2 in reductions else 16) and second.shape[2] == 16


def test_maps_of_the_swin_are_timms_where_windows_divide_them():
    """Every other than the first, of timm's network before its norm, and the weights of a classifier are taken."""
    torch.manual_seed(0)
    args = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4)
    ours = PaddedSwin(**args).eval()
    timms = SwinTransformer(img_size=64, num_classes=3, **args).eval()
    ours._take(timms)
    with torch.no_grad():
        maps = timms.forward_intermediates(image(64, 64), intermediates_only=True)
        for norm, found, expected in zip(ours.norms, ours(image(64, 64))[1:], maps, strict=True):
            close(found, norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_the_swins_encoder_takes_a_classifiers_file(tmp_path):
    model = make("inspyrenet_swin_b")
    whole = model.backbone._timms()
    torch.save(whole.state_dict(), tmp_path / "swin.pth")
    model.backbone.load_weights(tmp_path / "swin.pth")
    assert torch.equal(model.backbone.layers[1].downsample.reduction.weight, whole.layers[2].downsample.reduction.weight)


def test_dilations_of_the_res2net():
    backbone = make("inspyrenet_res2net50").backbone
    found = {path: conv.dilation for path, conv in backbone.named_modules() if ".convs." in path}
    expected = {"layer1.0": 1, "layer2.0": 1, "layer3.0": 2, "layer3.1": 2, "layer4.0": 4, "layer4.1": 8, "layer4.2": 16}
    assert all(found[f"model.{block}.convs.{i}"] == (dilation, dilation) for block, dilation in expected.items() for i in range(3))
    assert [x.shape[2] for x in backbone(image(64, 64))] == [16, 16, 8, 4, 2]


@pytest.mark.parametrize("kernel", [3, 5, 9, 17])
def test_the_ellipse_is_opencvs_and_so_is_the_transition(kernel):
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel, kernel))
    assert [2 * reach + 1 for reach in ellipse(kernel)] == element.sum(1).tolist()
    x = 3 * torch.randn(2, 1, 21, 30, generator=torch.Generator().manual_seed(0))
    p = x.sigmoid().numpy()
    for found, map_ in zip(transition(x, kernel), p, strict=True):
        assert (found[0].numpy() == (cv2.dilate(map_[0], element) - cv2.erode(map_[0], element) > 0.5)).all()


def test_rows_attend_to_each_other_where_it_is_meant():
    """Along "h" a map is the transposed map along "w"; as trained that is so of no map that is not square."""
    torch.manual_seed(0)
    layers = {(axis, reshapes): AxialAttention(16, axis, reshapes).eval() for axis in ("h", "w") for reshapes in ("as_trained", "meant")}
    for layer in layers.values():
        layer.load_state_dict(layers["h", "meant"].state_dict())
        nn.init.ones_(layer.gamma)
    x = torch.randn(2, 16, 6, 9)
    with torch.no_grad():
        close(layers["h", "meant"](x), layers["w", "meant"](x.mT).mT)
        close(layers["w", "as_trained"](x), layers["w", "meant"](x))
        assert (layers["h", "as_trained"](x) - layers["h", "meant"](x)).abs().max() > 0.1
        close(layers["h", "as_trained"](x[..., :6]), layers["w", "as_trained"](x[..., :6]))


def test_a_context_has_the_channels_of_its_map_where_it_is_meant():
    torch.manual_seed(0)
    layer = ScaleInvariantContextAttention(8, 8, (6, 9), reshapes="meant").eval()
    x, saliency = torch.randn(1, 8, 6, 9), torch.randn(1, 1, 6, 9)
    inside = (saliency.sigmoid() - 0.5).clamp(min=0)
    close(layer._contexts(x, saliency, None)[..., 0], (x * inside).sum((2, 3)))


def test_what_is_captured():
    model = make("inspyrenet_nano")
    with zoo.capture(model) as maps, torch.no_grad():
        model.pyramid(image(64, 96))
    attention = maps["decoder.refine.0"]["attention"]
    assert attention.shape == (1, 5, 64, 96) and torch.allclose(attention.sum(1), torch.ones(1, 64, 96))
    assert maps["decoder.context.1.branches.0.columns"]["attention"].shape == (1, 24, 24)


def test_details_are_blended_in_at_edges_alone():
    """Where the coarse answer is sure for far around, no detail of the full size changes it."""
    low = torch.full((1, 1, 32, 32), 9.0)
    low[..., 16:] = -9
    p2, p1, p0 = (torch.full((1, 1, side, side), 5.0) for side in (32, 64, 128))
    none = Pyramid(torch.zeros(1, 1, 16, 16), *[torch.zeros_like(p) for p in (p2, p2, p1, p1, p0, p0)])
    found, without = blend(low, none._replace(p2=p2, p1=p1, p0=p0)).d0, blend(low, none).d0
    assert torch.equal(found[..., :30], without[..., :30]) and torch.equal(found[..., 98:], without[..., 98:])
    assert (found[..., 60:68] != without[..., 60:68]).any()


def test_loss_of_a_right_answer_is_less_and_targets_stay_within_bounds():
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    masks[:, :, 10:50, 20:40] = 1
    levels = [masks]
    for _ in range(3):
        levels.append(reduce(levels[-1]))
    right = Pyramid(*[level.logit(1e-8) for level in (levels[3], levels[2], levels[2], levels[1], levels[1], levels[0], levels[0])])
    loss = zoo.SaliencyPyramidLoss()
    assert loss(right, masks) < 1 < loss(Pyramid(*[-d for d in right]), masks)
    assert loss(right, masks.float()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(Pyramid(*[d.bfloat16() for d in right]), masks.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make("inspyrenet_nano", num_classes=2), "num_classes must be 1, the salient object, got 2"),
    (lambda: make("inspyrenet_nano", base_size=(96, 50)), r"base_size must be two multiples of 32, got \(96, 50\)"),
    (lambda: make("inspyrenet_nano", dim=4), "dim must be at least 8, got 4"),
    (lambda: make("inspyrenet_nano", reshapes="so"), "reshapes must be as_trained or meant, got 'so'"),
    (lambda: make("inspyrenet", encoder="resnet18x"), "encoder must be a model that timm knows, got 'resnet18x'; did you mean resnet18"),
    (lambda: make("inspyrenet", encoder="deit_nano_patch16_224_cb"), "encoder deit_nano_patch16_224_cb "),
    (lambda: FiveMaps("test_resnet", 3, out_indices=(1, 3)), "encoder test_resnet has no maps at strides 8, 32: its are at "),
    (lambda: make("inspyrenet_nano")(torch.zeros(1, 4, 32, 32)), r"InSPyReNet: x must be \(B, 3, H, W\), got shape \(1, 4, 32, 32\)"),
    (lambda: make("inspyrenet_nano").pyramid(torch.zeros(1, 3, 40, 32)), "sizes must be multiples of 32"),
    (lambda: make("inspyrenet_nano", features_only=True), "features_only is not implemented for inspyrenet_nano"),
    (lambda: AxialAttention(16, "d"), "axis must be h or w, got 'd'"),
    (lambda: AxialAttention(16)(torch.zeros(1, 8, 4, 4)), r"AxialAttention: x must be \(B, 16, H, W\)"),
    (lambda: PyramidAxialAttention(16, sizes=(3, 4)), r"sizes must be odd numbers, got \(3, 4\)"),
    (lambda: ScaleInvariantContextAttention(8, 8, (4, 4), True)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 1, 2, 2)),
     "laplacian must be a map, as the layer was made, got None"),
    (lambda: reduce(torch.zeros(1, 1, 3, 8)), "reduce: x must be .* of at least 4 on a side"),
    (lambda: expand(torch.zeros(1, 1, 1, 8)), "expand: x must be .* of at least 2 on a side"),
    (lambda: transition(torch.zeros(1, 1, 8, 8), 4), "kernel must be odd and at least 3, got 4"),
    (lambda: zoo.SaliencyPyramidLoss(-1), "consistency must be at least 0, got -1"),
    (lambda: zoo.SaliencyPyramidLoss()(Pyramid(*[torch.zeros(1, 1, 8, 8)] * 7), torch.zeros(1, 1, 8, 9)),
     "masks must be of the logits' shape"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
