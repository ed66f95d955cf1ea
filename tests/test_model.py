"""The published architecture: its size, its names, its start, and what its output may depend on."""

import re

import pytest
import torch

from perceiver.blocks import DropoutKey
from perceiver.model import Perceiver, PerceiverConfig, Segments
from tests.small_models import SMALL, small_batch, stirred


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint, written out from the architecture's description."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokenizer.pos_enc.B": (32, 3),
        "tokenizer.label_emb.weight": (13, 16),
        "tokenizer.src_emb.weight": (2, 2),
        "tokenizer.behind_emb.weight": (29, 8),
        "segmenter.query_offsets": (64, 2, 3),
        "segmenter.input_proj.0.weight": (1024, 95),
        "segmenter.input_proj.0.bias": (1024,),
        "segmenter.input_proj.2.weight": (256, 1024),
        "segmenter.input_proj.2.bias": (256,),
        "segmenter.input_proj.3.weight": (256,),
        "segmenter.latent_embed.weight": (256, 256),
        "segmenter.query_embed.weight": (64, 256),
        "segmenter.segment_head.weight": (7, 256),
        "segmenter.segment_head.bias": (7,),
        "segmenter.conf_head.weight": (1, 256),
        "segmenter.conf_head.bias": (1,),
    }
    blocks = [(f"latent_layers.{i}", "cross") for i in (0, 4, 6)] + [
        (f"latent_layers.{i}", "self_attn") for i in range(7)
    ]
    blocks += [(f"decoder_layers.{i}", kind) for i in range(3) for kind in ("cross", "self_attn")]
    for layer, kind in blocks:
        name = f"segmenter.{layer}.{kind}"
        shapes[f"{name}.norm.weight"] = (256,)
        shapes[f"{name}.attn.log_scale"] = (4,)
        for part, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("out_proj", 256)):
            shapes[f"{name}.attn.{part}.weight"] = (rows, 256)
    for layer in [f"latent_layers.{i}" for i in range(7)] + [f"decoder_layers.{i}" for i in range(3)]:
        name = f"segmenter.{layer}.ffn"
        shapes[f"{name}.norm.weight"] = (256,)
        shapes |= {f"{name}.ffn.linear1.weight": (1024, 256), f"{name}.ffn.linear1.bias": (1024,)}
        shapes |= {f"{name}.ffn.linear2.weight": (256, 1024), f"{name}.ffn.linear2.bias": (256,)}
    return shapes


@pytest.fixture(scope="module")
def published() -> Perceiver:
    return Perceiver(PerceiverConfig())


def test_published_number_of_parameters(published):
    assert sum(p.numel() for p in published.parameters()) == 8_853_892


def test_published_names_and_shapes(published):
    assert {name: tuple(value.shape) for name, value in published.state_dict().items()} == published_shapes()


def test_residual_branches_start_at_zero(published):
    for name, parameter in published.named_parameters():
        if re.search(r"out_proj\.weight|linear2\.(weight|bias)", name):
            assert not parameter.any(), name


def test_head_starts_as_published(published):
    head = published.segmenter.segment_head
    assert head.bias.tolist() == [0, 0, 0, 0, 0, 0, 0.5]
    assert head.weight.std().item() == pytest.approx(1e-3, rel=0.1)
    assert published.segmenter.query_offsets.std().item() == pytest.approx(0.05, rel=0.2)
    assert published.segmenter.latent_embed.weight.std().item() == pytest.approx(1, rel=0.02)


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = Perceiver(SMALL, seed=1), Perceiver(SMALL, seed=1), Perceiver(SMALL, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.segmenter.latent_embed.weight, c.segmenter.latent_embed.weight)


def test_points_in_the_padding_have_no_effect():
    model, batch = stirred(Perceiver(SMALL)), small_batch()
    moved = batch.xyz_BT3.clone()
    moved[:, int(batch.point_count_B.max()) :] = 77.0
    for a, b in zip(model(batch), model(batch.with_geometry(moved, batch.gt_BM23)), strict=True):
        assert torch.equal(a, b)


def test_order_of_the_points_has_no_effect_beyond_rounding():
    model, batch = stirred(Perceiver(SMALL)), small_batch()
    order = torch.cat([torch.randperm(21), torch.arange(21, 24)])
    shuffled = type(batch)(
        **{
            name: value[:, order]
            if name in ("xyz_BT3", "class_id_BT", "source_BT", "behind_BT", "votes_BT2")
            else value
            for name, value in vars(batch).items()
        }
    )
    for a, b in zip(model(batch), model(shuffled), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_segments_have_unit_directions_and_positive_lengths():
    predicted = stirred(Perceiver(SMALL))(small_batch())
    assert predicted.mid_BN3.shape == (3, 8, 3)
    torch.testing.assert_close(predicted.dir_BN3.norm(dim=-1), torch.ones(3, 8))
    assert (predicted.len_BN > 0).all()


def test_endpoints_are_half_a_length_from_the_midpoint():
    predicted = Segments(
        mid_BN3=torch.tensor([[[1.0, 2.0, 3.0]]]),
        dir_BN3=torch.tensor([[[0.0, 1.0, 0.0]]]),
        len_BN=torch.tensor([[4.0]]),
        conf_BN=torch.zeros(1, 1),
    )
    assert predicted.endpoints().tolist() == [[[[1.0, 0.0, 3.0], [1.0, 4.0, 3.0]]]]


def test_dropout_comes_from_its_key_alone():
    model, batch = stirred(Perceiver(SMALL)), small_batch()
    key = DropoutKey(rate=0.3, seed=1, step=5, scene_B=batch.scene_B)
    other = DropoutKey(rate=0.3, seed=1, step=6, scene_B=batch.scene_B)
    first, again, later = (model(batch, drop=k).mid_BN3 for k in (key, key, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, model(batch).mid_BN3)


def test_every_parameter_has_a_gradient_but_the_unused_offset():
    model, batch = stirred(Perceiver(SMALL)), small_batch()
    predicted = model(batch)
    (predicted.endpoints().square().sum() + predicted.conf_BN.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert not model.segmenter.query_offsets.grad[:, 1].any()


def test_heads_stay_in_float32_under_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = stirred(Perceiver(SMALL))(small_batch())
    assert {value.dtype for value in predicted} == {torch.float32}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden", 0),
        ("dropout", 1.0),
        ("num_heads", 3),
        ("num_heads", 0),
        ("num_heads", 32),
        ("kv_heads_self", 3),
        ("cross_attn_interval", 0),
    ],
)
def test_impossible_architectures_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PerceiverConfig(**{field: value})
