"""Datasets of the `datasets` library: saved ones, folders of data files, and those of the hub."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from stillhouse.config import nearest
from stillhouse.data.datasets import base
from stillhouse.data.datasets.base import DATASETS, DatasetConfig, LocatedRow
from stillhouse.data.datasets.parse import kind_of
from stillhouse.data.datasets.stored_images import with_encoded_images
from stillhouse.data.datasets.tables import table_digest, without_nested_nulls
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError, EnvironmentFault
from stillhouse.files import PACKAGE, locate

logger = logging.getLogger(__name__)

_SAVED = ("state.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@DATASETS.register
class HuggingFace(DatasetConfig):
    """A dataset of the `datasets` library: a `save_to_disk` folder, a folder of data files (the shards of
    `split` by their names), or a name on the hub. What is on disk is read without the hub."""

    PLACES: ClassVar[frozenset[str]] = frozenset({"path", "subset", "split", "revision"})
    kind: Literal["hf"] = "hf"
    path: str
    """A folder, or a name on the hub such as `org/name`."""
    subset: str | None = None
    """The name of the dataset's configuration, if it has several."""
    split: str = "train"
    """Which split, as the `datasets` library writes it: `validation`, `train[:10%]`, `train+test`."""
    revision: str | None = None
    """The revision of a dataset on the hub. Set it, or results cannot be reproduced."""

    @property
    def title(self) -> str:
        return self.path

    def found(self) -> Path:
        """The folder or file on disk; `path` itself if it may be a name on the hub.

        Raises:
            DataError: it looks like a path on disk and does not exist.
        """
        place = locate(self.path)
        if place.exists():
            return place
        first = self.path.partition("/")[0]
        local = (
            self.path.startswith((PACKAGE, "/", ".", "~"))
            or not _HUB_NAME.fullmatch(self.path)
            or kind_of(self.path) is not None
            or ("/" in self.path and Path(first).is_dir())
        )
        if local:
            beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(f"{self.path}: no such file or folder{nearest(place.name, beside)}")
        return place

    def check_found(self) -> None:
        """See the base class."""
        self.found()

    def content_digest(self) -> str | None:
        """See the base class."""
        files = self._files()
        if files is None:
            return self.digest_with_settings(table_digest(self.load()))
        digests = [one.content_digest() for one in files]
        return None if None in digests else self.digest_with_settings(" ".join(map(str, digests)))

    def places(self) -> list[str]:
        """See the base class."""
        files = self._files()
        return [f"{self.path} {self.split}"] if files is None else [one.title for one in files]

    def is_large(self) -> bool:
        """See the base class."""
        files = self._files()
        if files is None:
            return len(self.load()) >= base.LARGE_ROWS
        return any(one.is_large() for one in files)

    def raw(self, reading: Reading) -> Iterator[LocatedRow]:
        """The rows of the split."""
        files = self._files()
        if files is not None:
            self._tell_of_no_split()
            for dataset in files:
                yield from dataset.raw(reading)
            return
        reading.folder = str(self.found())
        for number, row in enumerate(with_encoded_images(self.load()), start=1):
            yield f"{self.path}[{self.split}:{number}]", without_nested_nulls(row)

    def fingerprint(self) -> str:
        """A digest of the files, or the library's own fingerprint."""
        files = self._files()
        if files is None:
            return hashlib.sha256(str(self.load()._fingerprint).encode()).hexdigest()
        digests = [dataset.fingerprint() for dataset in files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def load(self) -> Any:
        """The `datasets.Dataset`.

        Raises:
            DataError: there is no such dataset, subset or split.
            EnvironmentFault: it has to be downloaded and the hub cannot be reached.
        """
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        folder = self.found()
        try:
            if any((folder / name).is_file() for name in _SAVED):
                return self._split_of(datasets.load_from_disk(str(folder)))
            return datasets.load_dataset(
                str(folder) if folder.exists() else self.path,
                self.subset,
                split=self.split,
                revision=self.revision,
            )
        except (DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: cannot be loaded as a dataset: {error}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(f"{self.path}: the dataset could not be downloaded: {error}") from error

    def _split_of(self, loaded: Any) -> Any:
        """The split of a saved dataset; a saved dataset without splits is the split "train"."""
        import datasets

        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        sizes = {name: len(split) for name, split in splits.items()}
        if self.split in splits:
            return splits[self.split]
        known = re.split(r"[\[+]", self.split)[0] in splits
        if not known:
            raise self._no_split(list(splits))
        parts = datasets.ReadInstruction.from_spec(self.split).to_absolute(sizes)
        chosen = [splits[one.splitname].select(range(one.from_, one.to)) for one in parts]
        return datasets.concatenate_datasets(chosen)

    def _no_split(self, known: list[str]) -> DataError:
        return DataError(
            f"{self.path}: has no split {self.split!r}{nearest(self.split, known)}; "
            f"allowed: {', '.join(known)}"
        )

    def _files(self) -> list[DatasetConfig] | None:
        """The data files of the split in a folder, or a file itself; None for what the library loads."""
        place = self.found()
        if place.is_file():
            return [self._file(place)]
        saved = any((place / name).is_file() for name in _SAVED)
        if not place.is_dir() or saved or self.subset is not None or not self.split.isidentifier():
            return None
        if "\nconfigs:" in _card(place):
            return None
        splits = _split_files(place)
        if self.split not in splits:
            if not splits:
                raise DataError(f"{self.path}: holds no data files")
            raise self._no_split(list(splits))
        return [self._file(path) for path in splits[self.split]]

    def _tell_of_no_split(self) -> None:
        """Name the data files of the folder that no split has, because none is in their names."""
        place = self.found()
        if not place.is_dir():
            return
        sorted_in = {path.resolve() for files in _split_files(place).values() for path in files}
        rest = [
            str(path.relative_to(place))
            for path in sorted(place.rglob("*"))
            if path.is_file()
            and kind_of(path.name) is not None
            and path.resolve() not in sorted_in
            and not path.relative_to(place).as_posix().startswith((".", "__"))
        ]
        if rest:
            logger.warning(
                "%s: %d data files have no split in their names, as others have, and are not read: "
                "%s. Name all with a pattern, such as %s/*%s",
                self.path, len(rest), ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else ""),
                self.path.rstrip("/"), Path(rest[0]).suffix,
            )  # fmt: skip

    def _file(self, path: Path) -> DatasetConfig:
        kind = kind_of(str(path))
        if kind is None:
            raise DataError(f"{path}: has an ending that is not known")
        return DATASETS.parse({"kind": kind, "path": str(path), "fields": self.fields.model_dump()})


def _card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text("utf-8", errors="replace")[:20_000] if path.is_file() else ""


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, as the `datasets` library sorts them by their names."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        return {}
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    splits = {
        str(split): sorted(Path(name) for name in names if kind_of(name) is not None)
        for split, names in found.items()
    }
    return {split: files for split, files in splits.items() if files}
