"""The layers on fused operators are those of `perceiver.blocks`: the same function, masks and gradients."""

import dataclasses
import functools

import pytest
import torch

import perceiver.fused
from kernels import reduce
from perceiver.blocks import DropoutKey, run_layers
from perceiver.fused import fused_layers
from perceiver.loss import LossConfig, segment_loss
from perceiver.model import Perceiver
from tests.small_models import SMALL, small_batch, stirred

# the first and the last latent layer read the points, the one between begins with self-attention
CONFIG = dataclasses.replace(SMALL, latent_layers=3, kv_heads_cross=2)


@functools.cache
def outputs_and_gradients(impl, device, dtype=torch.float32):
    """The model's outputs and the gradients of all its parameters, by name."""
    model, batch = stirred(Perceiver(CONFIG)).to(device), small_batch(scenes=2).to(device)
    drop = DropoutKey(rate=0.3, seed=5, step=2, scene_B=batch.scene_B)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        predicted = model(batch, drop=drop, impl=impl)
    loss = (predicted.endpoints() * torch.arange(3, device=device)).sin().sum() + predicted.conf_BN.square().sum()
    loss.backward()
    outputs = {name: output.detach() for name, output in predicted._asdict().items()}
    return outputs | {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, truth):
    return (actual - truth).norm().item() / truth.norm().item()


def of_all(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def decoder(device):
    """A stack of layers, its table, a memory, and the scenes it is of."""
    segmenter = stirred(Perceiver(SMALL)).to(device).segmenter
    memory_BTC = torch.randn(3, 24, SMALL.hidden, generator=torch.Generator().manual_seed(1)).to(device)
    scene_B = torch.tensor([3, 2**32 - 1, 7], device=device)
    return segmenter.decoder_layers, segmenter.query_embed.weight, memory_BTC, scene_B


def test_outputs_and_all_gradients_agree_with_the_plain_layers(device):
    plain, fused = (outputs_and_gradients(impl, device) for impl in ("eager", "triton"))
    far = {name: error for name in plain if not (error := relative_error(fused[name], plain[name])) < 1e-5}
    assert not far


# PyTorch's own, while it traces an autograd function
@pytest.mark.filterwarnings("ignore:.* should not be instantiated")
def test_a_compiled_model_has_the_gradients_of_plain_layers(device):
    model, batch = stirred(Perceiver(CONFIG)).to(device), small_batch(scenes=2).to(device)
    drop = DropoutKey(rate=0.3, seed=5, step=2, scene_B=batch.scene_B)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(function, impl):
        predicted = function(batch, drop=drop, impl=impl)
        loss = (predicted.endpoints() * torch.arange(3, device=device)).sin().sum() + predicted.conf_BN.square().sum()
        return torch.autograd.grad(loss, parameters)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, found, expected in zip(names, gradients(compiled, "triton"), gradients(model, "eager"), strict=True):
        assert relative_error(found, expected) < 1e-5, name


def test_bfloat16_errs_no_more_than_twice_what_plain_layers_err(device):
    exact = of_all(outputs_and_gradients("eager", device))
    plain, fused = (of_all(outputs_and_gradients(impl, device, torch.bfloat16)) for impl in ("eager", "triton"))
    assert relative_error(fused, exact) < 2 * relative_error(plain, exact)


def test_gradients_of_weights_are_products_in_bfloat16_as_autocast_returns_them(device):
    fused = outputs_and_gradients("triton", device, torch.bfloat16)
    names = [name for name in fused if name.endswith(("_proj.weight", "linear1.weight", "linear2.weight"))]
    assert len(names) == 4 * 7 + 2 * 4
    for name in names:
        assert fused[name].dtype == torch.float32, name
        assert torch.equal(fused[name], fused[name].bfloat16().float()), name


def test_a_stack_is_its_products_and_one_launch_between_them(device):
    """What the fused operators replace is not called: masks, norms and GELUs of PyTorch, casts of single weights."""
    segmenter, scene_B = stirred(Perceiver(CONFIG)).to(device).segmenter, torch.tensor([1, 2], device=device)
    drop = DropoutKey(rate=0.3, seed=5, step=torch.tensor(2, device=device), scene_B=scene_B)
    memory_BTC = torch.zeros(2, 24, CONFIG.hidden, dtype=torch.bfloat16, device=device)
    with torch.profiler.profile(acc_events=True) as profile, torch.autocast(device.type, torch.bfloat16):
        out_BLC = fused_layers(
            segmenter.latent_layers, segmenter.latent_embed.weight, memory_BTC, drop=drop, as_memory=True
        )
    calls = {event.key: event.count for event in profile.key_averages()}
    assert out_BLC.dtype == torch.bfloat16
    # 5 attentions: their queries and outputs, keys and values of 3 alone and of 2 together; 3 feed-forwards
    assert calls["aten::linear"] == 2 * 5 + 3 + 1 + 2 * 3
    assert calls["ridgeline::residual_norm_forward"] == 1 + 5 + 3
    assert calls["ridgeline::bias_gelu_forward"] == 3
    assert calls["aten::_foreach_copy_"] == 1
    assert not calls.keys() & {"aten::_to_copy", "aten::gelu", "aten::rms_norm", "aten::where", "aten::cat"}


def test_a_backward_makes_no_zeros_for_outputs_and_columns_without_a_gradient(device):
    model, batch = stirred(Perceiver(CONFIG)).to(device), small_batch(scenes=2).to(device)
    predicted = model(batch, impl="triton")
    loss = segment_loss(
        predicted, batch.gt_BM23, batch.gt_count_B, LossConfig(iterations=2), endpoint_weight=1.0, impl="triton"
    )
    with torch.profiler.profile(acc_events=True) as profile:
        loss.total.backward()
    calls = {event.key for event in profile.key_averages()}
    assert "ridgeline::match_segments_backward" in calls
    assert not calls & {"aten::slice_backward", "aten::zeros"}


def test_joint_sums_have_the_bits_of_operators_that_add_up_alone(device, monkeypatch):
    joint = outputs_and_gradients("triton", device)
    launched, add_up = [], reduce.sum_each
    with monkeypatch.context() as patch:
        patch.setattr(perceiver.fused, "_sums", lambda blocks: None)
        alone = outputs_and_gradients.__wrapped__("triton", device)
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "sum_each", lambda *arguments: launched.append(len(arguments[0])) or add_up(*arguments))
        outputs_and_gradients.__wrapped__("triton", device)
    assert all(torch.equal(joint[name], alone[name]) for name in joint)
    # after the heads, of each stack its attentions, its GELUs, the norm of its table, and its other seams: 2 and 7
    # gains with 1 and 3 biases
    assert sorted(launched[1:5]) + sorted(launched[5:9]) == [1, 1, 2, 3, 1, 3, 5, 10]


@pytest.mark.parametrize("lacking", ["layers", "cross-attention"])
def test_a_stack_whose_table_meets_no_item_is_refused(lacking, device):
    layers, table_LC, memory_BTC, _ = decoder(device)
    layers[0].cross = None
    with pytest.raises(ValueError, match="layers must begin with one that has a cross-attention, got"):
        fused_layers([] if lacking == "layers" else layers, table_LC, memory_BTC)


def test_a_step_in_a_tensor_is_that_step(device):
    layers, table_LC, memory_BTC, scene_B = decoder(device)
    with torch.no_grad():
        outputs = [
            fused_layers(layers, table_LC, memory_BTC, drop=DropoutKey(rate=0.3, seed=5, step=step, scene_B=scene_B))
            for step in (2, torch.tensor(2, device=device), torch.tensor(3, device=device))
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_an_item_alone_is_what_it_is_among_others(rate, device):
    layers, table_LC, memory_BTC, scene_B = decoder(device)

    def run(function, rows):
        drop = DropoutKey(rate=rate, seed=5, step=2, scene_B=scene_B[rows]) if rate else None
        with torch.no_grad():
            return function(layers, table_LC, memory_BTC[rows], drop=drop)

    together, alone = run(fused_layers, slice(0, 3)), run(fused_layers, slice(1, 2))
    torch.testing.assert_close(together, run(run_layers, slice(0, 3)), atol=1e-5, rtol=1e-4)
    # the operators' bits are the same, those of the products between them are the library's
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-4)
