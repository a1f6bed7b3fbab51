"""Labelled images, from a folder or a dataset, through a model's own processor, as batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moonshot.errors import ArgumentError
from moonshot.extras import from_extra
from moonshot.models.calibration import Batch, CalibrationError, open_dataset

if TYPE_CHECKING:
    from PIL import Image

_PIXELS = 2**26  # of an image at most: a file of some kilobytes can ask for any number


@dataclass(frozen=True)
class Pictures:
    """Labelled images that are not read yet.

    classes: names of the classes, or None where labels are a model's own ids.
    labels: one for each image, an index into `classes`.
    names: one for each image, for messages. read: the image with this index; raises where it is broken.
    """

    source: str
    classes: list[str] | None
    labels: Sequence[int]
    names: Sequence[str]
    read: Callable[[int], "Image.Image"]


def find_pictures(data: str) -> Pictures:
    """The images of a folder with one sub-folder for each class, or of a datasets name[:config[:split]].

    A dataset has a column of images and one of labels: a ClassLabel, or integers in `label` or `labels`.
    Raises CalibrationError where there are none.
    """
    with from_extra("vision"):
        import PIL  # noqa: F401 - datasets decodes images with it too
    path = Path(data)
    if path.is_file():
        raise CalibrationError(
            f"{data} is a file: give a folder with one sub-folder for each class, or a dataset"
        )
    return _in_folder(path) if path.is_dir() else _in_dataset(data)


def _in_folder(path: Path) -> Pictures:
    from PIL import Image

    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise CalibrationError(
            f"{path} has no sub-folders: put every image into one that has the name of its class, "
            f"such as {path / 'cat' / 'tom.png'}"
        )
    suffixes = Image.registered_extensions()
    found = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in suffixes and file.is_file()
    ]

    def read(index: int) -> "Image.Image":
        with _opened(found[index][0]) as image:
            image.load()
        return image

    return Pictures(
        source=str(path),
        classes=[folder.name for folder in folders],
        labels=[label for _, label in found],
        names=[str(file) for file, _ in found],
        read=read,
    )


def _in_dataset(data: str) -> Pictures:
    with from_extra("vision"):
        import datasets

    dataset = open_dataset(data)
    kinds = dataset.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels") if "int" in getattr(kinds.get(name), "dtype", "")]
    if not images or not labels:
        raise CalibrationError(
            f"the dataset {data!r} needs a column of images and one of labels (ClassLabel, or integers in `label`): "
            f"it has {', '.join(kinds)}"
        )
    decode = datasets.Image().decode_example
    undecoded = dataset.cast_column(images[0], datasets.Image(decode=False))

    def read(index: int) -> "Image.Image":
        stored = undecoded[index][images[0]]
        _opened(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]).close()
        return decode(stored)

    return Pictures(
        source=f"the dataset {data!r}",
        classes=getattr(kinds[labels[0]], "names", None),
        labels=dataset[labels[0]][:],
        names=[f"{data}[{index}]" for index in range(len(dataset))],
        read=read,
    )


def _opened(file: Any) -> "Image.Image":
    """An image whose pixels are not read yet. Raises ValueError for one of too many.

    No PostScript: Pillow has another program run it.
    """
    from PIL import Image

    Image.init()
    image = Image.open(file, formats=[name for name in Image.ID if name != "EPS"])
    if image.width * image.height > _PIXELS:
        image.close()
        raise ArgumentError(f"{image.width} x {image.height} pixels are more than {_PIXELS}")
    return image


class ImageBatches:
    """Batches of `pixel_values` (images, channels, height, width) and `labels` (images,), read while iterated over.

    model: an image classifier of transformers; processor: its image processor.
    samples: how many images, None for all of them. seed: of their random order, None for the order they have.
    skipped: names of the images that the last iteration could not read; others took their places.

    Labels are the model's ids: classes with the names of the model's own are those; where none has, and there are as
    many as the model's, they are taken in their order. Raises CalibrationError for labels that the model lacks and,
    while iterated over, where there are too few images.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        pictures: Pictures,
        samples: int | None = None,
        seed: int | None = 0,
        batch_size: int = 16,
    ):
        if samples is not None and samples < 1:
            raise CalibrationError("at least one image is needed")
        self.processor, self.pictures = processor, pictures
        self.samples, self.seed, self.batch_size = samples, seed, batch_size
        self.skipped: list[str] = []
        self._require(len(pictures.labels))
        self._ids = _label_ids(pictures, model.config)
        self._mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def __iter__(self) -> Iterator[Batch]:
        pixels: list[Tensor] = []
        labels: list[int] = []
        for image, label in self._examples():
            pixels.append(self.processor(images=image, return_tensors="pt")["pixel_values"][0])
            labels.append(self._ids[label])
            if len(pixels) == self.batch_size:
                yield _batch(pixels, labels)
                pixels, labels = [], []
        if pixels:
            yield _batch(pixels, labels)

    def _examples(self) -> Iterator[tuple["Image.Image", int]]:
        """(image, label) of as many images as are asked for."""
        pictures, count = self.pictures, len(self.pictures.labels)
        order = list(range(count))
        if self.seed is not None:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            order = torch.randperm(count, generator=generator, device="cpu").tolist()
        self.skipped = []
        found = 0
        for index in order:
            if found == self.samples:
                return
            try:
                image = pictures.read(index).convert(self._mode)
            except Exception:  # what a broken file raises has no common base class
                self.skipped.append(pictures.names[index])
                continue
            found += 1
            yield image, pictures.labels[index]
        self._require(found)

    def _require(self, found: int) -> None:
        needed = self.samples or 1
        if found < needed:
            broken = f", {len(self.skipped)} of them broken, such as {self.skipped[0]}" if self.skipped else ""
            raise CalibrationError(
                f"{self.pictures.source} has {len(self.pictures.labels)} images{broken}; {needed} needed: "
                "give more, or lower nsamples"
            )


def _batch(pixels: list[Tensor], labels: list[int]) -> Batch:
    if len({image.shape for image in pixels}) > 1:
        raise CalibrationError(
            "the processor returns images of different sizes: give it a size with height and width, or do_center_crop"
        )
    return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels, device="cpu")}


def _label_ids(pictures: Pictures, config: Any) -> dict[int, int]:
    """{label of the pictures: id of the model}"""
    ids = sorted(config.id2label)
    names = dict(enumerate(pictures.classes or ()))
    named = {label: int(config.label2id[name]) for label, name in names.items() if name in config.label2id}
    if pictures.classes is None:
        known = {k: k for k in ids}
    elif not named and len(names) == len(ids):
        known = dict(enumerate(ids))
    else:
        known = named
    if lacking := [str(names.get(label, label)) for label in sorted(set(pictures.labels) - set(known))]:
        raise CalibrationError(
            f"the model has no class {', '.join(lacking[:4])}{', ...' if lacking[4:] else ''}, which "
            f"{pictures.source} has: the model's {len(ids)} are {', '.join(str(config.id2label[k]) for k in ids[:4])}"
            f"{', ...' if ids[4:] else ''}; give the classes the model's names, or as many classes as it has"
        )
    return known
