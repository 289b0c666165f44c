"""``index.json`` of an MDS folder, checked before anything in it is believed.

streaming joins the file names it finds there with the folder, whatever they are, and takes sizes and counts as they
stand; here a name is a plain file name, and the sizes must add up.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import Field, StrictInt, model_validator

from lightbulb.config import Config, ConfigError, build_config
from lightbulb.data.config import DataError

MAX_INDEX_BYTES = 1 << 28
MAX_MESSAGE = 500
COLUMNS = {"document_ids": ("uint16", "uint32"), "loss_mask": ("uint8",), "tokens": ("uint16", "uint32")}
"""Each column's dtypes, in the order of their names, as MDS lays them out. Without ``loss_mask`` every token counts."""
OPTIONAL = "loss_mask"
ENCODING = re.compile(r"ndarray:(uint8|uint16|uint32):(\d{1,9})")

Count = Annotated[StrictInt, Field(ge=0, lt=1 << 32)]


class ShardFile(Config):
    """One file of a shard."""

    basename: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    bytes: Count
    hashes: dict[str, str]


class ShardEntry(Config):
    """One shard: uncompressed MDS with LightBulb's two or three columns."""

    version: Literal[2]
    format: Literal["mds"]
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[StrictInt | None]
    compression: None
    zip_data: None
    hashes: list[str]
    raw_data: ShardFile
    samples: Count
    size_limit: StrictInt | None

    @model_validator(mode="after")
    def _columns_and_sizes_add_up(self) -> "ShardEntry":
        needed = [name for name in COLUMNS if name != OPTIONAL]
        if self.column_names not in (needed, list(COLUMNS)):
            raise ValueError(
                f"columns are {self.column_names}, expected {needed}, with {OPTIONAL!r} between them or without; "
                "write it with preprocess"
            )
        encodings = [ENCODING.fullmatch(encoding) for encoding in self.column_encodings]
        known = [e for name, e in zip(self.column_names, encodings, strict=False) if e and e[1] in COLUMNS[name]]
        sizes = [int(e[2]) * np.dtype(e[1]).itemsize for e in known]
        if len(encodings) != len(known) or len({e[2] for e in known}) != 1 or sizes != self.column_sizes:
            raise ValueError(f"column encodings {self.column_encodings} do not match column sizes {self.column_sizes}")
        # A count, one offset per row and one more, then the column description and the rows.
        least = 4 * (self.samples + 2) + self.samples * sum(sizes)
        if self.raw_data.bytes < least:
            raise ValueError(f"{self.samples} samples need {least} bytes, {self.raw_data.basename} has less")
        if not self.raw_data.hashes:
            raise ValueError(f"no hash for {self.raw_data.basename}; write the corpus with preprocess, which adds them")
        return self

    @property
    def row(self) -> np.dtype:
        """A row as it lies in the file: one column behind the other."""
        columns = zip(self.column_names, map(ENCODING.fullmatch, self.column_encodings), strict=True)
        return np.dtype([(name, match[1], int(match[2])) for name, match in columns if match is not None])

    @property
    def row_length(self) -> int:
        """Tokens in each row."""
        return self.row["tokens"].shape[0]


class ShardIndex(Config):
    """The shards of one folder."""

    version: Literal[2]
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _names_differ(self) -> "ShardIndex":
        [(name, count)] = Counter(shard.raw_data.basename for shard in self.shards).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"{name} is listed {count} times")
        return self


def read_index(folder: Path) -> tuple[ShardIndex, list[dict[str, Any]]]:
    """The checked index of a folder, and its shards as streaming wants them.

    Raises:
        DataError: missing, unreadable, or with entries that cannot be true.
    """
    path = folder / "index.json"
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise DataError(f"{path}: larger than {MAX_INDEX_BYTES >> 20} MB, which no index is; check data.path")
        values = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: missing; check data.path, or run `lightbulb preprocess` again") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `lightbulb preprocess` again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object with 'shards'; run `lightbulb preprocess` again")
    try:
        return build_config(ShardIndex, values, str(path)), values["shards"]
    except ConfigError as error:
        raise DataError(str(error).splitlines()[0][:MAX_MESSAGE]) from None
