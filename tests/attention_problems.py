"""What the tests of `gqa_attention` share: its inputs, and a call with all gradients."""

import math

import torch

NAMES = ("o", "dq", "dk", "dv", "dlog_scale")


def problem(B, H, G, T, S, D, dtype=torch.float32, *, tau=8.0, seed=0):
    """Return q, k, v in the layout of a projection, log_scale, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, H), (S, G), (S, G), (T, H))
    q, k, v, do = (torch.randn(B, n, h, D, generator=generator).to(dtype).transpose(1, 2) for n, h in shapes)
    log_scale_H = math.log(tau) - torch.rand(H, generator=generator)
    return [q, k, v, log_scale_H, do]


def run(function, tensors, dtype=None, **options):
    """Return o, dq, dk, dv, dlog_scale, computed in `dtype`."""
    dtype = dtype or tensors[0].dtype
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    *inputs, do = tensors
    inputs = [x.detach().to(scale_dtype if x.dim() == 1 else dtype).requires_grad_() for x in inputs]
    o = function(*inputs, **options)
    return [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))]


def to_device(tensors, device):
    return [x.to(device) for x in tensors]


def counts(*values):
    return {"key_count_B": torch.tensor(values)}


def random_mask(B, S, seed=0):
    """Random, but the last item has no valid key."""
    mask_BS = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask_BS[-1] = False
    return {"key_mask_BS": mask_BS}


def same_bits(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
