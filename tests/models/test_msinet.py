"""MSI-Net: the authors' numbers, TensorFlow's names and upsampling, any size and encoder, and what goes with being a model of the zoo."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.models import msinet
from zoo.models.msinet import MEANS, MSINet, VGGEncoder, checkpoint_filter_fn, enlarged, scaled

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN = torch.tensor(MEANS)[:, None, None]


def make(name: str = "msinet_nano", **args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **args).eval()


def image(*size: int, batch: int = 1, channels: int = 3) -> torch.Tensor:
    return 255 * torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1)) - 110


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5):
    assert (ours - theirs).abs().max() <= bound * (1 + theirs.abs().max())


def test_the_authors_numbers():
    vector = load_file(GOLDEN / "msinet" / "model.safetensors")
    state, grads = ({name.removeprefix(part): value for name, value in vector.items() if name.startswith(part)}
                    for part in ("state/", "grad/state/"))
    model = MSINet(encoder_args=dict(widths=(2, 4, 8, 16, 16)), dim=8).eval()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    x = vector["input"].permute(0, 3, 1, 2).requires_grad_()
    density = model.density(x - MEAN)
    out = model(x - MEAN)
    close(density.permute(0, 2, 3, 1), vector["decoder"])
    close(out.permute(0, 2, 3, 1), vector["output"])
    grad_input, *own = torch.autograd.grad((out.permute(0, 2, 3, 1) * vector["cotangent/output"]).sum(), [x, *model.parameters()])
    close(grad_input.permute(0, 2, 3, 1), vector["grad/input"], 1e-4)
    converted = checkpoint_filter_fn(grads, model)
    assert converted.keys() == {name for name, _ in model.named_parameters()}
    for (name, _), grad in zip(model.named_parameters(), own, strict=True):
        close(grad, converted[name], 1e-4)


def test_the_authors_checkpoint_loads(tmp_path):
    """By the names and shapes of their file, value for value, axes turned; a name less is told."""
    manifest = json.loads((GOLDEN / "manifests" / "msinet.json").read_text())
    state = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in manifest["state"].items()}
    save_file(state, tmp_path / "w.safetensors")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.safetensors")))
    model = timm.create_model("msinet", **overlay)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"] == 24_934_209
    loaded = model.state_dict()
    assert len(loaded) == len(state)
    for ours, theirs in {"encoder.stages.4.conv3": "conv5/conv5_3", "context.branches.3": "aspp/conv1_4", "context.mean": "aspp/conv1_5",
                         "context.fuse": "aspp/conv2", "decoder.2": "decoder/conv3", "head": "decoder/conv4"}.items():
        assert torch.equal(loaded[f"{ours}.weight"], state[f"{theirs}/kernel"].permute(3, 2, 0, 1))
        assert torch.equal(loaded[f"{ours}.bias"], state[f"{theirs}/bias"])
    suffixed = checkpoint_filter_fn({f"{name}:0": value for name, value in state.items()}, model)
    assert all(torch.equal(suffixed[name], value) for name, value in loaded.items())
    del state["aspp/conv2/bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"does not hold the weights of msinet: .* 1 do not, such as context.fuse.bias \(missing\)"):
        timm.create_model("msinet", **overlay)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)], ids=str)
def test_upsampling_is_tensorflows(size):
    """Two to one, in numpy: each row and column, and the mean of it and the next."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = x.numpy()
    for axis in (2, 3):
        n = expected.shape[axis]
        rows = []
        for i in range(2 * n):
            here, following = (np.take(expected, [min(n - 1, j)], axis) for j in (i // 2, (i + 1) // 2))
            rows.append((here + following) / 2)
        expected = np.concatenate(rows, axis)
    assert torch.equal(enlarged(x), torch.from_numpy(expected))
    if min(size) > 1:
        for corners in (True, False):
            other = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=corners)
            assert (other - enlarged(x)).abs().max() > 0.05
    assert torch.autograd.gradcheck(enlarged, x.requires_grad_())


def test_pools_of_stride_one_look_at_the_next_row_and_column():
    encoder = VGGEncoder(widths=(2, 2, 2, 2, 2))
    x = torch.randn(1, 2, 5, 6)
    expected = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, 1)
    encoder.stages[3] = encoder.stages[4] = nn.Identity()
    for i in range(3):
        encoder.stages[i] = nn.Identity()
    maps = encoder(x.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert torch.equal(maps[0], x) and torch.equal(maps[1], expected)


def test_a_map_goes_from_0_to_1_whatever_else_is_in_the_batch():
    model, x = make(), image(48, 64, batch=3)
    with torch.no_grad():
        out = model(x)
        assert (out.amin((1, 2, 3)) == 0).all() and torch.allclose(out.amax((1, 2, 3)), torch.ones(3), atol=1e-4)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, -1)[..., ::2]):
            close(model(given)[1:2], model(x[1:2]), 1e-4)
    assert torch.equal(scaled(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("size", [(1, 1), (7, 45), (64, 96), (33, 130)], ids=str)
def test_any_size(size):
    """As that of the picture whose last row and column are repeated up to multiples of 8, cut."""
    model, x = make(), image(*size)
    whole = x
    for axis in (2, 3):
        whole = torch.cat([whole, *[whole.narrow(axis, -1, 1)] * (-x.shape[axis] % 8)], axis)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (1, 1, *size) and out.isfinite().all()
        close(out, scaled(model.density(whole)[..., :size[0], :size[1]]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.1)])
def test_dtypes(dtype, bound):
    model, x = make(), image(48, 64)
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and (out.float() - expected).abs().mean() < bound


def test_every_parameter_learns_and_gradient_checkpointing_changes_nothing():
    grads = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        zoo.FixationDivergenceLoss()(model(image(48, 64, batch=2)), image(48, 64, batch=2, channels=1).abs()).backward()
        grads.append({path: p.grad for path, p in model.named_parameters()})
    assert not [path for path, grad in grads[0].items() if grad is None or not grad.isfinite().all()]
    for path, grad in grads[0].items():
        close(grads[1][path], grad, 1e-4)


def test_first_values_are_tensorflows():
    """Glorot's uniform ones of every convolution, and no bias; also where storage came later."""
    model = make("msinet", device="meta").to_empty(device="cpu")
    model.init_weights()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any()
            continue
        bound = math.sqrt(6 / ((value.shape[0] + value.shape[1]) * value[0, 0].numel()))
        assert value.abs().max() <= bound and (value.numel() < 1000 or abs(value.std() * math.sqrt(3) / bound - 1) < 0.05), name


def test_compiled_whole():
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((48, 64), (50, 75)):
            close(compiled(image(*size)), model(image(*size)), 1e-4)
    torch._dynamo.reset()


def test_saved_and_loaded(tmp_path):
    model = make()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    again = timm.create_model("msinet_nano", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth"))).eval()
    with torch.no_grad():
        assert torch.equal(again(image(40, 50)), model(image(40, 50)))


def vgg() -> nn.Module:
    """A VGG of timm's names and the nano's widths, eight pools' strides left out of account: one stage after the other."""
    torch.manual_seed(3)
    layers, dim = [], 3
    for width, depth in zip((8, 16, 32, 64, 64), msinet.DEPTHS, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(dim, width, 3, padding=1), nn.ReLU()]
            dim = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def test_timms_vgg_initialises_the_encoder(tmp_path):
    """What its first stages give for a picture that it sees normalised, these give for one of 0 to 255 less the means, but at borders."""
    theirs, model = vgg(), make()
    state = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({**state, "head.fc.weight": torch.zeros(5, 7)}, tmp_path / "vgg.pth")
    model.encoder.load_weights(str(tmp_path / "vgg.pth"))
    cfg = timm.get_pretrained_cfg("vgg16")
    pixels = torch.rand(1, 3, 64, 64)
    normal = (pixels - torch.tensor(cfg.mean)[:, None, None]) / torch.tensor(cfg.std)[:, None, None]
    with torch.no_grad():
        first = theirs[:5](normal)
        ours = F.max_pool2d(model.encoder.stages[0](255 * pixels - MEAN), 2)
    close(ours[..., 2:-2, 2:-2], first[..., 2:-2, 2:-2], 1e-4)
    with pytest.raises(InputError, match="holds no weights of the encoder's 13 convolutions"):
        make("msinet_nano", encoder_args=dict(widths=(4, 4, 4, 4, 4))).encoder.load_weights(str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("encoder", ["test_resnet", "resnet10t", "test_efficientnet", "sknet_nano"])
def test_any_encoder_of_output_stride_8(encoder, tmp_path):
    model = make("msinet_nano", encoder=encoder, in_chans=2, dim=8).train()
    assert all(x.shape[2:] == (8, 12) for x in model.encoder(image(64, 96, batch=2, channels=2)))
    out = model(image(65, 50, batch=2, channels=2))
    assert out.shape == (2, 1, 65, 50)
    (out * torch.rand_like(out)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    assert model.pretrained_cfg["mean"] == timm.get_pretrained_cfg(encoder).mean
    whole = timm.create_model(encoder, in_chans=2)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model.encoder.load_weights(str(tmp_path / "w.pth"))
    first = next(name for name, p in whole.named_parameters() if p.ndim == 4)
    stem = whole.get_parameter(first)
    assert any(p.shape == stem.shape and torch.equal(p, stem) for p in model.encoder.parameters())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make(num_classes=2), "num_classes must be 1, the map of fixations, got 2"),
    (lambda: make(dim=4), "dim must be at least 8, got 4"),
    (lambda: make(encoder_args=dict(widths=(4, 4))), r"widths must be of 5 stages, got \(4, 4\)"),
    (lambda: make(encoder="resnet18x"), "encoder must be a model that timm knows, got 'resnet18x'; did you mean resnet18"),
    (lambda: make(encoder="vit_tiny_patch16_224"), "encoder vit_tiny_patch16_224 "),
    (lambda: make(encoder="halonet_nano", encoder_args=dict(out_indices=(0,))), "has no output stride 8: its maps are .*4"),
    (lambda: make(features_only=True), "features_only is not implemented for msinet_nano"),
    (lambda: make()(torch.zeros(1, 4, 32, 32)), r"MSINet: x must be \(B, 3, H, W\), got shape \(1, 4, 32, 32\)"),
    (lambda: make()(torch.zeros(3, 32, 32)), r"got shape \(3, 32, 32\)"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
