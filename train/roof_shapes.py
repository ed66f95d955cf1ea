"""What a procedural roof is: planar faces in metres, Y up, and the wireframe that follows from them.

A shape only says which faces there are (`RoofBuilder`); edges and their classes follow from how faces meet
(`Roof.from_faces`), so a valley is where two slopes meet in a concave angle and not where somebody wrote "valley".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EAVE, FLASHING, HIP, RAKE, RIDGE, STEP_FLASHING, TRANSITION_LINE, VALLEY = 2, 3, 4, 5, 6, 7, 8, 9
APEX, EAVE_END, FLASHING_END = 0, 1, 2

Point = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Roof:
    """A wireframe with the faces that it came from: loops padded by repeating their first vertex, and triangles.

    `wall_E` tells under which edges a wall stands.
    """

    vertices_V3: np.ndarray
    edges_E2: np.ndarray
    edge_class_E: np.ndarray
    vertex_class_V: np.ndarray
    faces_FK: np.ndarray
    triangles_K3: np.ndarray
    wall_E: np.ndarray

    @classmethod
    def from_faces(cls, vertices: list[Point], loops: list[list[int]], grounded: list[bool], lines: dict) -> "Roof":
        """Find edges and classes from faces.

        Args:
            vertices: metres.
            loops: vertex indices per face, counter-clockwise seen from above.
            grounded: per face, whether walls stand under its free edges.
            lines: (low index, high index) -> edge class, for lines against walls and other surfaces; they need not
                belong to a face.
        """
        vertices_V3 = np.array(vertices)
        width = max(map(len, loops))
        faces_FK = np.array([loop + loop[:1] * (width - len(loop)) for loop in loops])
        next_FK = np.roll(faces_FK, -1, axis=1)
        normals_F3 = _newell(vertices_V3[faces_FK], vertices_V3[next_FK])

        real = faces_FK != next_FK
        start, end, face = faces_FK[real], next_FK[real], np.nonzero(real)[0]
        key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
        order = np.argsort(key, kind="stable")
        key, start, end, face = key[order], start[order], end[order], face[order]
        first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        twin = np.append(first[1:], len(key)) - 1

        along_E3 = vertices_V3[end[first]] - vertices_V3[start[first]]
        inward_E3 = cross(normals_F3[face[first]], along_E3)
        twin_inward_E3 = -cross(normals_F3[face[twin]], along_E3)
        convex = (normals_F3[face[first]] * twin_inward_E3).sum(1) < 0
        level = np.abs(along_E3[:, 1]) < 1e-6
        rises, twin_rises = inward_E3[:, 1] > 0, twin_inward_E3[:, 1] > 0
        free = first == twin
        free_class = np.where(level, np.where(rises, EAVE, RIDGE), RAKE)
        level_class = np.where(rises == twin_rises, np.where(convex, RIDGE, VALLEY), TRANSITION_LINE)
        shared_class = np.where(level, level_class, np.where(convex, HIP, VALLEY))
        edge_class = dict(zip(key[first].tolist(), np.where(free, free_class, shared_class).tolist(), strict=True))
        walled = dict(zip(key[first].tolist(), (free & np.array(grounded)[face[first]]).tolist(), strict=True))
        edge_class |= {low * len(vertices) + high: value for (low, high), value in lines.items()}

        keys = np.array(sorted(edge_class))
        edges_E2 = np.stack([keys // len(vertices), keys % len(vertices)], axis=1)
        edge_class_E = np.array([edge_class[k] for k in keys.tolist()])
        stands_E = (edge_class_E == EAVE) | (edge_class_E == RAKE)
        wall_E = stands_E & np.array([walled.get(k, False) for k in keys.tolist()])
        return cls(
            vertices_V3=vertices_V3,
            edges_E2=edges_E2,
            edge_class_E=edge_class_E,
            vertex_class_V=_vertex_classes(vertices_V3, edges_E2, edge_class_E),
            faces_FK=faces_FK,
            triangles_K3=np.array([triangle for loop in loops for triangle in _triangulate(vertices, loop)]),
            wall_E=wall_E,
        )


def cross(a_N3: np.ndarray, b_N3: np.ndarray) -> np.ndarray:
    """Cross products row by row."""
    ax, ay, az = a_N3.T
    bx, by, bz = b_N3.T
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=1)


def _newell(from_FK3: np.ndarray, to_FK3: np.ndarray) -> np.ndarray:
    minus, plus = from_FK3 - to_FK3, from_FK3 + to_FK3
    return (minus[..., [1, 2, 0]] * plus[..., [2, 0, 1]]).sum(1)


def _turn(a: Point, b: Point, c: Point) -> float:
    """Twice the signed plan area of a triangle, positive if counter-clockwise seen from above."""
    return (b[2] - a[2]) * (c[0] - a[0]) - (b[0] - a[0]) * (c[2] - a[2])


def _is_ear(vertices: list[Point], loop: list[int], at: int) -> bool:
    corner = loop[at - 1], loop[at], loop[(at + 1) % len(loop)]
    a, b, c = (vertices[i] for i in corner)
    if _turn(a, b, c) <= 0:
        return False
    others = (vertices[i] for i in loop if i not in corner)
    return not any(_turn(a, b, p) >= 0 and _turn(b, c, p) >= 0 and _turn(c, a, p) >= 0 for p in others)


def _triangulate(vertices: list[Point], loop: list[int]) -> list[tuple[int, ...]]:
    """Cut off ears: corners that turn left and have no other corner of the loop inside."""
    triangles, rest = [], list(loop)
    while len(rest) > 3:
        at = next((i for i in range(len(rest)) if _is_ear(vertices, rest, i)), 0)
        triangles.append((rest[at - 1], rest[at], rest[(at + 1) % len(rest)]))
        del rest[at]
    return [*triangles, tuple(rest)]


def _vertex_classes(vertices_V3: np.ndarray, edges_E2: np.ndarray, edge_class_E: np.ndarray) -> np.ndarray:
    """Flashing end if a flashing ends there, apex if no neighbour is higher, else eave end."""
    a, b = edges_E2.T
    height_V = vertices_V3[:, 1]
    below_V = np.zeros(len(vertices_V3), bool)
    below_V[a[height_V[b] > height_V[a] + 1e-6]] = True
    below_V[b[height_V[a] > height_V[b] + 1e-6]] = True
    class_V = np.where(below_V, EAVE_END, APEX)
    class_V[edges_E2[(edge_class_E == FLASHING) | (edge_class_E == STEP_FLASHING)]] = FLASHING_END
    return class_V


class RoofBuilder:
    """Collects faces and lines; equal points (to 1/1024 m) become one vertex."""

    def __init__(self):
        self.vertices: list[Point] = []
        self.loops: list[list[int]] = []
        self.grounded: list[bool] = []
        self.lines: dict[tuple[int, int], int] = {}
        self._index: dict[tuple[int, int, int], int] = {}

    def vertex(self, point: Point) -> int:
        """The index of a point, a new one if it is not there yet."""
        x, y, z = point
        key = (round(x * 1024), round(y * 1024), round(z * 1024))
        if key not in self._index:
            self._index[key] = len(self.vertices)
            self.vertices.append(point)
        return self._index[key]

    def face(self, points: Sequence[Point], *, grounded: bool = True) -> None:
        """Add a loop of either orientation; repeated points fall together, fewer than three are no face."""
        loop = list(dict.fromkeys(map(self.vertex, points)))
        if len(loop) < 3:
            return
        corners = [self.vertices[i] for i in loop]
        turn = sum(p[2] * q[0] - p[0] * q[2] for p, q in zip(corners, corners[1:] + corners[:1], strict=True))
        self.loops.append(loop if turn > 0 else loop[::-1])
        self.grounded.append(grounded)

    def line(self, a: Point, b: Point, edge_class: int) -> None:
        """Give the line between two points a class, whether it belongs to a face or not."""
        i, j = sorted((self.vertex(a), self.vertex(b)))
        self.lines[i, j] = edge_class

    def roof(self) -> Roof:
        """The roof of all faces and lines."""
        return Roof.from_faces(self.vertices, self.loops, self.grounded, self.lines)
