"""What rows cost on the processor: generating them, reading them from .npz, and gathering a batch of a held set.

Reading and gathering are compared with the rows they started from, bit by bit. The report puts the gathering of a batch
beside the step that it feeds.
"""

import functools

import torch

from perceiver.scene import Scene, SceneBatch, decode_scene, encode_scene, stack_scenes
from train.config import load_recipe
from train.determinism import enter
from train.roofs import generate_scenes

ROWS, HELD_ROWS, BATCH = 64, 1024, 4


@functools.cache
def _scenes(points: int, setting: str = "easy") -> list[Scene]:
    return generate_scenes(ROWS, seed=0, points=points, setting=setting)


def _tensors(batch: SceneBatch, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [x if dtype is None else x.to(dtype) for x in vars(batch).values()]


def _enter(recipe: str) -> None:
    enter(threads=load_recipe(recipe).threads, precision="fp32", impl="eager", device="cpu")


def _measure_generation(measure, points: int, setting: str) -> None:
    _enter("demo")
    generate = functools.partial(generate_scenes, ROWS, seed=0, points=points, setting=setting)
    measure(
        generate,
        check=lambda: _tensors(stack_scenes(generate())),
        group=f"data, generating {ROWS} rows of roofs:{setting}, {points} points",
        truth=_tensors(stack_scenes(_scenes(points, setting)), torch.float64),
        rows=ROWS,
        points=points,
    )


def bench_generate_easy(measure):
    _measure_generation(measure, 2048, "easy")


def bench_generate_real(measure):
    _measure_generation(measure, 2048, "real")


def bench_decode(measure):
    _enter("s23dr")
    rows = [(scene.order_id, encode_scene(scene)) for scene in _scenes(2048)]
    measure(
        lambda: _tensors(stack_scenes([decode_scene(*row) for row in rows])),
        group=f"data, decoding and stacking {ROWS} .npz rows, 2048 points",
        truth=_tensors(stack_scenes(_scenes(2048)), torch.float64),
        rows=ROWS,
        points=2048,
        npz_bytes=sum(len(data) for _, data in rows),
    )


def bench_gather(measure):
    _enter("s23dr")
    source = stack_scenes(_scenes(2048))
    held = source.rows(torch.arange(HELD_ROWS) % ROWS)
    index_B = torch.randint(HELD_ROWS, (BATCH,), generator=torch.Generator().manual_seed(0))
    measure(
        lambda: _tensors(held.rows(index_B)),
        group=f"data, gathering {BATCH} of {HELD_ROWS} rows, 2048 points",
        truth=_tensors(source.rows(index_B % ROWS), torch.float64),
        rows=BATCH,
        points=2048,
        share_of="step, published-fp32",
    )
