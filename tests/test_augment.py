"""Augmentation moves points and truth alike, by a function of seed, step and scene."""

import pytest
import torch

from tests.small_models import small_batch
from train.augment import AugmentConfig, augment


def moved(batch, config=None, *, seed=1, step=1):
    return augment(batch, config or AugmentConfig(), seed=seed, step=step)


@pytest.mark.parametrize("rotate", ["uniform", "half_turn", "none"])
@pytest.mark.parametrize("flip", [True, False])
def test_heights_and_distances_stay(rotate, flip):
    batch = small_batch()
    after = moved(batch, AugmentConfig(rotate=rotate, flip=flip))
    assert torch.equal(after.xyz_BT3[..., 1], batch.xyz_BT3[..., 1])
    torch.testing.assert_close(
        torch.cdist(after.xyz_BT3, after.xyz_BT3), torch.cdist(batch.xyz_BT3, batch.xyz_BT3), atol=1e-3, rtol=1e-3
    )


def test_points_and_truth_move_by_the_same_map():
    batch = small_batch()
    batch = batch.with_geometry(batch.xyz_BT3, batch.gt_BM23.clone())
    batch.gt_BM23[:, :12] = batch.xyz_BT3.reshape(3, 12, 2, 3)
    after = moved(batch)
    torch.testing.assert_close(after.gt_BM23[:, :12].reshape(3, 24, 3), after.xyz_BT3)


def test_rotation_is_about_y_and_keeps_its_sense_unless_mirrored():
    batch = small_batch(scenes=8)
    x = torch.zeros(8, 24, 3)
    x[:, 0, 0], x[:, 1, 2] = 1.0, 1.0
    after = moved(batch.with_geometry(x, batch.gt_BM23), AugmentConfig(flip=False)).xyz_BT3
    c, s = after[:, 0, 0], after[:, 1, 0]
    torch.testing.assert_close(c * c + s * s, torch.ones(8))
    torch.testing.assert_close(after[:, 0, 2], -s)
    torch.testing.assert_close(after[:, 1, 2], c)


def test_draws_have_their_distribution():
    batch = small_batch()
    signs, angles = [], []
    x = torch.zeros(3, 24, 3)
    x[:, 0, 0], x[:, 1, 2] = 1.0, 1.0
    for step in range(400):
        after = moved(batch.with_geometry(x, batch.gt_BM23), step=step).xyz_BT3
        angles.append(torch.atan2(after[:, 1, 0], after[:, 1, 2]))
        signs.append((after[:, 0, 0] * after[:, 1, 2] - after[:, 0, 2] * after[:, 1, 0]) > 0)
    assert 0.45 < torch.stack(signs).float().mean() < 0.55
    angles = torch.stack(angles)
    assert angles.cos().mean().abs() < 0.07
    assert angles.sin().mean().abs() < 0.07


def test_half_turns_are_exact():
    batch = small_batch(scenes=16)
    after = moved(batch, AugmentConfig(rotate="half_turn", flip=False))
    same = (after.xyz_BT3 == batch.xyz_BT3).all(dim=(1, 2))
    turned = (after.xyz_BT3 == batch.xyz_BT3 * torch.tensor([-1.0, 1.0, -1.0])).all(dim=(1, 2))
    assert (same ^ turned).all()
    assert same.any()
    assert turned.any()


def test_without_both_nothing_moves():
    batch = small_batch()
    after = moved(batch, AugmentConfig(rotate="none", flip=False))
    assert torch.equal(after.xyz_BT3, batch.xyz_BT3)


def test_a_scene_moves_the_same_in_any_batch_and_otherwise_at_another_step():
    batch = small_batch()
    alone = moved(batch.rows(torch.tensor([2])))
    assert torch.equal(alone.xyz_BT3[0], moved(batch).xyz_BT3[2])
    assert not torch.equal(moved(batch).xyz_BT3, moved(batch, step=2).xyz_BT3)
    assert not torch.equal(moved(batch).xyz_BT3, moved(batch, seed=2).xyz_BT3)
