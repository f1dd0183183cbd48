"""Tables in Parquet files, read column by column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from client.tables.table import Table
from dare_agg.errors import ConfigError


def read_parquet(path: Path, what: str) -> Table:
    """The table of a Parquet file; raises `ConfigError` where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pa.parquet.ParquetFile(path)
        names = file.schema_arrow.names

        def column(name: str) -> list[Any]:
            if names.count(name) > 1:
                raise ConfigError(f"{what} has {names.count(name)} columns {name!r}; rename one")
            try:
                return file.read([name])[name].to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{what} cannot be read, column {name!r}: {error}") from error

        return Table(names, column)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
