"""The accuracy rule of every operator: no more than twice the error of eager PyTorch, against float64."""

import torch


def assert_accurate(
    actual: torch.Tensor, *, truth: torch.Tensor, eager: torch.Tensor, floor: float = 0.0, name: str = "output"
) -> None:
    """Fail unless an output or gradient is about as close to the truth as eager PyTorch is.

        max|actual - truth| <= 2 * max|eager - truth| + 8 * eps(dtype of actual) * max|truth| + floor

    Args:
        actual: what the operator returned, in its output dtype.
        truth: the reference run in float64 on the same inputs.
        eager: the reference run in float32 on the same inputs; rounded here to the dtype of `actual`.
        floor: an allowance in the unit of the output, for quantities whose true values cancel.
        name: what the failure calls it.

    Where the truth is not finite, `actual` must be the same infinity, or NaN.
    """
    if actual.shape != truth.shape or eager.shape != truth.shape:
        shapes = f"{tuple(actual.shape)}, {tuple(truth.shape)}, {tuple(eager.shape)}"
        raise AssertionError(f"{name}: shapes of actual, truth and eager must agree, got {shapes}")
    if truth.dtype != torch.float64:
        raise AssertionError(f"{name}: truth must be float64, got {truth.dtype}")
    actual_64, truth, eager_64 = (t.detach().cpu().double() for t in (actual, truth, eager.to(actual.dtype)))
    finite = truth.isfinite()
    if not torch.equal(actual_64[~finite].nan_to_num(nan=0.25), truth[~finite].nan_to_num(nan=0.25)):
        raise AssertionError(f"{name}: where the truth is inf or NaN it must be the same inf or NaN")
    if not finite.any():
        return
    error = torch.where(finite, (actual_64 - truth).abs(), 0.0).nan_to_num(nan=torch.inf)
    error_eager = torch.where(finite, (eager_64 - truth).abs(), 0.0).max().item()
    size = torch.where(finite, truth.abs(), 0.0).max().item()
    allowed = 2 * error_eager + 8 * torch.finfo(actual.dtype).eps * size + floor
    if error.max().item() <= allowed:
        return
    worst = torch.unravel_index(error.argmax(), error.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{name}: error {error.max().item():.3e} exceeds {allowed:.3e} (eager errs {error_eager:.3e}, max|truth| is "
        f"{size:.3e}, floor {floor:.1e}); worst at {index}: got {actual_64[index].item():.9g}, "
        f"truth {truth[index].item():.9g}, {int((error > allowed).sum())} of {error.numel()} elements are too far off"
    )
