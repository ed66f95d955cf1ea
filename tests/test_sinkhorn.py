"""The contract of `kernels.sinkhorn`, in its eager and in its Triton form."""

import functools
import itertools
import math
import re

import pytest
import torch

from bench.peers import POT_ALONE
from kernels.sinkhorn import sinkhorn, sinkhorn_forward, sinkhorn_reference
from tests.accuracy import assert_accurate
from tests.sinkhorn_problems import KINDS, cast, differentiate, problem, truth_and_eager

SETTINGS = {"eps": 0.4, "iterations": 3}
IMPLS = ("eager", "triton")


def _solve(arguments, impl, device, **options):
    return sinkhorn(**cast(arguments, torch.float32, device), **SETTINGS, impl=impl, **options)


def _gradcheck(solver, kind):
    arguments = cast(problem(kind, B=2, N=3, M=4), torch.float64)
    names = [name for name, value in arguments.items() if torch.is_tensor(value) and value.requires_grad]
    rest = {name: value for name, value in arguments.items() if name not in names}

    def solve(*leaves):
        return tuple(solver(**dict(zip(names, leaves, strict=True)), **rest, eps=0.7, iterations=3))

    # a weight of -inf has no finite difference
    leaves = [arguments[name].detach().clamp(min=-3).requires_grad_() for name in names]
    torch.autograd.gradcheck(solve, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_passes_gradcheck(kind):
    _gradcheck(sinkhorn_reference, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["log", "scaling"])
def test_eager_reverse_pass_passes_gradcheck(path, kind):
    """Exact gradients of the iterations that were run, on either path."""
    _gradcheck(functools.partial(sinkhorn, impl="eager", _path=path), kind)


def _floor(name: str, eps: float) -> float:
    """Return 1e-6 max|G| / eps for costs, whose true gradients cancel between iterations; G is below 4 here."""
    return 4e-6 / eps if name in ("d cost_BNM", "d dustbin") else 0.0


def _accuracy_cases():
    for impl, path, kind in itertools.product(IMPLS, ["log", "scaling"], KINDS):
        yield impl, path, kind, torch.float32
    for impl, path, dtype in itertools.product(IMPLS, ["log", "scaling"], [torch.bfloat16, torch.float16]):
        yield impl, path, "full", dtype


@pytest.mark.parametrize(("impl", "path", "kind", "dtype"), list(_accuracy_cases()), ids=str)
def test_values_and_gradients_are_as_accurate_as_eager_float32(impl, path, kind, dtype, device):
    arguments = cast(problem(kind), dtype)
    truth, eager = truth_and_eager(arguments, **SETTINGS)
    actual = differentiate(sinkhorn, cast(arguments, dtype, device), **SETTINGS, impl=impl, _path=path)
    for name, value in actual.items():
        floor = _floor(name, SETTINGS["eps"])
        assert_accurate(value, truth=truth[name], eager=eager[name], floor=floor, name=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(40, 64), (64, 33)], ids=str)
def test_a_whole_tile_at_the_setting_of_training_is_as_accurate(shape, impl, device):
    N, M = shape
    arguments = problem("full", B=1, N=N, M=M, scale=5.0)
    settings = {"eps": 0.1, "iterations": 20 if impl == "eager" else 6}
    truth, eager = truth_and_eager(arguments, **settings)
    actual = differentiate(sinkhorn, cast(arguments, torch.float32, device), **settings, impl=impl)
    for name, value in actual.items():
        floor = _floor(name, settings["eps"])
        assert_accurate(value, truth=truth[name], eager=eager[name], floor=floor, name=name)


@pytest.mark.parametrize("kind", ["full", "minimal"])
@pytest.mark.parametrize("path", ["log", "scaling"])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_true_column_holds_mass_one_between_rows_and_dustbin(impl, path, kind, device):
    arguments = problem(kind)
    plan, _, col_slack = _solve(arguments, impl, device, _path=path)
    held = plan.sum(1) + col_slack
    real = torch.arange(held.shape[1]) < arguments["cols_B"][:, None]
    assert torch.allclose(held.cpu(), real.float(), atol=2e-6)


@pytest.mark.parametrize("kind", ["full", "minimal"])
def test_every_true_row_holds_mass_one_once_converged(kind):
    arguments = problem(kind)
    plan, row_slack, _ = sinkhorn(**arguments, eps=0.4, iterations=2000)
    real = torch.arange(plan.shape[1]) < arguments["rows_B"][:, None]
    assert torch.allclose(plan.sum(2) + row_slack, real.double(), atol=1e-9)


def test_minimal_slack_matches_all_of_the_smaller_side():
    _, row_slack, col_slack = sinkhorn(**problem("minimal"), eps=0.4, iterations=2000)
    few_rows = problem("minimal")["rows_B"] <= problem("minimal")["cols_B"]
    assert few_rows.any() and not few_rows.all()
    assert row_slack[few_rows].abs().max() == 0
    assert col_slack[~few_rows].abs().max() == 0


@pytest.mark.parametrize("kind", ["balanced", "weights"])
def test_without_a_dustbin_the_plan_holds_mass_one_and_nothing_is_slack(kind):
    plan, row_slack, col_slack = sinkhorn(**problem(kind), eps=0.4, iterations=5)
    assert torch.allclose(plan.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    assert row_slack.abs().max() == col_slack.abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_rows_and_columns_permutes_the_answer(impl, device):
    arguments = problem("weights_with_dustbin", B=2)
    rows, cols = torch.randperm(9), torch.randperm(13)
    permuted = arguments | {
        "cost_BNM": arguments["cost_BNM"][:, rows][:, :, cols],
        "log_a_BN": arguments["log_a_BN"][:, rows],
        "log_b_BM": arguments["log_b_BM"][:, cols],
    }
    plan, row_slack, col_slack = _solve(arguments, impl, device)
    found = _solve(permuted, impl, device)
    for actual, expected in zip(
        found, (plan[:, rows][:, :, cols], row_slack[:, rows], col_slack[:, cols]), strict=True
    ):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("impl", "dtype", "eps", "iterations", "atol"),
    [("eager", torch.float64, 0.4, 2000, 1e-9), ("triton", torch.float32, 4.0, 12, 2e-6)],
)
def test_swapping_rows_and_columns_transposes_the_answer_once_converged(impl, dtype, eps, iterations, atol, device):
    arguments = cast(problem("full"), dtype, "cpu" if impl == "eager" else device)
    swapped = arguments | {
        "cost_BNM": arguments["cost_BNM"].transpose(1, 2),
        "rows_B": arguments["cols_B"],
        "cols_B": arguments["rows_B"],
    }
    plan, row_slack, col_slack = sinkhorn(**arguments, eps=eps, iterations=iterations, impl=impl)
    found = sinkhorn(**swapped, eps=eps, iterations=iterations, impl=impl)
    for actual, expected in zip(found, (plan.transpose(1, 2), col_slack, row_slack), strict=True):
        assert torch.allclose(actual, expected, atol=atol)


@pytest.mark.parametrize("path", ["log", "scaling"])
@pytest.mark.parametrize("impl", IMPLS)
def test_scaling_cost_eps_and_dustbin_together_changes_no_bit(impl, path, device):
    arguments = problem("full", B=2)
    scaled = arguments | {"cost_BNM": 4 * arguments["cost_BNM"], "dustbin": 4 * arguments["dustbin"]}
    before = sinkhorn(**cast(arguments, torch.float32, device), eps=0.4, iterations=3, impl=impl, _path=path)
    after = sinkhorn(**cast(scaled, torch.float32, device), eps=1.6, iterations=3, impl=impl, _path=path)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_in_the_padding_leaks(impl, kind, device):
    arguments = problem(kind)
    rows = arguments["rows_B"] if "rows_B" in arguments else (arguments["log_a_BN"] != -math.inf).sum(1)
    cols = arguments["cols_B"] if "cols_B" in arguments else (arguments["log_b_BM"] != -math.inf).sum(1)
    real = (torch.arange(9) < rows[:, None])[:, :, None] & (torch.arange(13) < cols[:, None])[:, None]
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).repeat(9 * 13).view(3, 9, 13)
    poisoned = arguments | {"cost_BNM": torch.where(real, arguments["cost_BNM"], poison)}
    settings = {"eps": 0.4, "iterations": 3, "impl": impl}
    clean = differentiate(sinkhorn, cast(arguments, torch.float32, device), **settings)
    dirty = differentiate(sinkhorn, cast(poisoned, torch.float32, device), **settings)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert dirty["d cost_BNM"].cpu()[~real].abs().max() == 0
    assert dirty["plan_BNM"].cpu()[~real].abs().max() == 0


@pytest.mark.parametrize("kind", ["full", "minimal", "balanced"])
@pytest.mark.parametrize("impl", IMPLS)
def test_empty_items_have_no_plan_and_no_gradient(impl, kind, device):
    arguments = problem(kind, B=4) | {"rows_B": torch.tensor([0, 9, 0, 9]), "cols_B": torch.tensor([13, 0, 0, 13])}
    found = differentiate(sinkhorn, cast(arguments, torch.float32, device), eps=0.4, iterations=3, impl=impl)
    assert all(value.isfinite().all() for value in found.values())
    assert found["plan_BNM"][:3].abs().max() == found["d cost_BNM"][:3].abs().max() == 0
    assert found["plan_BNM"][3].max() > 0
    bin_is_all = 0.0 if kind == "balanced" else 1.0
    assert torch.allclose(found["col_slack_BM"][0].cpu(), torch.full((13,), bin_is_all), atol=1e-6)
    assert torch.allclose(found["row_slack_BN"][1].cpu(), torch.full((9,), bin_is_all), atol=1e-6)
    assert found["row_slack_BN"][2].abs().max() == found["col_slack_BM"][2].abs().max() == 0


@pytest.mark.parametrize("shape", [(0, 9, 13), (2, 0, 13), (2, 9, 0), (2, 0, 0), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_size_may_be_zero_or_one(impl, shape, device):
    cost = torch.rand(shape, device=device, requires_grad=True)
    transport = sinkhorn(cost, eps=0.4, iterations=2, dustbin=0.3, impl=impl)
    (grad,) = torch.autograd.grad(sum(output.sum() for output in transport), cost)
    assert [tuple(output.shape) for output in transport] == [shape, shape[:2], (shape[0], shape[2])]
    assert grad.shape == shape and grad.isfinite().all()


@pytest.mark.parametrize(("impl", "shape"), [("eager", (2048, 2048)), ("eager", (3, 2048)), ("triton", (2, 2048))])
def test_sides_may_be_as_long_as_the_limit(impl, shape, device):
    arguments = cast(problem("full", B=1, N=shape[0], M=shape[1]), torch.float32, device)
    settings = {"eps": 0.4, "iterations": 1}
    truth, eager = truth_and_eager(arguments, **settings)
    for name, value in differentiate(sinkhorn, arguments, **settings, impl=impl).items():
        floor = _floor(name, settings["eps"])
        assert_accurate(value, truth=truth[name], eager=eager[name], floor=floor, name=name)


@pytest.mark.parametrize("kind", ["full", "minimal", "balanced"])
@pytest.mark.parametrize("impl", IMPLS)
def test_costs_of_ten_thousand_eps_stay_finite(impl, kind, device):
    arguments = problem(kind, B=2, scale=4000.0)
    found = differentiate(sinkhorn, cast(arguments, torch.float32, device), eps=0.4, iterations=3, impl=impl)
    assert all(value.isfinite().all() for value in found.values())
    assert found["plan_BNM"].sum() > 0.1


@pytest.mark.parametrize("kind", ["full", "balanced"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_among_the_costs_stays_in_its_item(impl, kind, device):
    arguments = problem(kind)
    clean = differentiate(sinkhorn, cast(arguments, torch.float32, device), eps=0.4, iterations=3, impl=impl)
    arguments["cost_BNM"][1, 0, 0] = math.nan
    found = differentiate(sinkhorn, cast(arguments, torch.float32, device), eps=0.4, iterations=3, impl=impl)
    real = {"plan_BNM": (5, 8), "row_slack_BN": (5,), "col_slack_BM": (8,), "d cost_BNM": (5, 8)}
    for name, sizes in real.items():
        assert all(torch.equal(found[name][item], clean[name][item]) for item in (0, 2))
        assert found[name][1][tuple(map(slice, sizes))].isnan().all()
    # a sum over items
    assert "d dustbin" not in found or found["d dustbin"].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_each_item_takes_the_path_its_own_values_allow(impl, device):
    """Far cheaper than the dustbin, or a tiny weight: logarithms. Far more expensive: still the scaling path."""
    cost = torch.rand(4, 6, 6, device=device)
    cost[1, 2, 2] = -100.0
    cost[2] += 1e4
    settings = (1.0, 2, "full", "auto", impl)
    full = sinkhorn_forward(cost, None, None, cost.new_tensor(0.3), None, None, *settings)
    assert full[4].tolist() == [True, False, True, True]
    weights = torch.zeros(4, 6, device=device).log_softmax(1)
    weights[3, 0] = -20.0
    weighted = sinkhorn_forward(cost.abs(), None, None, cost.new_tensor(0.3), weights, None, *settings)
    assert weighted[4].tolist() == [True, True, True, False]
    # rows and columns 0 to 4 can hardly part with column 5 and row 5, which demand mass
    balanced = torch.zeros(2, 6, 6, device=device)
    balanced[1, :5, 5] = balanced[1, 5, :5] = 200.0
    balanced[1, 0, 0] = 300.0
    assert sinkhorn_forward(balanced, None, None, None, None, None, *settings)[4][0]


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_out_of_range_are_clamped_where_values_cannot_be_read(impl, device):
    cost = torch.rand(2, 5, 6, device=device)
    dustbin = cost.new_tensor(0.3)
    rows, cols = torch.tensor([-3, 99], device=device), torch.tensor([4, 2**31 + 5], device=device)
    settings = (dustbin, None, None, 0.4, 2, "full", "auto", impl)
    wild = sinkhorn_forward(cost, rows, cols, *settings)
    tame = sinkhorn_forward(cost, rows.clamp(0, 5), cols.clamp(0, 6), *settings)
    assert all(torch.equal(a, b) for a, b in zip(wild, tame, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_each_output_may_be_differentiated_alone(impl, device):
    arguments = problem("full", B=2)
    for output in range(3):
        truth = torch.autograd.grad(
            sinkhorn_reference(**(truth_arguments := cast(arguments, torch.float64)), **SETTINGS)[output]
            .square()
            .sum(),
            truth_arguments["cost_BNM"],
        )[0]
        actual_arguments = cast(arguments, torch.float32, device)
        actual = torch.autograd.grad(
            sinkhorn(**actual_arguments, **SETTINGS, impl=impl)[output].square().sum(), actual_arguments["cost_BNM"]
        )[0]
        assert torch.allclose(actual.cpu().double(), truth, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_are_registered_correctly(impl, device):
    arguments = cast(problem("full", B=2, N=3, M=4), torch.float32, device)
    cost, rows, cols, dustbin = (arguments[name] for name in ("cost_BNM", "rows_B", "cols_B", "dustbin"))
    inputs = (cost, rows, cols, dustbin, None, None)
    torch.library.opcheck(torch.ops.ridgeline.sinkhorn_forward.default, (*inputs, 0.4, 2, "full", "auto", impl))
    plan, row_slack, col_slack, *saved = (x.detach() for x in sinkhorn_forward(*inputs, 0.4, 2, "full", "auto", impl))
    leaves = (x.detach() if torch.is_tensor(x) else x for x in inputs)
    torch.library.opcheck(
        torch.ops.ridgeline.sinkhorn_backward.default, (plan, row_slack, col_slack, *leaves, *saved, 0.4, "full", impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_compile_takes_it_in_one_graph(impl, device):
    def loss(cost, weights):
        plan, row_slack, _ = sinkhorn(cost, dustbin=0.3, log_a_BN=weights, eps=0.4, iterations=2, impl=impl)
        return (plan * cost).sum() + row_slack.square().sum()

    cost = torch.rand(2, 4, 5, device=device, requires_grad=True)
    weights = torch.rand(2, 4, device=device).log_softmax(1).requires_grad_()
    eager = torch.autograd.grad(loss(cost, weights), (cost, weights))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(cost, weights)
    for actual, expected in zip(torch.autograd.grad(compiled, (cost, weights)), eager, strict=True):
        assert torch.allclose(actual, expected)


def test_a_compiler_may_leave_numbers_and_sizes_open():
    def plan(cost, eps, dustbin):
        return sinkhorn(cost, eps=eps, iterations=3, dustbin=dustbin)[0]

    compiled = torch.compile(plan, fullgraph=True, dynamic=True, backend="aot_eager")
    for eps, dustbin in ((0.1, 0.3), (0.2, 0.4)):
        assert torch.allclose(compiled(torch.ones(2, 3, 4), eps, dustbin), plan(torch.ones(2, 3, 4), eps, dustbin))


def test_torch_export_takes_it():
    class Solver(torch.nn.Module):
        def forward(self, cost):
            return sinkhorn(cost, dustbin=0.3, eps=0.4, iterations=2)

    cost = torch.rand(2, 4, 5)
    exported = torch.export.export(Solver(), (cost,)).module()(cost)
    assert torch.equal(exported[0], sinkhorn(cost, dustbin=0.3, eps=0.4, iterations=2)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_balanced_plans_agree_with_pot_and_geomloss(impl, device, monkeypatch):
    for name, value in POT_ALONE.items():
        monkeypatch.setenv(name, value)
    ot, geomloss_ot = pytest.importorskip("ot"), pytest.importorskip("geomloss.ot")
    cost = 3 * torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = sinkhorn(cost.to(device, torch.float32), eps=2.0, iterations=15, impl=impl).plan_BNM.cpu().double()
    uniform = torch.full((2, 8), 1 / 8, dtype=torch.float64)
    pot = torch.stack(
        [ot.sinkhorn(a, a, C, 2.0, numItermax=5000, stopThr=1e-12) for a, C in zip(uniform, cost, strict=True)]
    )
    assert torch.allclose(plan, pot, atol=1e-5)
    geomloss = geomloss_ot.solve_batch(cost, reg=2.0, a=uniform, b=uniform, max_iter=100).plan
    assert torch.allclose(plan, geomloss, atol=1e-5)


def _refusals():
    cost, counts = torch.rand(2, 3, 4), torch.tensor([3, 2])
    weights_a, weights_b = torch.zeros(2, 3).log_softmax(1), torch.zeros(2, 4).log_softmax(1)
    yield "cost must be [B, N, M], got shape (3, 4)", {"cost_BNM": cost[0]}
    yield "cost must be float32, bfloat16, float16 or float64, got torch.int64", {"cost_BNM": cost.long()}
    yield "cost must have at most 2048 rows and columns, got 3 and 2049", {"cost_BNM": torch.rand(1, 3, 2049)}
    yield "eps must be finite and positive, got 0", {"eps": 0}
    yield "eps must be finite and positive, got -0.1", {"eps": -0.1}
    yield "eps must be finite and positive, got nan", {"eps": math.nan}
    yield "eps must be a number, got a tensor of shape ()", {"eps": torch.tensor(0.1)}
    yield "eps must be a number, got 'a'", {"eps": "a"}
    yield "eps must be a number, got None", {"eps": None}
    yield "eps must be a number, got True", {"eps": True}
    yield "iterations must be an integer of at least 1, got 0", {"iterations": 0}
    yield "iterations must be an integer of at least 1, got 2.0", {"iterations": 2.0}
    yield "iterations must be an integer of at least 1, got True", {"iterations": True}
    yield "dustbin must be a number or a tensor, got True", {"dustbin": True}
    yield "slack must be one of full, minimal, got 'none'", {"slack": "none"}
    yield "slack='minimal' must come with a dustbin and without log_a and log_b", {"slack": "minimal", "dustbin": None}
    yield "slack='minimal' must come with a dustbin and without", {"slack": "minimal", "log_a_BN": weights_a}
    yield "dustbin must be finite, got inf", {"dustbin": math.inf}
    yield "dustbin must be a number or a float tensor of shape []", {"dustbin": torch.rand(2)}
    yield "rows must be int32 or int64 of shape [2] on cpu, got torch.float32", {"rows_B": counts.float()}
    yield "cols must be int32 or int64 of shape [2] on cpu, got torch.int64 of shape (1,)", {"cols_B": counts[:1]}
    yield "of shape [2] on cpu, got torch.int64 of shape (2,) on meta", {"rows_B": counts.to("meta")}
    yield "of shape [] on cpu, got torch.float32 of shape () on meta", {"dustbin": torch.rand((), device="meta")}
    yield "of shape [2, 3] on cpu, got torch.float32 of shape (2, 3) on meta", {"log_a_BN": weights_a.to("meta")}
    yield "rows must lie in [0, 3], got [3, -1]", {"rows_B": torch.tensor([3, -1])}
    yield "cols must lie in [0, 4], got [5, 0]", {"cols_B": torch.tensor([5, 0])}
    yield "log_a must be float of shape [2, 3] on cpu, got torch.float32 of shape (2, 4)", {"log_a_BN": weights_b}
    yield "log_b must be float of shape [2, 4] on cpu, got torch.int64", {"log_b_BM": weights_b.long()}
    yield "rows must be None where log_a is given", {"rows_B": counts, "log_a_BN": weights_a}
    yield "cols must be None where log_b is given", {"cols_B": counts, "log_b_BM": weights_b}
    yield "log_a and log_b must have equal totals without a dustbin", {"log_a_BN": weights_a + 1, "dustbin": None}
    yield "impl must be one of auto, eager, triton, got 'cuda'", {"impl": "cuda"}
    yield "_path must be one of auto, log, scaling, got 'fast'", {"_path": "fast"}
    yield "cost must not be float64 with impl='triton'", {"cost_BNM": cost.double(), "impl": "triton"}


@pytest.mark.parametrize(
    ("message", "arguments"), list(_refusals()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_it_cannot_take_is_refused_by_name(message, arguments, device, monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    legal = {"cost_BNM": torch.rand(2, 3, 4), "eps": 0.1, "iterations": 2, "dustbin": 0.3, "slack": "full"}
    # kernels do not run on a CPU beside a GPU, which would be what is refused
    asked = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in (legal | arguments).items()
    }
    message = message.replace("on cpu", f"on {asked['cost_BNM'].device}")
    with pytest.raises(ValueError, match=re.escape(message)):
        sinkhorn(**asked)
