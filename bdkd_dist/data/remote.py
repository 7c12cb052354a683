"""Prepared data sets on other file systems, named by URI: each node copies them near (:mod:`bdkd_dist.data.stage`)."""

from dataclasses import replace
from pathlib import Path

from bdkd_dist.data.beton import copy_tables
from bdkd_dist.data.prepared import MANIFEST, Part, Prepared, is_ours, missing, parsed
from bdkd_dist.data.sources.storage import File, Place, in_parallel


def find_remote(place: Place) -> Prepared | None:
    """Return what was prepared in a place; None where other things lie.

    Raises:
        UserError: The place cannot be read; or its manifest is missing, damaged or of another format.
    """
    content = place.find(MANIFEST)
    if content is None or not is_ours(content):
        if not place.is_folder() or not any(file.path.endswith(".beton") for file in place.listing()[0]):
            return None
        if content is None:
            raise missing(place.where())
    return replace(parsed(content, Path(place.where()), place.where()), place=place)


def with_tables_only(prepared: Prepared, folder: Path) -> Prepared:
    """Read what the files say of their images, but no image.

    Args:
        prepared: Files that lie elsewhere.
        folder: An empty folder for files of the same length and with the same tables, zeros between them; they take
            no more room than the tables.

    Raises:
        UserError: A file cannot be read, or has another length than the manifest says.
    """
    place = prepared.place
    assert place is not None

    def copy(part: Part) -> None:
        with place.open(File(part.file, part.bytes, 0)) as source:
            copy_tables(source, folder / part.file, part.bytes)

    in_parallel(copy, prepared.parts)
    return replace(prepared, folder=folder, place=None)
