"""Every peer computes what ours computes, or says why it cannot; each names its version, licence and differences."""

import pytest
import torch

from bench import peers
from kernels.matching import match_segments_reference
from kernels.sinkhorn import sinkhorn, sinkhorn_reference

SETTINGS = {"eps": 0.1, "iterations": 20, "dustbin": 1.5}
MATCHING = {"eps": 0.1, "iterations": 20, "cost_scale": 5.0, "dustbin": 0.3, "direction_weight": 0.3}
PLAIN = ("log domain", "scaling domain")


def test_names_differ_and_libraries_are_named_with_their_licences():
    suites = [peers.dustbin_peers(**SETTINGS), peers.matching_peers(**MATCHING), peers.attention_peers()]
    for suite in [*suites, peers.balanced_peers()]:
        assert len(peers.by_name(*suite)) == len(suite)
        assert all(peer.package and peer.licence for peer in suite)
    assert all(peer.differs for peer in peers.balanced_peers())
    assert {"POT", "geomloss", "flash-sinkhorn"} == {peer.package for peer in peers.balanced_peers()}


def test_a_peer_that_is_not_installed_says_so():
    absent = peers.Peer(name="absent", solve=lambda: None, package="no-such-distribution")
    assert absent.version() is None
    with pytest.raises(ImportError, match="not installed"):
        absent.require()
    peers.OURS.require()
    assert peers.OURS.version() is None


@pytest.mark.parametrize("name", PLAIN)
def test_plain_solvers_with_a_dustbin_give_the_plan_and_gradient_of_sinkhorn(name):
    generator = torch.Generator().manual_seed(3)
    cost_BNM = 5 * torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    cols_B, grad_BNM = torch.tensor([7, 3, 1]), torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    peer = peers.by_name(*peers.dustbin_peers(**SETTINGS))[name]
    cost_BNM.requires_grad_()
    found, truth = peer.solve(cost_BNM, cols_B), sinkhorn_reference(cost_BNM, cols_B=cols_B, **SETTINGS).plan_BNM
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(plan, cost_BNM, grad_BNM)[0] for plan in (found, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_matching_gives_the_losses_of_match_segments(name, plan_gradient):
    generator = torch.Generator().manual_seed(5)
    ends = torch.rand(2, 5, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    direction = torch.nn.functional.normalize(ends[:, :, 1] - ends[:, :, 0], dim=-1)
    segments = (ends.mean(2), direction, torch.rand(2, 5, generator=generator, dtype=torch.float64))
    gt_BM23 = torch.rand(2, 4, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    segments, count_B = [x.requires_grad_() for x in segments], torch.tensor([4, 2])
    solve = peers.by_name(*peers.matching_peers(**MATCHING))[name].solve
    found = solve(*segments, gt_BM23, count_B, plan_gradient=plan_gradient)
    truth = match_segments_reference(*segments, gt_BM23, count_B, plan_gradient=plan_gradient, **MATCHING)[:3]
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(x[0].sum() + x[1].sum(), segments) for x in (found, truth)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


# POT's docstrings, where it was installed without being compiled
@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")
@pytest.mark.parametrize("peer", peers.balanced_peers(), ids=lambda peer: peer.name)
def test_libraries_give_the_plan_of_a_balanced_problem(peer):
    if peer.version() is None:
        pytest.skip(f"{peer.package} is not installed")
    x_BN3, y_BM3 = torch.rand(2, 2, 8, 3, generator=torch.Generator().manual_seed(7))
    cost_BNM = (x_BN3[:, :, None] - y_BM3[:, None]).square().sum(3)
    truth = sinkhorn(cost_BNM.double(), eps=0.1, iterations=500, impl="eager").plan_BNM
    found = peer.solve(x_BN3, y_BM3, cost_BNM, 0.1, 500)
    assert float((found.double() - truth).abs().max() / truth.max()) < 1e-2


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["einsum", "sdpa, grouped", "sdpa, expanded"])
def test_attention_peers_normalise_and_mask_as_ours(name, ragged):
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((4, 5), (2, 7), (2, 7)))
    log_scale_H, count_B = torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.tensor([7, 3]) if ragged else None
    mask_BS = None if count_B is None else torch.arange(7) < count_B[:, None]
    solve = peers.by_name(*peers.attention_peers())[name].solve
    truth = peers.gqa_attention_reference(q.double(), k.double(), v.double(), log_scale_H.double(), key_count_B=count_B)
    torch.testing.assert_close(solve(q, k, v, log_scale_H, count_B, mask_BS).double(), truth, rtol=1e-4, atol=1e-5)


def test_a_compiled_peer_is_named_and_compiled_only_when_called():
    peer = peers.Peer(name="plain", solve=lambda x: x + 1)
    compiled = peers.with_compile(peer, backend="eager")
    assert (compiled.name, compiled.compiled) == ("plain, torch.compile", True)
    assert compiled.solve(torch.ones(2)).tolist() == [2.0, 2.0]
    assert peers.with_graph(peer).name == "plain, CUDA graph"
