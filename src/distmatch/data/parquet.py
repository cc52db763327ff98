"""Reads Parquet tables in parts."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from distmatch.data.archives import printable
from distmatch.system.errors import UserError
from distmatch.system.extras import need


def rows(file: BinaryIO, where: str) -> Iterator[dict[str, Any]]:
    """Yield every row of the table in `file`; see `opened` and `records`."""
    table = opened(file, where)
    return records(table, table.schema_arrow.names, where)


def opened(file: BinaryIO, where: str) -> Any:
    """Return the `pyarrow.parquet.ParquetFile` in `file`; messages call it `where`.

    Raises `UserError` if it is not one, or pyarrow is missing.
    """
    need("pyarrow", by=f"{where}, a Parquet file,")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read as Parquet: {printable(error)}; get it again") from error


def records(table: Any, columns: list[str], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `table` with these columns.

    Raises `UserError` if it is damaged.
    """
    need("pyarrow", by=f"{where}, a Parquet file,")
    from pyarrow import ArrowException

    batches = table.iter_batches(batch_size=256, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (ArrowException, OSError) as error:
            raise UserError(f"{where} is damaged: {printable(error)}; get it again") from error
        if batch is None:
            return
        yield from batch.to_pylist()
