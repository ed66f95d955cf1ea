"""Where rows come from: the URI of a data source, its rows in order, and writers of sets in the same form.

    SOURCE[?key=value&...][#train|dev|all]

    hf://org/name:split      a set of the hub                                          dev=1024
    parquet:DIR              a directory with the hub's parquet files                  dev=1024
    npz:DIR                  a directory with one .npz per row, order_id = file stem   dev=1024
    roofs:easy, roofs:real   generated roofs                       points=512 scenes=4096 seed=0

The last `dev` rows are the dev part, all before them the train part; no part means all rows. Generated roofs end
with 64 dev scenes of seed + 1. Rows are in file order, files sorted by name. A path may hold neither '?' nor '#'.
Only `hf` and `parquet` need the package `datasets`; they use its own cache (`HF_DATASETS_CACHE`).
"""

import contextlib
import hashlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

from perceiver.scene import RowError, Scene, decode_scene, encode_scene

GRAMMAR = (
    "SOURCE[?key=value&...][#train|dev|all], SOURCE one of hf://org/name:split, parquet:DIR, npz:DIR, "
    "roofs:easy, roofs:real; keys: roofs points, scenes, seed; the others dev"
)
PARTS = ("train", "dev", "all")
ROOF_DEV_SCENES = 64
# kind -> (what it must look like, the same for people, its keys)
_KINDS = {
    "hf": (r"hf://([\w.-]+/[\w.-]+:[\w.-]+)", "hf://org/name:split", ("dev",)),
    "parquet": (r"parquet:(.+)", "parquet:DIR", ("dev",)),
    "npz": (r"npz:(.+)", "npz:DIR", ("dev",)),
    "roofs": (r"roofs:(easy|real)", "roofs:easy or roofs:real", ("points", "scenes", "seed")),
}
_SPLITS = frozenset({"train", "validation", "test"})
# what generated rows depend on beside their URI
GENERATOR = ("train.roofs", "train.roof_types", "train.roof_shapes", "train.draws")


class SourceError(ValueError):
    """A data source that cannot be used: says which one, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class SourceUri:
    """The parsed name of a data source; hashable, so that it can be the key of a cache.

    `place` is what follows the kind: `org/name:split`, a directory, `easy` or `real`. `part` is None where the URI
    names none. `points`, `scenes` and `seed` mean something for generated roofs only.
    """

    kind: str
    place: str
    part: str | None = None
    dev: int = 1024
    points: int = 512
    scenes: int = 4096
    seed: int = 0

    @classmethod
    def parse(cls, text: "str | SourceUri") -> "SourceUri":
        """Read a URI; one that is parsed already is returned as it is.

        Raises:
            SourceError: the text does not follow the grammar; the message says where and shows the grammar.
        """
        if isinstance(text, SourceUri):
            return text
        head, hash_sign, part = text.partition("#")
        head, question_mark, query = head.partition("?")
        kind = head.partition(":")[0]
        if kind not in _KINDS:
            raise _grammar_error(text, f"must start with one of {', '.join(_KINDS)}")
        pattern, form, keys = _KINDS[kind]
        match = re.fullmatch(pattern, head)
        if not match:
            raise _grammar_error(text, f"must look like {form}")
        if hash_sign and part not in PARTS:
            raise _grammar_error(text, f"after '#' must come one of {', '.join(PARTS)}")
        values = _parse_query(text, keys, query) if question_mark else {}
        if kind == "roofs":
            values["dev"] = ROOF_DEV_SCENES
        return cls(kind=kind, place=match[1], part=part or None, **values)

    def __str__(self) -> str:
        """The canonical URI: keys that differ from their default, in the grammar's order."""
        default = {field.name: field.default for field in fields(self)}
        given = {key: getattr(self, key) for key in _KINDS[self.kind][2]}
        query = "&".join(f"{key}={value}" for key, value in given.items() if value != default[key])
        colon = "://" if self.kind == "hf" else ":"
        part = f"#{self.part}" if self.part else ""
        return f"{self.kind}{colon}{self.place}{query and '?'}{query}{part}"

    def with_part(self, part: str | None) -> "SourceUri":
        """The same source, another part."""
        return replace(self, part=part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of a source in order, decoded one at a time.

    `task(i, truth)` is what decodes row i, with or without demanding ground truth, and raises RowError if it cannot;
    it can be pickled, so another process may call it. `made_of()` is a text that is another one as soon as the rows
    may be others: of files their paths, sizes and times of change, of generated rows the generator's sources.
    """

    uri: SourceUri
    order_ids: Sequence[str]
    task: Callable[[int, bool], Callable[[], Scene]]
    made_of: Callable[[], str]

    def scene(self, i: int, truth: bool) -> Scene:
        """Decode row i.

        Raises:
            RowError: it cannot be decoded.
        """
        return self.task(i, truth)()

    def __len__(self) -> int:
        return len(self.order_ids)

    def span(self, part: str | None) -> range:
        """The row numbers of a part: `train`, `dev`, or `all`, which None means too.

        Raises:
            SourceError: the source is not larger than its dev part, and not all of it is asked for.
        """
        if part in ("all", None):
            return range(len(self))
        if len(self) <= self.uri.dev:
            # to train on all rows would leave none to score
            or_all = " or take all rows (#all; evaluate wants a --set with it)" if self.uri.part == "dev" else ""
            raise SourceError(
                f"{self.uri}: has {len(self)} row{'s' * (len(self) != 1)}, no more than its dev part of "
                f"{self.uri.dev}; choose a smaller one (?dev=...){or_all}"
            )
        cut = len(self) - self.uri.dev
        return range(cut) if part == "train" else range(cut, len(self))


def open_rows(uri: str | SourceUri) -> Rows:
    """Open a data source; rows are read when they are asked for. The URI's part is left to `Rows.span`.

    Raises:
        SourceError: the source cannot be reached, has no rows or other columns, or a package is missing.
    """
    uri = SourceUri.parse(uri)
    rows = {"hf": _open_hub, "parquet": _open_parquet, "npz": _open_npz, "roofs": _open_roofs}[uri.kind](uri)
    if not len(rows):
        raise SourceError(f"{uri}: has no rows")
    return rows


def digest_sources(*modules: str) -> str:
    """Return the SHA-256 over the source files of modules: what they make may differ once it does."""
    digest = hashlib.sha256()
    for name in modules:
        source = Path(str(importlib.import_module(name).__file__)).read_bytes()
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def write_parquet(scenes: Iterable[Scene], directory: Path | str, *, rows_per_file: int = 1024) -> None:
    """Write rows as parquet files in the hub's schema (order_id: string, data: binary).

    The directory appears whole or not at all.

    Args:
        scenes: any number of rows; taken one file at a time.
        directory: must not exist or be empty.
        rows_per_file: rows of each file but the last.
    Raises:
        SourceError: the directory holds something, or there are no rows.
        ValueError: rows_per_file is not positive.
    """
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file must be at least 1, got {rows_per_file}")
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("order_id", pa.string()), ("data", pa.binary())])
    scenes = iter(scenes)
    with _new_directory(Path(directory)) as target:
        for number, chunk in enumerate(iter(lambda: list(islice(scenes, rows_per_file)), [])):
            columns = {"order_id": [s.order_id for s in chunk], "data": [encode_scene(s) for s in chunk]}
            pyarrow.parquet.write_table(pa.table(columns, schema=schema), target / f"rows-{number:05}.parquet")


def write_npz(scenes: Iterable[Scene], directory: Path | str) -> None:
    """Write each row as `<order_id>.npz`. The directory appears whole or not at all.

    Args:
        scenes: any number of rows; `npz:DIR` gives them back sorted by order_id.
        directory: must not exist or be empty.
    Raises:
        SourceError: the directory holds something, there are no rows, or an order_id is no name for a file.
    """
    with _new_directory(Path(directory)) as target:
        for scene in scenes:
            file = target / f"{scene.order_id}.npz"
            if file.parent != target or file.exists():
                raise SourceError(f"order_id {scene.order_id!r} cannot name a file, or comes twice")
            file.write_bytes(encode_scene(scene))


def _parse_query(text: str, keys: Sequence[str], query: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for item in query.split("&"):
        key, _, value = item.partition("=")
        if key not in keys:
            raise _grammar_error(text, f"unknown key {key!r}, must be one of {', '.join(keys)}")
        if key in values:
            raise _grammar_error(text, f"the key {key!r} is given twice")
        least = 0 if key == "seed" else 1
        if not re.fullmatch(r"\d{1,18}", value, re.ASCII) or int(value) < least:
            raise _grammar_error(text, f"{key} must be a whole number, at least {least}, got {value!r}")
        values[key] = int(value)
    return values


def _grammar_error(text: str, reason: str) -> SourceError:
    return SourceError(f"data source {text!r}: {reason}. Grammar: {GRAMMAR}")


def _open_roofs(uri: SourceUri) -> Rows:
    from train.roofs import generate_scene

    at = [(uri.seed, i) for i in range(uri.scenes)] + [(uri.seed + 1, i) for i in range(uri.dev)]

    def task(i: int, truth: bool) -> Callable[[], Scene]:
        seed, index = at[i]
        return partial(generate_scene, index, seed=seed, points=uri.points, setting=uri.place)

    # the names that train.roofs gives; to know them must not cost the scenes
    order_ids = [f"roofs-{uri.place}-{seed}-{index:06d}" for seed, index in at]
    return Rows(uri=uri, order_ids=order_ids, task=task, made_of=lambda: digest_sources(*GENERATOR))


def _open_npz(uri: SourceUri) -> Rows:
    files = sorted(_directory(uri).glob("*.npz"), key=lambda file: file.stem)

    def task(i: int, truth: bool) -> Callable[[], Scene]:
        return partial(_decode_file, files[i], truth)

    return Rows(
        uri=uri, order_ids=[file.stem for file in files], task=task, made_of=lambda: "\n".join(map(_stamp, files))
    )


def _decode_file(file: Path, truth: bool) -> Scene:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RowError(file.stem, "data", f"cannot be read ({error})") from error
    return decode_scene(file.stem, data, truth=truth)


def _open_parquet(uri: SourceUri) -> Rows:
    directory = _directory(uri)
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise SourceError(f"{uri}: {directory} has no *.parquet files")
    splits = sorted(_SPLITS & {file.name.split("-")[0] for file in files})
    if len(splits) > 1:
        raise SourceError(f"{uri}: {directory} mixes the splits {', '.join(splits)}; give each its own directory")
    advice = "Are they whole, and do all of them have the columns order_id and data?"
    rows = _load_table(uri, advice, "parquet", data_files=[str(file) for file in files], split="train")
    return replace(rows, made_of=lambda: "\n".join(map(_stamp, files)))


def _open_hub(uri: SourceUri) -> Rows:
    name, split = uri.place.split(":")
    advice = (
        "If the set is gated, accept its terms on its hub page and log in (hf auth login). Without a network, "
        "fetch its parquet files on another machine and name their directory: parquet:DIR"
    )
    return _load_table(uri, advice, name, split=split)


def _load_table(uri: SourceUri, advice: str, *args, **options) -> Rows:
    try:
        import datasets.exceptions
    except ImportError as error:
        raise SourceError(f"{uri}: needs the package datasets, which is not installed: pip install datasets") from error
    # a download takes minutes and may be watched
    watched = uri.kind == "hf" and sys.stderr.isatty()
    try:
        with contextlib.nullcontext() if watched else _quiet(datasets):
            # on the disk, where its files tell whether it changed
            table = datasets.load_dataset(*args, **options, keep_in_memory=False)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise SourceError(f"{uri}: cannot read the set ({_one_line(error.__cause__ or error)}). {advice}") from error
    return _table_rows(uri, table)


def _table_rows(uri: SourceUri, table) -> Rows:
    """Rows of a `datasets.Dataset` with the hub's two columns."""
    found = {name: getattr(feature, "dtype", str(feature)) for name, feature in table.features.items()}
    for name, dtypes in (("order_id", ("string", "large_string")), ("data", ("binary", "large_binary"))):
        if found.get(name) not in dtypes:
            raise SourceError(f"{uri}: needs the columns order_id: string and data: binary, has {found}")
    order_ids = list(table.select_columns("order_id")[:]["order_id"])

    def task(i: int, truth: bool) -> Callable[[], Scene]:
        return partial(_decode_cells, i, order_ids[i], table[i]["data"], truth)

    files = [Path(file["filename"]) for file in table.cache_files]
    return Rows(uri=uri, order_ids=order_ids, task=task, made_of=lambda: "\n".join(map(_stamp, files)))


def _decode_cells(i: int, order_id: str | None, data: bytes | None, truth: bool) -> Scene:
    if order_id is None:
        raise RowError(f"number {i}", "order_id", "is missing")
    if data is None:
        raise RowError(order_id, "data", "is missing")
    return decode_scene(order_id, data, truth=truth)


def _stamp(file: Path) -> str:
    status = file.stat()
    # the time of a status change cannot be set back, that of a modification can
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _directory(uri: SourceUri) -> Path:
    directory = Path(uri.place).expanduser()
    if not directory.is_dir():
        raise SourceError(f"{uri}: there is no directory {directory}")
    return directory


@contextlib.contextmanager
def _quiet(datasets) -> Iterator[None]:
    """No progress bars and no log of `datasets` meanwhile; both are left as they were."""
    bars_were_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill beside `directory`, renamed to it at the end."""
    directory = directory.expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SourceError(f"{directory} exists and is not an empty directory; nothing was written")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as parent:
        target = Path(parent) / directory.name
        target.mkdir()
        yield target
        if not any(target.iterdir()):
            raise SourceError(f"there are no rows to write to {directory}")
        os.replace(target, directory)
