"""Labelled images as batches, from folders and datasets made here, and accuracy on them."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import moonshot
from moonshot.files.load import is_image_classifier, load_classifier
from moonshot.models import images as reading
from moonshot.models.calibration import CalibrationError
from moonshot.models.evaluation import accuracy
from moonshot.models.images import ImageBatches, find_pictures

pytestmark = pytest.mark.usefixtures("dataset_cache")

NAMES = ["cat", "dog", "ant"]
DEMO = Path(moonshot.__file__).parent / "demo"


def picture(shade, mode="RGB", size=(8, 8)):
    return Image.new("RGB", size, (shade, 100, 200)).convert(mode)


def folder(path, classes=NAMES, each=3):
    """Every class's images are of its own shade of red: 10, 20, 30 in the order given."""
    for k, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for n in range(each):
            picture(10 * (k + 1)).save(path / name / f"{n}.png")
    return str(path)


def model(names=NAMES, channels=3):
    torch.manual_seed(0)
    labels = dict(enumerate(names)) if names else {}
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_channels=channels, id2label=labels, label2id={name: k for k, name in labels.items()},
    )  # fmt: skip
    return ViTForImageClassification(config)


def processor(channels=3, **changes):
    scales = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    return ViTImageProcessorPil(**{"size": {"height": 8, "width": 8}, **scales, **changes})


def batches(data, classifier=None, **changes):
    return ImageBatches(classifier or model(), processor(), find_pictures(str(data)), **changes)


def shades(images):
    """[(red of the image, label), ...]"""
    return [
        (round((float(pixel[0, 0, 0]) + 1) * 127.5), int(label))
        for batch in images
        for pixel, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]


def test_labels_are_the_models_by_name(tmp_path):
    images = batches(folder(tmp_path), seed=None, batch_size=4)
    assert shades(images) == [(30, 2)] * 3 + [(10, 0)] * 3 + [(20, 1)] * 3  # ant, cat, dog
    first, *_, last = images
    assert first["pixel_values"].shape == (4, 3, 8, 8) and len(last["labels"]) == 1
    assert images.skipped == []


def test_labels_are_in_sorted_order_if_no_name_is_the_models(tmp_path):
    images = batches(folder(tmp_path), model(["x", "y", "z"]), seed=None)
    assert shades(images) == [(30, 0)] * 3 + [(10, 1)] * 3 + [(20, 2)] * 3


def test_a_folder_with_some_of_the_models_classes(tmp_path):
    assert shades(batches(folder(tmp_path, ["dog"]), seed=None)) == [(10, 1)] * 3


def test_the_seed_chooses_the_images(tmp_path):
    data = folder(tmp_path)
    first, again, other = (shades(batches(data, samples=5, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5
    assert sorted(shades(batches(data, seed=2))) == sorted(shades(batches(data, seed=None)))


def test_a_broken_image_is_skipped_and_named(tmp_path):
    data = folder(tmp_path)
    (tmp_path / "ant" / "0.png").write_bytes(b"no image")
    whole = (tmp_path / "ant" / "1.png").read_bytes()
    (tmp_path / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    images = batches(data, seed=None)
    for _ in range(2):
        assert shades(images) == [(30, 2)] + [(10, 0)] * 3 + [(20, 1)] * 3
        assert images.skipped == [str(tmp_path / "ant" / name) for name in ("0.png", "1.png")]
    assert len(shades(batches(data, samples=7))) == 7
    with pytest.raises(CalibrationError, match="9 images, 2 of them broken, such as .*png; 8 needed"):
        list(batches(data, samples=8))


def test_an_image_of_too_many_pixels_is_never_read(tmp_path, monkeypatch):
    data = folder(tmp_path / "images")
    monkeypatch.setattr(reading, "_PIXELS", 64)
    picture(10, size=(65, 1)).save(tmp_path / "images" / "cat" / "0.png")
    images = batches(data, seed=None)
    assert len(shades(images)) == 8 and images.skipped == [str(tmp_path / "images" / "cat" / "0.png")]
    images = batches(dataset(tmp_path, size=(65, 1)), seed=None)
    with pytest.raises(CalibrationError, match="3 images, 3 of them broken"):
        list(images)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    for name in ("0.png", "1.eps"):
        picture(10).save(tmp_path / "cat" / name, format="eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("run"))
    with pytest.raises(CalibrationError, match="2 of them broken"):
        list(batches(tmp_path))


def test_a_folder_with_broken_images_alone(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match="1 images, 1 of them broken"):
        list(batches(tmp_path))


def test_files_that_are_no_images_and_hidden_folders_do_not_count(tmp_path):
    data = folder(tmp_path, each=1)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "dog" / "deeper").mkdir()
    picture(20).save(tmp_path / "dog" / "deeper" / "7.PNG", format="png")
    images = batches(data, seed=None)
    assert shades(images) == [(30, 2), (10, 0), (20, 1), (20, 1)] and images.skipped == []


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA"])
def test_images_of_every_mode(tmp_path, mode):
    (tmp_path / "cat").mkdir()
    picture(10, mode).save(tmp_path / "cat" / "0.tiff")
    (batch,) = batches(tmp_path)
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    classifier = model(channels=1)
    (batch,) = ImageBatches(classifier, processor(1), find_pictures(str(tmp_path)))
    assert batch["pixel_values"].shape == (1, 1, 8, 8)
    assert accuracy(classifier, [batch]).images == 1


def dataset(path, *, classes=NAMES, labels=(0, 1, 2), column="label", name="test", broken=(), size=(8, 8)):
    kind = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), column: kind})
    images = [picture(10 * (k + 1), size=size) for k in labels]
    made = datasets.Dataset.from_dict({"image": images, column: list(labels)}, features)
    if broken:
        undecoded = made.cast_column("image", datasets.Image(decode=False)).to_dict()
        for k in broken:
            undecoded["image"][k] = {"bytes": b"no image", "path": None}
        made = datasets.Dataset.from_dict(undecoded, features)
    made.to_parquet(path / f"{name}.parquet")
    return f"{path}::{name}"


def test_a_dataset_with_class_names(tmp_path):
    data = dataset(tmp_path, classes=["ant", "cat", "dog"])
    assert shades(batches(data, seed=None)) == [(10, 2), (20, 0), (30, 1)]
    assert shades(batches(data, model(["x", "y", "z"]), seed=None)) == [(10, 0), (20, 1), (30, 2)]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_dataset_with_plain_labels(tmp_path, column):
    data = dataset(tmp_path, classes=None, column=column)
    assert shades(batches(data, seed=None)) == [(10, 0), (20, 1), (30, 2)]


def test_a_broken_image_in_a_dataset(tmp_path):
    data = dataset(tmp_path, broken=[1])
    images = batches(data, seed=None)
    assert shades(images) == [(10, 0), (30, 2)] and images.skipped == [f"{data}[1]"]


def no_such_name(path):
    return folder(path, ["cat", "cow"])


def too_many_names(path):
    return folder(path, ["a", "b", "c", "d"])


def too_few_names(path):
    return folder(path, ["a", "b"])


def no_folders(path):
    picture(10).save(path / "0.png")
    return path


def no_images(path):
    (path / "cat").mkdir()
    return path


def a_file(path):
    picture(10).save(path / "0.png")
    return path / "0.png"


def unlabelled(path):
    return dataset(path, labels=(0, -1))


def a_large_label(path):
    return dataset(path, classes=None, labels=(0, 3))


def no_label_column(path):
    return dataset(path, classes=None, column="category")


def nothing(path):
    return path / "missing"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_such_name, "no class cow, .* are cat, dog, ant; give the classes the model's names"),
        (too_many_names, "no class a, b, c, d, .* as many classes as it has"),
        (too_few_names, "no class a, b"),
        (no_folders, "no sub-folders: put every image into one"),
        (no_images, "0 images; 1 needed"),
        (a_file, "is a file: give a folder"),
        (unlabelled, "no class -1"),
        (a_large_label, "no class 3"),
        (no_label_column, "it has image, category"),
        (nothing, "no file, folder or loadable dataset"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, make, words):
    with pytest.raises(CalibrationError, match=words):
        batches(make(tmp_path))


def test_asking_for_no_image_or_too_many(tmp_path):
    data = folder(tmp_path)
    with pytest.raises(CalibrationError, match="at least one"):
        batches(data, samples=0)
    with pytest.raises(CalibrationError, match="9 images; 10 needed: give more"):
        batches(data, samples=10)


def test_a_processor_without_a_fixed_size(tmp_path):
    (tmp_path / "cat").mkdir()
    picture(10, size=(8, 16)).save(tmp_path / "cat" / "0.png")
    picture(10, size=(8, 8)).save(tmp_path / "cat" / "1.png")
    images = ImageBatches(model(), processor(do_resize=False), find_pictures(str(tmp_path)))
    with pytest.raises(CalibrationError, match="different sizes: give it a size"):
        list(images)


class Fixed(torch.nn.Module):
    """Says that image k is of class k % 3."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, pixel_values):
        assert pixel_values.dtype == self.scale.dtype and not self.training
        return SimpleNamespace(logits=torch.eye(3)[pixel_values[:, 0].long() % 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 4, 10])
def test_accuracy_counts_images(dtype, size):
    numbers = torch.arange(10)
    labels = torch.tensor(np.array([0, 1, 2, 0, 1, 2, 0, 0, 0, 0]))
    data = [
        {"pixel_values": x[:, None].float(), "labels": y}
        for x, y in zip(numbers.split(size), labels.split(size), strict=True)
    ]
    found = accuracy(Fixed(dtype).train(), data)
    assert (found.value, found.images) == (0.8, 10) and str(found) == "80.00 % (10 images)"


def test_where_a_model_says_nan_it_is_not_right():
    class Broken(Fixed):
        def forward(self, pixel_values):
            logits = super().forward(pixel_values).logits
            logits[3:] = torch.nan  # of which argmax says class 0
            return SimpleNamespace(logits=logits)

    batch = {"pixel_values": torch.zeros(10, 1), "labels": torch.zeros(10, dtype=torch.int64)}
    assert accuracy(Broken(), [batch]).value == 0.3


def test_accuracy_of_nothing():
    with pytest.raises(ValueError, match="no images"):
        accuracy(Fixed(), [])


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_shipped_classifiers(name):
    classifier, preprocessor = load_classifier(str(DEMO / name))
    assert next(classifier.parameters()).dtype == torch.float16
    images = ImageBatches(classifier, preprocessor, find_pictures(f"{DEMO / 'images'}::test"), batch_size=100)
    found = accuracy(classifier, images)
    assert found.images == 2000 and found.value > 0.98
    calibration = list(ImageBatches(classifier, preprocessor, find_pictures(f"{DEMO / 'images'}::train")))
    assert sum(len(batch["labels"]) for batch in calibration) == 512


def test_a_classifier_round_trips(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    assert is_image_classifier(name) and not is_image_classifier(str(DEMO / "model"))
    with pytest.raises(ValueError, match="no such folder: .*missing"):
        is_image_classifier(str(tmp_path / "missing"))
    loaded, preprocessor = load_classifier(name)
    data = find_pictures(folder(tmp_path / "images"))
    expected = list(ImageBatches(saved, processor(), data))
    for found, other in zip(ImageBatches(loaded, preprocessor, data), expected, strict=True):
        assert torch.equal(found["pixel_values"], other["pixel_values"])
    assert accuracy(loaded, expected) == accuracy(saved, expected)
