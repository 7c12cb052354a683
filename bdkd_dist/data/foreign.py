"""Images of another data set than the run's own, whatever their labels: what a network was not trained for."""

from dataclasses import replace

from bdkd_dist.config import Data
from bdkd_dist.data.prepare import Progress, prepare_source
from bdkd_dist.data.prepared import Prepared, verify
from bdkd_dist.data.sources import Source, find_source
from bdkd_dist.errors import UserError
from bdkd_dist.uris import shown

SPLITS = ("test", "validation", "train")
"""The first of these that has images is taken; as in a run's own data, a validation split stands in for the test."""


def prepare_foreign(where: str, data: Data, progress: Progress | None = None) -> Prepared:
    """Return the images of one split of another data set, prepared as ``data`` says; made once and kept in its cache.

    Args:
        where: A folder as ``data.root`` takes, a folder of images without classes, or ``digits`` (scikit-learn's).
        data: The run's; its classes play no part.
        progress: Told how far the preparation is.

    Returns:
        A data set of a single split, under the name that it has in its source.

    Raises:
        UserError: No such source, one without images, or an image that cannot be decoded.
    """
    if not where:
        raise UserError("--ood: the source is missing; give a folder as data.root takes, a folder of images, or digits")
    named = {"dataset": "digits", "root": None} if where == "digits" else {"dataset": "files", "root": where}
    elsewhere = data.model_copy(update=named)
    try:
        prepared = prepare_source(_only_split(find_source(elsewhere, without_classes=True)), elsewhere, progress)
        verify(prepared)
    except UserError as error:
        raise UserError(f"--ood {shown(where)}: {str(error).removeprefix(f'data.root={shown(where)} ')}") from None
    return prepared


def _only_split(source: Source) -> Source:
    """Keep the split whose images are taken; the name is not that of a preparation that holds all splits."""
    for name in SPLITS:
        if name in source.splits and len(source.splits[name]):
            return replace(source, name=f"{source.name}-ood", splits={name: source.splits[name]})
    raise UserError("holds no images")
