"""Models on disk: the old name of what is in moonshot.files, which stays."""

from moonshot.files.folder import Opened, opened, save
from moonshot.files.load import is_image_classifier, load, load_classifier
from moonshot.files.text import read_text

__all__ = ["Opened", "is_image_classifier", "load", "load_classifier", "opened", "read_text", "save"]
