"""The rows of a training stage: read, validated, split without leakage, counted, and stacked into tensors.

    stage = load_stage_data("hf://org/name:train", dev_uris=all_uris_of_the_run, bad_samples=Path("bad_samples.txt"))
    stage.train.rows      SceneBatch on the CPU, in file order      stage.train.order_ids, .digest
    stage.dev.scenes      the dev scenes, in metres                 stage.dev.rows, .order_ids, .digest
    print(stage.describe())

One call per stage; a StageData depends on its arguments only, so stages that share a URI may share it. Dev is the
end of each set as published. Training leaves out every scene that is in the dev part of any set of the run (the two
published sets are not cut at the same scene), and those that bad_samples.txt names.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch

from perceiver.scene import RowError, Scene, SceneBatch, doubts_about, stack_scenes
from train.decoding import decode
from train.progress import progress_bar
from train.resident import Columns, Facts, keep_rows, to_device
from train.sources import Rows, SourceError, SourceUri, digest_sources, open_rows

_log = logging.getLogger(__name__)
# scenes that are held as objects at a time while a set is stacked
_CHUNK = 256
# undecodable rows that are named one by one
_NAMED = 10
# the code between the bytes of a source and stacked rows
_CODE = (
    "kernels.philox",
    "kernels.philox_tile",
    "kernels.philox_triton",
    "kernels.dispatch",
    "kernels.registration",
    "kernels.gather",
    "perceiver.scene",
    "train.sources",
    "train.data",
    "train.resident",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSet:
    """Rows of one part of a source: stacked, with their identifiers and their digest.

    `rows`, `order_ids` and, for a dev part, `scenes` are in the same order; a train part keeps no scenes. `doubts`
    counts rows by what is doubtful about them, see `doubts_about`.
    """

    uri: SourceUri
    rows: SceneBatch
    order_ids: tuple[str, ...]
    digest: str
    scenes: tuple[Scene, ...] = ()
    doubts: Mapping[str, int] = field(default_factory=dict)
    _moved: dict[torch.device, SceneBatch] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.order_ids)

    def on(self, device: torch.device, *, progress: bool = False) -> SceneBatch:
        """Return the rows on a device: moved there with the first call, and held there as long as this set is."""
        if device not in self._moved:
            self._moved[device] = to_device(self.rows, device, title=f"{self.uri}: to {device}", progress=progress)
        return self._moved[device]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows of a set: rows = trained_on + dev + dropped_bad + dropped_leak + undecodable."""

    rows: int
    trained_on: int
    dev: int
    dropped_bad: int
    dropped_leak: int
    undecodable: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StageData:
    """What a stage trains on, what it is measured on, and what became of each row; `uri` has no part."""

    uri: SourceUri
    train: RowSet
    dev: RowSet
    counts: Counts

    def describe(self) -> str:
        """One line with every count, and what is doubtful about rows."""
        c, used = self.counts, len(self.train) + len(self.dev)
        doubts = Counter(self.train.doubts) + Counter(self.dev.doubts)
        return (
            f"{self.uri}: {c.rows:,} rows = {c.trained_on:,} trained on + {c.dev:,} dev"
            f" + {c.dropped_bad:,} bad samples + {c.dropped_leak:,} in a dev part of this run"
            f" + {c.undecodable:,} undecodable"
            + "".join(f"; {count:,} of {used:,} have {doubt}" for doubt, count in sorted(doubts.items()))
        )


def load_stage_data(
    uri: str | SourceUri,
    *,
    dev_uris: Sequence[str | SourceUri] = (),
    bad_samples: Path | None = None,
    strict: bool = False,
    published_split: bool = False,
    progress: bool = False,
) -> StageData:
    """Load what one stage trains on and is measured on.

    Args:
        uri: the stage's set; without a part, or with #train.
        dev_uris: the sets of the whole run; no scene of any of their dev parts is trained on. `uri` is always one.
        bad_samples: file of order_ids to leave out of training; the dev part stays as published.
        strict: raise at the first undecodable row instead of leaving it out.
        published_split: keep the published recipe's split, which only leaves out the set's own dev rows.
        progress: show bars.
    Returns:
        The train and dev rows in file order. A row that is bad and in a dev part counts as bad.
    Raises:
        SourceError: see `open_rows`; the URI names another part; nothing is left to train on or to measure on.
        RowError: strict and a row is undecodable; or rows differ in their number of points.
    Determinism: depends on the arguments and the data only.
    """
    source = open_rows(_stage_uri(uri))
    numbers, dropped_bad, dropped_leak = _chosen(source, dev_uris, bad_samples, published_split)
    dev = _load_dev(source, strict=strict, progress=progress)
    train = _load_train(source, numbers, strict=strict, progress=progress)
    if train.rows.xyz_BT3.shape[1] != dev.rows.xyz_BT3.shape[1]:
        raise SourceError(f"{source.uri}: its train and dev parts differ in their number of points")
    counts = Counts(
        rows=len(source),
        trained_on=len(train),
        dev=len(dev),
        dropped_bad=dropped_bad,
        dropped_leak=dropped_leak,
        undecodable=len(source) - dropped_bad - dropped_leak - len(train) - len(dev),
    )
    return StageData(uri=source.uri.with_part(None), train=train, dev=dev, counts=counts)


def count_train_rows(
    uri: str | SourceUri,
    *,
    dev_uris: Sequence[str | SourceUri] = (),
    bad_samples: Path | None = None,
    published_split: bool = False,
) -> int:
    """Return how many rows `load_stage_data` would train on if it could decode all of them; decodes none.

    Raises:
        SourceError: see `open_rows`; the URI names another part.
    """
    return len(_chosen(open_rows(_stage_uri(uri)), dev_uris, bad_samples, published_split)[0])


def load_scenes(uri: str | SourceUri, *, truth: bool = True, strict: bool = False) -> list[Scene]:
    """Load the scenes of a source, or of the part its URI names, in file order.

    Args:
        uri: the source; without a part all rows are meant.
        truth: whether ground truth must be there. If False, rows without any are accepted too, and it is no error
            if none is usable.
        strict: raise at the first undecodable row instead of leaving it out with a warning.
    Raises:
        SourceError: see `open_rows`; or no row is usable for its truth.
        RowError: strict and a row is undecodable.
    """
    uri = SourceUri.parse(uri)
    source = open_rows(uri)
    failed: list[RowError] = []
    scenes = list(_decode(source, source.span(uri.part), failed, truth=truth, strict=strict))
    _complain(uri, failed, then="left out" if truth else "without a scene")
    for doubt, count in _count_doubts(scenes).items():
        _log.warning("%s: %d of %d rows have %s", uri, count, len(scenes), doubt)
    if truth and not scenes:
        raise SourceError(f"{uri}: has no usable rows")
    return scenes


def load_order_ids(uri: str | SourceUri) -> list[str]:
    """Return the order_id of every row that `load_scenes` would read, decodable or not: what must be answered.

    Raises:
        SourceError: see `open_rows`.
    """
    uri = SourceUri.parse(uri)
    source = open_rows(uri)
    return [source.order_ids[i] for i in source.span(uri.part)]


def read_bad_samples(path: Path) -> frozenset[str]:
    """Read order_ids, one a line; `#` starts a comment, blank lines are skipped, the last newline may be missing.

    Raises:
        SourceError: there is no such file, or a line holds more than one word.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the list of bad samples {path} ({error})") from error
    order_ids = set()
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise SourceError(f"{path} line {number}: must hold one order_id, got {line!r}")
        order_ids.update(words)
    return frozenset(order_ids)


def digest_scenes(scenes: Iterable[Scene]) -> str:
    """Return the SHA-256 of rows in their order, equal wherever the rows came from.

    Hashed are, per row, the line `row <bytes of order_id>`, the order_id, and for each field that is there, in the
    order of `Scene`: the line `<name> <dtype> <shape>` and its values, row-major and little endian.
    """
    digest = hashlib.sha256()
    for scene in scenes:
        _add_to_digest(digest, scene)
    return digest.hexdigest()


def _stage_uri(uri: str | SourceUri) -> SourceUri:
    uri = SourceUri.parse(uri)
    if uri.part not in (None, "train"):
        raise SourceError(
            f"{uri}: a stage trains on a set's train part and holds out its dev part; leave out #{uri.part}"
        )
    return uri


def _chosen(
    source: Rows, dev_uris: Sequence[str | SourceUri], bad_samples: Path | None, published_split: bool
) -> tuple[list[int], int, int]:
    """The numbers of the rows to train on; how many are left out as bad, and for being in a dev part."""
    bad = read_bad_samples(bad_samples) if bad_samples else frozenset()
    held_out = frozenset() if published_split else _dev_order_ids(source, dev_uris)
    numbers, dropped_bad, dropped_leak = [], 0, 0
    for i in source.span("train"):
        if source.order_ids[i] in bad:
            dropped_bad += 1
        elif source.order_ids[i] in held_out:
            dropped_leak += 1
        else:
            numbers.append(i)
    return numbers, dropped_bad, dropped_leak


def _dev_order_ids(source: Rows, dev_uris: Sequence[str | SourceUri]) -> frozenset[str]:
    others = dict.fromkeys(SourceUri.parse(uri).with_part(None) for uri in dev_uris)
    others.pop(source.uri.with_part(None), None)
    sources = [source, *map(open_rows, others)]
    return frozenset(rows.order_ids[i] for rows in sources for i in rows.span("dev"))


def _decode(
    source: Rows,
    numbers: Sequence[int],
    failed: list[RowError],
    *,
    truth: bool = True,
    strict: bool,
    progress: bool = False,
) -> Iterator[Scene]:
    """The usable ones of some rows in their order; the others are added to `failed`, or the first of them raises."""
    outcomes = decode((source.task(i, truth) for i in numbers), len(numbers))
    for outcome in progress_bar(outcomes, title=str(source.uri), total=len(numbers), unit="row", show=progress):
        if not isinstance(outcome, RowError):
            yield outcome
        elif strict:
            raise outcome
        else:
            failed.append(outcome)


def _complain(uri: SourceUri, failed: Sequence[RowError], then: str = "left out") -> None:
    for error in failed[:_NAMED]:
        _log.warning("%s: %s; the row is %s", uri.with_part(None), error, then)
    if len(failed) > _NAMED:
        _log.warning("%s: %d rows are undecodable and %s", uri.with_part(None), len(failed), then)


def _load_dev(source: Rows, *, strict: bool, progress: bool) -> RowSet:
    failed: list[RowError] = []
    scenes = tuple(_decode(source, source.span("dev"), failed, strict=strict, progress=progress))
    _complain(source.uri, failed)
    if not scenes:
        raise SourceError(f"{source.uri}: its dev part has no usable rows")
    return RowSet(
        uri=source.uri.with_part("dev"),
        rows=stack_scenes(scenes),
        order_ids=tuple(scene.order_id for scene in scenes),
        digest=digest_scenes(scenes),
        scenes=scenes,
        doubts=_count_doubts(scenes),
    )


def _load_train(source: Rows, numbers: Sequence[int], *, strict: bool, progress: bool) -> RowSet:
    """Take rows from the cache, or decode and stack them chunk by chunk."""
    uri = source.uri.with_part("train")

    def fill(columns: Columns) -> Facts:
        digest, order_ids, points, doubts = hashlib.sha256(), [], 0, Counter()
        failed: list[RowError] = []
        scenes = _decode(source, numbers, failed, strict=strict, progress=progress)
        for chunk in iter(lambda: list(islice(scenes, _CHUNK)), []):
            points = points or len(chunk[0].mask)
            for scene in chunk:
                _check_points(scene, points)
                _add_to_digest(digest, scene)
            doubts += _count_doubts(chunk)
            columns.append(stack_scenes(chunk))
            order_ids += [scene.order_id for scene in chunk]
        if not order_ids:
            _complain(uri, failed)
            raise SourceError(f"{source.uri}: its train part has no usable rows")
        undecodable = [(error.order_id, error.field, error.reason) for error in failed]
        facts = {"order_ids": order_ids, "digest": digest.hexdigest(), "undecodable": undecodable}
        return facts | {"doubts": dict(doubts)}

    chosen = "\n".join(f"{i} {source.order_ids[i]}" for i in numbers)
    depends_on = "\n".join([str(uri), digest_sources(*_CODE), source.made_of(), chosen])
    rows, facts = keep_rows(str(uri), depends_on, len(numbers), fill, progress=progress)
    failed = [RowError(*error) for error in facts["undecodable"]]
    if failed and strict:
        raise failed[0]
    _complain(uri, failed)
    known = {"digest": facts["digest"], "doubts": facts["doubts"]}
    return RowSet(uri=uri, rows=rows, order_ids=tuple(facts["order_ids"]), **known)


def _count_doubts(scenes: Iterable[Scene]) -> Counter[str]:
    return Counter(doubt for scene in scenes for doubt in doubts_about(scene))


def _check_points(scene: Scene, points: int) -> None:
    if len(scene.mask) != points:
        raise RowError(scene.order_id, "mask", f"must have {points} points as the rows before, has {len(scene.mask)}")


def _add_to_digest(digest, scene: Scene) -> None:
    order_id = scene.order_id.encode()
    digest.update(b"row %d\n" % len(order_id) + order_id)
    for column in fields(scene):
        value = getattr(scene, column.name)
        if column.name != "order_id" and value is not None:
            digest.update(f"{column.name} {value.dtype.str} {list(value.shape)}\n".encode())
            digest.update(value.tobytes())
