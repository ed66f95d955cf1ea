"""Point features: their order, their width, and what a missing field means."""

import math

import torch

from perceiver.model import Perceiver, PerceiverConfig
from tests.small_models import small_batch


def test_features_stand_in_the_published_order():
    batch, model = small_batch(), Perceiver(PerceiverConfig(latent_layers=1, decoder_layers=1))
    t = model.tokenizer
    features = t(batch)
    assert features.shape == (3, 24, 95) == (*features.shape[:2], t.width)
    phase = (2 * math.pi * batch.xyz_BT3.double() @ t.pos_enc.B.double().T).float()
    parts = features.split([3, 32, 32, 16, 2, 8, 2], dim=-1)
    expected = [
        batch.xyz_BT3,
        phase.sin(),
        phase.cos(),
        t.label_emb.weight[batch.class_id_BT.long()],
        t.src_emb.weight[batch.source_BT.long()],
        t.behind_emb.weight[batch.behind_BT.long()],
        batch.votes_BT2,
    ]
    for part, want in zip(parts, expected, strict=True):
        # a phase of hundreds of radians carries a few 1e-4 of float32 rounding
        torch.testing.assert_close(part, want, atol=2e-4, rtol=1e-5)


def test_fourier_matrix_is_the_published_constant():
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(32, 3, generator=generator) * 10
    assert torch.equal(Perceiver(PerceiverConfig(latent_layers=1)).tokenizer.pos_enc.B, want)


def test_embedding_gradients_are_sums_over_the_points():
    batch = small_batch()
    model = Perceiver(PerceiverConfig(latent_layers=1, decoder_layers=1))
    weight = model.tokenizer.label_emb.weight
    upstream = torch.randn(3, 24, 95)
    (model.tokenizer(batch) * upstream).sum().backward()
    want = torch.zeros_like(weight).index_add(
        0, batch.class_id_BT.reshape(-1).long(), upstream[..., 67:83].reshape(-1, 16)
    )
    torch.testing.assert_close(weight.grad, want)


def test_vote_features_can_be_left_out():
    model = Perceiver(PerceiverConfig(latent_layers=1, decoder_layers=1, vote_features=False))
    assert model.tokenizer(small_batch()).shape[-1] == 93
