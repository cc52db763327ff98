"""Finds the feature spaces that models are measured in, each with its reference, and makes new ones from images.

At least two different spaces are needed: one that averages over positions rates a model as perfect that draws strokes
in the wrong places; another may do so for a model that blurs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distmatch.data.images import Images
from distmatch.evaluation.features import FeatureSpace, Reference, load_real, load_reference, load_statistics, reference
from distmatch.evaluation.measure import Space, chance, enough, fewest, score
from distmatch.models.classifier import Classifier, Training, train_classifier
from distmatch.models.efficientnet import PARTS, EfficientNet
from distmatch.models.folder import Info
from distmatch.models.inception import load_inception
from distmatch.models.pixels import Pixels, principal_components
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.files import remove, together, write_json
from distmatch.system.paths import ASSETS, shipped
from distmatch.system.plain import read_json
from distmatch.system.progress import console, progress
from distmatch.system.storage import local
from distmatch.system.terminal import notice

FILES = {
    "positions": (Classifier, "reference-positions.safetensors"),
    "pixels": (Pixels, "reference-pixels.safetensors"),
    "classifier": (Classifier, "reference.safetensors"),
}
"""The spaces of a folder by sub-folder, with their references. Folders of earlier versions only have the last."""

KEEP = 5_000
"""Number of images whose features a folder keeps for precision and recall."""


def find_spaces(
    name: str,
    real: str | None = None,
    resize: str = "legacy",
    device: torch.device | None = None,
    shape: tuple[int, ...] | None = None,
) -> list[Space]:
    """Return the feature spaces called `name`, each with its reference.

    Args:
        name: a folder made by `distmatch classifier`, or one of the package; `pixels`, the principal components of the
            pixels of `real`; `efficientnet` (see `models.efficientnet`); or `inception:FILE` (see `models.inception`).
        real: the reference: images (`features.load_real`), which always add the space `pixels`, or for Inception
            statistics (`features.load_statistics`); default: the one in the folder.
        resize: how Inception resizes images.
        device: where the spaces compute.
        shape: shape of the images to be measured. `pixels` is added to Inception and `efficientnet`, which resize, only
            if the real images have it too.

    Raises `UserError` for an unknown name, a missing reference, or anything damaged or unsuitable.
    """
    device = device or torch.device("cpu")
    inception = name.startswith("inception:")
    resized = inception or name == "efficientnet"
    if resize != "legacy" and not inception:
        raise UserError(f"resize {resize!r} is for Inception; the features {name!r} take images as they are")
    if real is None and (inception or name in ("pixels", "efficientnet")):
        statistics = " or their statistics (an .npz with mu and sigma, such as EDM's)" if inception else ""
        raise UserError(
            f"features {name!r} come without a reference; name one with --reference: the training images (folder, "
            f"archive, .npy, .npz){statistics}"
        )
    if inception:
        networks: list[FeatureSpace] = [load_inception(Path(name.removeprefix("inception:")), resize).to(device)]
    elif name == "efficientnet":
        networks = [EfficientNet(part).to(device) for part in PARTS]
    elif name == "pixels":
        networks = []
    else:
        folder = features_folder(name)
        parts = [part for part in FILES if (folder / part).is_dir() and (real is None or part != "pixels")]
        networks = [FILES[part][0].load(folder / part).to(device) for part in parts]
        if real is None:
            files = [folder / FILES[part][1] for part in parts]
            return [(space, load_reference(file, space)) for space, file in zip(networks, files, strict=True)]
    references, pixels = _references(real or "", networks, shape if resized else None)
    if pixels is not None:
        networks.append(pixels.to(device))
    return list(zip(networks, references, strict=True))


@parallel.on_first
def _references(
    real: str, networks: Sequence[FeatureSpace], shape: tuple[int, ...] | None
) -> tuple[list[Reference], Pixels | None]:
    """Return the references of the images `real` in `networks`, then in the pixels themselves; show progress.

    If `shape` is given, the pixels are used only for images of that shape.
    """
    with console.status(f"reading {real}"):
        file = local(real)
        if ready := load_statistics(file):
            if [space.distance for space in networks] == ["fid"]:
                return [ready], None
            raise UserError(
                f"{real} holds statistics, which don't say in which features they were taken; they are used with "
                "--features inception:FILE alone. Name the images"
            )
        images = load_real(file)
    pixels = None
    if shape is None or tuple(images.pixels.shape[1:]) == tuple(shape):
        pixels = principal_components(images)
    spaces = [*networks, *([] if pixels is None else [pixels])]
    with progress("reference", len(images) * len(spaces), unit="image") as advance:
        return [reference(images, space, source=real, progress=advance) for space in spaces], pixels


def features_folder(name: str) -> Path:
    """Return the folder of the spaces called `name`, here or in the package. Raises `UserError` if there is none."""
    package = shipped(name)
    for folder in filter(None, (Path(name), package)):
        if any((folder / part).is_dir() for part in FILES):
            if package and folder != package and any((package / part).is_dir() for part in FILES):
                notice(f"features {name}: those in the folder of this name here, not those of the package")
            return folder
    raise UserError(
        f"features {name!r}: neither a folder made by `distmatch classifier` nor one of the package, "
        "nor `pixels`, nor inception:FILE"
    )


def default_features(model: str, info: Info) -> str:
    """Return the features of the package that `model` is measured in by default.

    Raises `UserError` unless its card says that it was taught on exactly the images of their reference.
    """
    packaged = sorted(file.parent for file in ASSETS.glob("*/reference.safetensors"))
    for folder in packaged:
        if of_its_images(info, folder):
            return folder.name
    names = ", ".join(folder.name for folder in packaged)
    raise UserError(
        f"{model} has no card that says it was taught on images of which the package has a reference ({names}). Say "
        "what to compare with: --features FOLDER (`distmatch classifier IMAGES` makes one), --reference IMAGES, or "
        f"--features {names} if it makes just such images"
    )


def train_spaces(
    real: Images, test: Images, out: Path, source: str, positions: int, training: Training
) -> list[dict[str, Any]]:
    """Make the spaces of `real` in `out`: a classifier that pools, one that keeps positions, and the pixels.

    Args:
        source: description of `real`.
        positions: per side; 1 omits the second classifier. Small images get fewer: a part is at least 4 pixels wide.
        training: settings of each classifier.

    Returns the figures of the `test` images as a row (see `save_spaces`). Raises `UserError` for too few images.
    """
    channels, *size = real.pixels.shape[1:]
    positions = min(positions, min(size) // 4)
    grids = {"positions": positions, "classifier": 1} if positions > 1 else {"classifier": 1}
    for kept in grids.values():
        features = Classifier(channels, size, real.classes, training.widths, kept).head.in_features
        enough(features, len(real), f"real images ({source})")
    spaces: dict[str, Classifier | Pixels] = {"pixels": principal_components(real)}
    for part, kept in grids.items():
        with progress(part, training.steps, unit="step") as advance:
            spaces[part] = train_classifier(real, test, training, positions=kept, progress=advance)
    return save_spaces(spaces, real, test, out, source)


def save_spaces(
    spaces: dict[str, Classifier | Pixels], real: Images, test: Images, out: Path, source: str
) -> list[dict[str, Any]]:
    """Write `spaces`, by their names in `FILES`, with their references and the figures of the `test` images to `out`.

    Returns the figures as a row; no row if there are fewer images than the spaces need.
    """
    measured: list[Space] = [
        (spaces[part], reference(real, spaces[part], cache=None, keep=KEEP, source=source))
        for part in FILES
        if part in spaces
    ]
    rows: list[dict[str, Any]] = []
    if len(test) >= max(fewest(len(known.mu)) for _, known in measured):
        # Folders are sorted by class, and precision and recall take the first images.
        order = torch.from_numpy(rng.shuffled(0, len(test), 0, len(test)))
        pixels, labels = test.pixels[order], None if test.labels is None else test.labels[order]
        figures = score(lambda a, b: pixels[a:b], labels, len(test), measured, classes=test.classes)
        rows.append({"name": "real test images", "images": len(test), **figures})
    with together(out, "figures.json") as beside:
        for part, (_, known) in zip([part for part in FILES if part in spaces], measured, strict=True):
            spaces[part].save(beside / part)
            known.save(beside / FILES[part][1])
        write_json(beside / "figures.json", {"rows": rows, "spaces": [known.classifier for _, known in measured]})
    for part in FILES.keys() - spaces.keys():  # left by an earlier set
        remove(out / part)
        remove(out / FILES[part][1])
    return rows


def known_rows(features: str, info: Info, spaces: Sequence[Space], n: int) -> list[dict[str, Any]]:
    """Return rows to compare a model's figures with: its teacher, real test images, and `n` real images by chance.

    The first two come from `figures.json` in the folder `features`, if it has them. A teacher's row has `teacher`, the
    name that a student's recipe uses for it.
    """
    rows = []
    if features not in ("pixels", "efficientnet") and not features.startswith("inception:"):
        file = features_folder(features) / "figures.json"
        known = _known(file, spaces)["rows"] if file.exists() else []
        teacher = info.card.get("recipe", {}).get("teacher")
        rows = [row for row in known if row.get("teacher") in (None, teacher)]
    return [*rows, chance(spaces, n)]


def _known(file: Path, spaces: Sequence[Space]) -> dict[str, list[Any]]:
    """Return what `save_spaces` wrote to `file`. Raises `UserError` if it belongs to other spaces, or is damaged."""
    remedy = "Delete it to go on without the figures of real images, or run `distmatch classifier` again"
    known = read_json(file, dict[str, list[Any]], remedy)
    here = [real.classifier for _, real in spaces if real.classifier]
    if "rows" not in known or not {*here} <= {*known.get("spaces", here)}:  # earlier versions did not record the spaces
        raise UserError(f"{file} is not of the spaces beside it. {remedy}")
    return known


def of_its_images(info: Info, folder: Path) -> bool:
    """Return whether the model's card says that it was taught on the images of the reference in `folder`."""
    return info.card.get("pixels") == load_reference(folder / FILES["classifier"][1]).images
