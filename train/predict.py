"""Answers for scenes without truth, in the competition's format: `python -m train predict`.

`submission.json` is a list of rows `order_id, wf_vertices, wf_edges, wf_classifications`: metres, pairs of vertex
indices, and a class per edge, always 0, which the score does not read.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from perceiver.model import Perceiver
from perceiver.scene import Scene
from perceiver.wireframe import PostprocessConfig, Wireframe, fallback_wireframe
from train.checkpoint import require_writable, write_atomically
from train.determinism import Machine
from train.evaluate import predict_wireframes

# without which a row is no answer
_KEYS = {"order_id", "wf_vertices", "wf_edges"}


class NothingRead(RuntimeError):
    """No row of a set could be read; it was answered all the same."""


def predict_command(
    model: Perceiver,
    scenes: Sequence[Scene],
    *,
    out: Path,
    machine: Machine,
    batch: int,
    postprocess: PostprocessConfig,
    order_ids: Sequence[str] | None = None,
) -> list[dict]:
    """Predict all scenes and write the submission.

    Args:
        order_ids: every scene that must be answered, in the order of the rows; one that is not among `scenes`
            (its data could not be read) gets the fallback. None: those of `scenes`.
        out: path of the JSON file; replaced as a whole.
    Returns:
        The rows.
    Raises:
        NothingRead: if there are rows to answer and none of them could be read; the submission is written.
        ValueError: if an order_id occurs twice or a scene is not among `order_ids`; see also `predict_wireframes`.
        OSError: if `out` cannot be written.
    """
    check_out(out)
    wanted = [scene.order_id for scene in scenes] if order_ids is None else list(order_ids)
    _check_order_ids(wanted, scenes)
    wireframes = predict_wireframes(model, scenes, machine=machine, batch=batch, postprocess=postprocess)
    answers = {scene.order_id: wireframe for scene, wireframe in zip(scenes, wireframes, strict=True)}
    rows = [submission_row(order_id, answers.get(order_id, fallback_wireframe())) for order_id in wanted]
    write_atomically(out, (json.dumps(rows) + "\n").encode())
    unread, nothing = len(rows) - len(answers), submission_row("", fallback_wireframe())
    empty = sum(row == {**nothing, "order_id": row["order_id"]} for row in rows) - unread
    print(
        f"{len(rows)} answers, {unread} of them the fallback for want of data, {empty} without a predicted edge, "
        f"written to {out}"
    )
    if rows and not scenes:
        raise NothingRead(f"no row could be read: every answer in {out} is the fallback")
    return rows


def check_out(out: Path) -> None:
    """Make the directory of a submission, and refuse a path that cannot be written before the work is done.

    Raises:
        ValueError: its directory cannot be written, or it is a directory or a file with something else in it than a
            submission.
    """
    require_writable(out.parent)
    if out.is_dir():
        raise ValueError(f"{out} is a directory; name a file with --out")
    if out.is_file() and not _is_submission(out.read_bytes()):
        raise ValueError(f"{out} holds something else than answers: name another file with --out")


def submission_row(order_id: str, wireframe: Wireframe) -> dict:
    """Return one row of the submission as plain lists."""
    return {
        "order_id": order_id,
        "wf_vertices": wireframe.vertices_V3.tolist(),
        "wf_edges": wireframe.edges_E2.tolist(),
        "wf_classifications": [0] * len(wireframe.edges_E2),
    }


def _is_submission(content: bytes) -> bool:
    """Whether the bytes of a file are answers, or nothing."""
    try:
        rows = json.loads(content or b"[]")
    except ValueError:
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= _KEYS for row in rows)


def _check_order_ids(wanted: list[str], scenes: Sequence[Scene]) -> None:
    for name, ids in (("order_ids", wanted), ("scenes", [scene.order_id for scene in scenes])):
        seen: set[str] = set()
        for order_id in ids:
            if order_id in seen:
                raise ValueError(f"{name} must name each scene once, got {order_id!r} twice")
            seen.add(order_id)
    unwanted = [scene.order_id for scene in scenes if scene.order_id not in set(wanted)]
    if unwanted:
        raise ValueError(f"order_ids must name every scene, got no {unwanted[0]!r}")
