"""How the tile of one problem lies in the threads of a program, and sums over its rows and columns.

A tile of N rows and M columns has four axes, so that a thread holds a few rows by a few columns: row = n1 * N0 + n0
and column = m1 * M0 + m0, with n1, m1 inside a thread, m0 across the lanes of a warp, n0 across lanes and warps.

    tile [N1, M1, N0, M0],  row vector [N1, 1, N0, 1],  column vector [1, M1, 1, M0],  their bins [1, 1, 1, 1]

These broadcast as they are. `sum_over(x, 0)` sums rows and `sum_over(x, 1)` columns, and both keep all axes; the order
is n1 or m1 inside a thread, then n0 or m0 between threads.

Where products with rows and with columns alternate, a square tile may be held in two more forms, in which a row, or a
column, lies in LANES neighbouring lanes, so that only vectors go from warp to warp:

    by rows [LANES, N, M / LANES / RUN, RUN],  by columns [LANES, M, N / LANES / RUN, RUN],  either vector [1, N, 1, 1]

Element [lane, row, q, r] by rows is column lane * M / LANES + q * RUN + r: what a lane has of a row lies side by side,
so that it reads its part of a vector RUN numbers at a time. With eight warps of LANES by 8 lanes, 64 rows are one for
each group of lanes. `along_rows` lays a vector of one form along the rows of the other, and `sum_along` sums rows: RUN
elements, then the rest inside a lane, then between lanes.

What makes Triton keep two forms: its pass Coalesce gives each load a layout by how its addresses rise; the pass
RemoveLayoutConversions hands these on to all that follows from them, from the last load to the first, and a value keeps
the first that it gets. Both forms begin at a load that never happens, `form_zeros`, and `in_form` lets every value that
must not take the other form's layout meet it first, in a choice by a condition that is never true. Inside a loop the
optimizer knows that, after the layouts are settled, and nothing is left of it. No layout is handed on through a gather:
with one, `row_vector` and `tile_of_rows` end the forms.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LANES = tl.constexpr(4)
RUN = tl.constexpr(4)


@triton.jit
def row_offsets(BLOCK_N: tl.constexpr, N0: tl.constexpr):
    """Return the indices of a tile's rows, a row vector."""
    return tl.arange(0, BLOCK_N // N0)[:, None, None, None] * N0 + tl.arange(0, N0)[None, None, :, None]


@triton.jit
def col_offsets(BLOCK_M: tl.constexpr, M0: tl.constexpr):
    """Return the indices of a tile's columns, a column vector."""
    return tl.arange(0, BLOCK_M // M0)[None, :, None, None] * M0 + tl.arange(0, M0)[None, None, None, :]


@triton.jit
def sum_over(x, AXIS: tl.constexpr):
    """Return the sum over all rows (0) or all columns (1)."""
    return tl.sum(tl.sum(x, AXIS, keep_dims=True), AXIS + 2, keep_dims=True)


@triton.jit
def max_over(x, AXIS: tl.constexpr):
    """Return the maximum over all rows (0) or all columns (1)."""
    return tl.max(tl.max(x, AXIS, keep_dims=True), AXIS + 2, keep_dims=True)


@triton.jit
def sum_rows_of_both(x, y):
    """Return the sums over all rows of a tile and of a row vector, a copy of it in each column, in one reduction."""
    x, y = tl.broadcast(tl.sum(x, 0, keep_dims=True), tl.sum(y, 0, keep_dims=True))
    return tl.reduce((x, y), 2, _add_both, keep_dims=True)


@triton.jit
def _add_both(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def form_zeros(SIZE: tl.constexpr, history):
    """Return the zeros of a form, by a load that never happens: there are iterations.

    Addresses rise along the lanes, and half as far along the rows: in this order the layout takes them. They are no
    multiple of anything, or several elements in a row would be one thread's.
    """
    pointer, _, _, T = history
    lane, row = tl.arange(0, LANES)[:, None, None, None], tl.arange(0, SIZE)[None, :, None, None]
    rest = tl.arange(0, SIZE // (LANES * RUN))[None, None, :, None] + tl.arange(0, RUN)[None, None, None, :]
    return tl.load(pointer + T + lane + row % (LANES // 2) + rest * 0, T + lane + row + rest < 0, 0.0)


@triton.jit
def in_form(x, zeros, count):
    """Return x, broadcast to a form, in the layout of `form_zeros`; the count is not below 0.

    Of a loop's count the optimizer knows that. Of others it does not: a choice per element stays, outside of loops.
    """
    return tl.where(count < 0, zeros, x)


@triton.jit
def by_rows(x):
    """Return a tile in the form in which sums over columns stay in a few lanes."""
    N: tl.constexpr = x.shape[0] * x.shape[2]
    M: tl.constexpr = x.shape[1] * x.shape[3]
    return tl.permute(tl.reshape(tl.permute(x, (0, 2, 1, 3)), (N, LANES, M // (LANES * RUN), RUN)), (1, 0, 2, 3))


@triton.jit
def by_cols(x):
    """Return a tile in the form in which sums over rows stay in a few lanes."""
    return by_rows(tl.permute(x, (1, 0, 3, 2)))


@triton.jit
def form_vector(x):
    """Return a row or column vector of a tile as one of its forms."""
    return tl.reshape(x, (1, x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3], 1, 1))


@triton.jit
def along_rows(x):
    """Return a vector of one form along the rows of the other: [LANES, 1, N / LANES / RUN, RUN]."""
    return tl.reshape(x, (LANES, 1, x.shape[1] // (LANES * RUN), RUN))


@triton.jit
def sum_along(x):
    """Return the sums of all rows of a form, a vector."""
    return tl.sum(tl.sum(tl.sum(x, 3, keep_dims=True), 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def row_vector(x, N0: tl.constexpr):
    """Return a vector of a form as a row vector of a tile."""
    N: tl.constexpr = x.shape[1]
    x = tl.gather(tl.reshape(x, (N,)), tl.arange(0, N), 0)
    return tl.permute(tl.reshape(x, (1, N // N0, N0, 1)), (1, 0, 2, 3))


@triton.jit
def tile_of_rows(x, N0: tl.constexpr, M0: tl.constexpr):
    """Return what lies by rows as a tile."""
    N: tl.constexpr = x.shape[1]
    M: tl.constexpr = LANES * x.shape[2] * RUN
    x = tl.reshape(tl.permute(x, (1, 0, 2, 3)), (N, M))
    x = tl.gather(x, tl.broadcast_to(tl.arange(0, M)[None, :], (N, M)), 1)
    return tl.permute(tl.reshape(x, (N // N0, N0, M // M0, M0)), (0, 2, 1, 3))


@triton.jit
def store_form_vectors(history, t, u, u_bin, v, v_bin):
    """Store vectors of the forms, and their bins, of which every element is a copy, after t iterations."""
    pointer, N_out, M_out, T = history
    # the first lane of a row stores it; with addresses that rise along the lanes the threads are those of a form
    lane, row = tl.arange(0, LANES)[:, None, None, None], tl.arange(0, u.shape[1])[None, :, None, None]
    at = pointer + t + lane
    first, only = (lane == 0) & (row >= 0), (lane == 0) & (row == 0)
    tl.store(at + row * (T + 1), tl.broadcast_to(u, first.shape), mask=first & (row < N_out))
    tl.store(at + (N_out + row * 0) * (T + 1), tl.broadcast_to(u_bin, first.shape), mask=only)
    at += (N_out + 1) * (T + 1)
    tl.store(at + row * (T + 1), tl.broadcast_to(v, first.shape), mask=first & (row < M_out))
    tl.store(at + (M_out + row * 0) * (T + 1), tl.broadcast_to(v_bin, first.shape), mask=only)


@triton.jit
def store_vectors(history, t, u, u_bin, v, v_bin):
    """Store vectors of a tile, and their bins, after t iterations."""
    pointer, N_out, M_out, T = history
    offs_n, offs_m, bin = _offsets(u, v)
    # every thread of a row holds its u: to say which one stores it spares a change of layout
    lane_n, lane_m = tl.arange(0, u.shape[2])[None, None, :, None], tl.arange(0, v.shape[3])[None, None, None, :]
    row, col = offs_n + lane_m * 0, offs_m + lane_n * 0
    at = pointer + t
    tl.store(at + row * (T + 1), tl.broadcast_to(u, row.shape), mask=(row < N_out) & (lane_m == 0))
    tl.store(at + (N_out + bin) * (T + 1), u_bin)
    at += (N_out + 1) * (T + 1)
    tl.store(at + col * (T + 1), tl.broadcast_to(v, col.shape), mask=(col < M_out) & (lane_n == 0))
    tl.store(at + (M_out + bin) * (T + 1), v_bin)


@triton.jit
def load_form_vectors(history, t, N: tl.constexpr):
    """Return u, u_bin, v, v_bin after t iterations, and v along the rows; the bins are scalars."""
    pointer, N_out, M_out, T = history
    offs = tl.arange(0, N)[None, :, None, None]
    offs_along = along_rows(offs)
    at = pointer + t
    u = tl.load(at + offs * (T + 1), mask=offs < N_out, other=0.0)
    u_bin = tl.load(at + N_out * (T + 1))
    at += (N_out + 1) * (T + 1)
    v = tl.load(at + offs * (T + 1), mask=offs < M_out, other=0.0)
    v_along = tl.load(at + offs_along * (T + 1), mask=offs_along < M_out, other=0.0)
    return u, u_bin, v, tl.load(at + M_out * (T + 1)), v_along


@triton.jit
def load_vectors(history, t, masses):
    """Return u, u_bin, v, v_bin after t iterations."""
    pointer, N_out, M_out, T = history
    row, col, bin = _offsets(masses[0], masses[2])
    at = pointer + t
    u = tl.load(at + row * (T + 1), mask=row < N_out, other=0.0)
    u_bin = tl.load(at + (N_out + bin) * (T + 1))
    at += (N_out + 1) * (T + 1)
    v = tl.load(at + col * (T + 1), mask=col < M_out, other=0.0)
    v_bin = tl.load(at + (M_out + bin) * (T + 1))
    return u, u_bin, v, v_bin


@triton.jit
def _offsets(u, v):
    """Return the indices of the elements of a row vector, of a column vector and of a bin."""
    offs_n = row_offsets(u.shape[0] * u.shape[2], u.shape[2])
    offs_m = col_offsets(v.shape[1] * v.shape[3], v.shape[3])
    return offs_n, offs_m, tl.zeros([1, 1, 1, 1], tl.int32)


@triton.jit
def divide_or_zero(x, y):
    """Return x / y, and 0 where y is 0: there is no mass."""
    return tl.where(y == 0, 0.0, x / y)


@triton.jit
def finite(x):
    """Return x, and 0 where it is -inf."""
    return tl.where(x == -INF, 0.0, x)
