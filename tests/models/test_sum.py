"""SUM: kinds of pictures, any size, VMamba's weights as the start, and what goes with being a model of the zoo."""
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.checkpoints import load_model
from zoo.errors import InputError
from zoo.exporting.onnx import export_onnx
from zoo.models.saliency_mamba import SUM, PatchExpand
from zoo.models.vmamba import VMamba

TINY = dict(dims=(8, 16, 32), depths=(1, 1, 1), decoder_depths=(1, 1, 1), state_dim=2)


def make(**args) -> nn.Module:
    torch.manual_seed(0)
    model = SUM(**{**TINY, **args}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def image(*size: int, batch: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def test_kinds_in_all_the_ways_of_telling_them():
    model, x = make(), image(16, 32, batch=3)
    with torch.no_grad():
        by_kind = [model(x, kind) for kind in range(4)]
        assert torch.equal(model(x), by_kind[0]) and all(not torch.allclose(by_kind[0], other, atol=1e-4) for other in by_kind[1:])
        kinds = torch.tensor([2, 0, 3])
        expected = torch.stack([by_kind[kind][i] for i, kind in enumerate(kinds.tolist())])
        torch.testing.assert_close(model(x, kinds), expected)
        for one_hot in (torch.eye(4)[kinds], torch.eye(4, dtype=torch.int64)[kinds]):
            torch.testing.assert_close(model(x, one_hot), expected)
        other = make(condition=2)
        torch.testing.assert_close(other(x), by_kind[2])


@pytest.mark.parametrize("size", [(1, 1), (7, 45), (48, 33)], ids=str)
def test_any_size(size):
    """As that of the picture whose last row and column are repeated up to multiples of what the stages divide by, cut."""
    model, x = make(), image(*size)
    whole = x
    for axis in (2, 3):
        whole = torch.cat([whole, *[whole.narrow(axis, -1, 1)] * (-x.shape[axis] % 16)], axis)
    with torch.no_grad():
        assert model(x).shape == (1, 1, *size)
        torch.testing.assert_close(model(x), model(whole)[..., :size[0], :size[1]])
        assert model(x[:0]).shape == (0, 1, *size)


def test_layouts_and_the_rest_of_a_batch_do_not_matter():
    model, x = make(), image(32, 48, batch=2)
    with torch.no_grad():
        out = model(x)
        for given in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, -1)[..., ::2]):
            torch.testing.assert_close(model(given), out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(x[1:]), out[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_dtypes(dtype, bound):
    model, x = make(), image(32, 32)
    with torch.no_grad():
        expected = model(x, 1)
        out = model.to(dtype)(x.to(dtype), 1)
    assert out.dtype == dtype and (out.float() - expected).abs().mean() < bound


def test_skips_are_what_enters_the_stages_and_the_first_is_of_no_use():
    model, x = make(), image(32, 32)
    with torch.no_grad():
        last, given = model.encoder(x)
        assert [tuple(skip.shape[1:]) for skip in given] == [(8, 8, 8), (4, 4, 16), (2, 2, 32)] and last.shape == given[-1].shape
        kind = torch.tensor([0])
        y = model.decoder[0](last, kind)
        y = model.decoder[2](model.decoder[1](y + given[2], kind) + given[1], kind)
        torch.testing.assert_close(model.head(model.final_up(y).permute(0, 3, 1, 2)).sigmoid(), model(x))


def test_expansion_puts_channels_down_then_right():
    expand, x = PatchExpand(8), torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        y = expand(x)
        wide = expand.expand(x)
        for down in range(2):
            for right in range(2):
                part = wide[..., 4 * (2 * down + right):][..., :4]
                torch.testing.assert_close(y[:, down::2, right::2], expand.norm(part))


def test_vmambas_weights_start_the_encoder_and_its_mirror_image(tmp_path):
    torch.manual_seed(1)
    whole = VMamba(dims=(8, 16, 32), depths=(1, 2, 1), state_dim=2, num_classes=7)
    torch.save({"model": whole.state_dict()}, tmp_path / "w.pth")
    model = make(depths=(1, 2, 1), decoder_depths=(1, 3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_encoder(str(tmp_path / "w.pth"))
    after, given = model.state_dict(), whole.state_dict()
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, given[name]), name
    for ours, theirs in {"decoder.0.blocks.0": "stages.2.blocks.0", "decoder.1.blocks.1": "stages.1.blocks.1",
                         "decoder.2.blocks.0": "stages.0.blocks.0"}.items():
        assert torch.equal(after[f"{ours}.attn.in_proj.weight"], given[f"{theirs}.attn.in_proj.weight"])
    for name in ("decoder.1.blocks.2.attn.A_logs", "decoder.0.blocks.0.mlp.0.weight", "decoder.1.upsample.expand.weight", "head.weight"):
        assert torch.equal(after[name], before[name])
    torch.save({"model": timm.create_model("vmamba_nano_v0").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not hold the weights of VMamba: "):
        model.load_encoder(str(tmp_path / "w.pth"))


def test_stochastic_depth_falls_in_the_decoder():
    model = make(depths=(1, 1, 2), decoder_depths=(2, 1, 1), drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.decoder for block in stage.blocks]
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert getattr(model.encoder.stages[2].blocks[1].drop_path, "drop_prob", 0.0) == pytest.approx(0.3)


def test_every_parameter_learns_and_gradient_checkpointing_changes_nothing():
    grads = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        out = model(image(32, 32, batch=4), torch.arange(4))
        zoo.FixationLoss()(out, image(32, 32, batch=4, channels=1).abs(), (image(32, 32, batch=4, channels=1) > 1.5).float()).backward()
        grads.append({path: p.grad for path, p in model.named_parameters()})
    assert not [path for path, grad in grads[0].items() if grad is None or not grad.isfinite().all()]
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, atol=1e-5, rtol=1e-4)
    assert (grads[0]["decoder.0.blocks.0.condition"].abs().sum(1) > 0).all()


def test_groups_of_parameters_and_no_decay():
    model = make()
    assert {name.rpartition(".")[2] for name in model.no_weight_decay()} == {"A_logs", "Ds"}
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(name for name, _ in model.named_parameters())


def test_compiled_whole():
    model = make(dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for kinds in (None, torch.tensor([1, 3])):
            x = image(32, 40, batch=2)
            torch.testing.assert_close(compiled(x, kinds), model(x, kinds), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_exported_with_the_same_answers_at_any_size(tmp_path):
    model = make(dims=(16, 32), depths=(1, 0), decoder_depths=(1, 1))
    exported = export_onnx(model, load_model("sum_nano")[1], tmp_path / "w.onnx")
    assert exported.free_size and exported.free_batch and exported.worst < 1e-3, exported.reason
    session, x = onnxruntime.InferenceSession(tmp_path / "w.onnx"), image(50, 75, batch=2)
    found, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), atol=1e-4)


def test_saved_and_loaded(tmp_path):
    model = timm.create_model("sum_nano").eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    again = timm.create_model("sum_nano", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")), condition=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(image(40, 50)), model(image(40, 50), 3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make(num_classes=2), "num_classes must be 1, the map of fixations, got 2"),
    (lambda: make(condition=4), "condition must be 0 to 3, got 4"),
    (lambda: make(condition="ui"), "condition must be a whole number or a tensor, got 'ui'"),
    (lambda: make(conditions=0), "conditions must be at least 1, got 0"),
    (lambda: make(depths=(1, 1)), r"dims, depths and decoder_depths must be of the same stages, got \(8, 16, 32\), \(1, 1\) and"),
    (lambda: make(dims=(8, 16, 24)), r"dims must begin with a multiple of 4 and double, got \(8, 16, 24\)"),
    (lambda: make()(image(16, 16), 4), "condition must be 0 to 3, got 4"),
    (lambda: make()(image(16, 16), torch.tensor([-1])), r"condition must be 0 to 3, got \[-1\]"),
    (lambda: make()(image(16, 16), torch.tensor([1.0])), "condition must be of int64, or one-hot, got torch.float32"),
    (lambda: make()(image(16, 16), torch.zeros(1, 3)), r"condition must be \(B,\) or one-hot \(B, 4\), got shape \(1, 3\)"),
    (lambda: make()(image(16, 16, channels=4)), r"SUM: x must be \(B, 3, H, W\), got shape \(1, 4, 16, 16\)"),
    (lambda: timm.create_model("sum_nano", features_only=True), "features_only is not implemented for sum_nano"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call()
