"""Pruned models on disk: a folder that transformers loads as it is, or nothing."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from moonshot.files.card import model_card
from moonshot.files.compact import write_compact
from moonshot.files.draft import Draft, drafted, saving
from moonshot.files.load import Source, default_on_gpu, quiet
from moonshot.files.mapped import MappedFile
from moonshot.files.plan import check_disk
from moonshot.files.source import INDEX, check_weights, companions, weight_files
from moonshot.pruning.report import Report


def save(
    model: nn.Module,
    processor: object,
    report: Report,
    folder: str | Path,
    *,
    overwrite: bool = False,
    compact: bool = False,
) -> Path:
    """Write model, processor (of text or images, or None), model card, recipe and report to `folder`.

    Everything goes to a temporary folder beside it first, renamed at the end: a failure or a kill leaves nothing
    under the final name. The mask of a pruned layer is `weight != 0`.
    overwrite: whether a folder that moonshot wrote may be replaced.
    compact: whether to leave out the zeros: values and a bit for each weight (`load_compact`, `unpack_folder`).
    Raises FileExistsError where there is a folder, LockedError where another process writes it, or OSError with what
    to do where the disk is full or not writable.
    """
    with drafted(Path(folder), overwrite) as draft:
        return Opened(model, processor, draft).save(report, compact)


class Opened:
    """A model with its processor (of text or images), and the folder that it will be saved to.

    draft: the temporary folder that becomes `folder`; mapped: whether the weights are in its files, and not in memory.
    source: where the model is from, if its folder's other files are to go along.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: object,
        place: Draft,
        files: Sequence[MappedFile] = (),
        source: Source | None = None,
    ):
        self.model, self.processor, self.folder, self.draft = model, processor, place.final, place.path
        self._place, self._files, self._source = place, files, source

    @property
    def mapped(self) -> bool:
        return bool(self._files)

    @property
    def unwritten(self) -> int:
        """Bytes of weights that `save` still has to write, at most: those that are not mapped."""
        return 0 if self.mapped else sum(weight.nbytes for weight in self.model.parameters())

    def release(self) -> None:
        """Let the memory go that holds mapped weights, for those in use to come back."""
        for file in self._files:
            file.release()

    def replace(self, model: nn.Module) -> None:
        """Save another model in place of the one that was opened."""
        for name in [*weight_files(self.draft), INDEX]:
            (self.draft / name).unlink(missing_ok=True)
        self.model, self._files = model, ()

    def save(self, report: Report, compact: bool = False) -> Path:
        """What `save` does; mapped weights are there already. compact: whether to leave out the zeros."""
        with saving(self.folder):
            for file in self._files:
                file.flush()
            if not self.mapped:
                with quiet():
                    self.model.save_pretrained(self.draft)  # type: ignore[operator]
            if self._source is not None:
                self._take_along(self._source)
            elif self.processor is not None:
                self.processor.save_pretrained(self.draft)  # type: ignore[attr-defined]
            card = model_card(report, self._source, compact)
            (self.draft / "README.md").write_text(card, encoding="utf-8")
            (self.draft / "recipe.json").write_text(
                json.dumps(report.recipe, indent=2) + "\n", encoding="utf-8"
            )
            report.save(self.draft / "report.json")
            names = weight_files(self.draft)
            for name in names:
                check_weights(self.draft / name)
            if compact:
                write_compact(self.draft, self.draft)
                for name in [*names, INDEX]:
                    (self.draft / name).unlink(missing_ok=True)
            self._place.publish()
        return self.folder

    def _take_along(self, source: Source) -> None:
        """Copy what else the model's folder has; its configuration too, where the weights are as it describes them."""
        names = companions(source.folder, code=source.trusted)
        if self.mapped:
            names += [
                name for name in ("config.json", "generation_config.json") if (source.folder / name).is_file()
            ]
        for name in names:
            (self.draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, self.draft / name)
        if (source.folder / "README.md").is_file():
            shutil.copyfile(source.folder / "README.md", self.draft / "README.dense.md")


@contextmanager
def opened(
    name: str | Source,
    folder: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_gpu: bool | None = None,
) -> Iterator[Opened]:
    """A model of a folder or a hub name, to be pruned and saved to `folder`, which must not exist.

    It is an image classifier where its configuration says so, a causal language model otherwise. On the CPU its weights
    are mapped from copies of its safetensors files in a temporary folder beside `folder`, so that they need not fit
    into memory. On a GPU, or where the files are of another kind than the model, it is loaded. What has not been
    saved is gone afterwards.
    on_gpu: whether it is to be on a GPU as a whole; unless given, if there is one.
    overwrite: whether a folder that moonshot wrote may be replaced. trust_remote_code: whether code that comes with the
    model may run. Raises what `save` and `Source` do.
    """
    source = name if isinstance(name, Source) else Source(name, trust_remote_code)
    source.check_files()
    companions(source.folder)
    with drafted(Path(folder), overwrite) as draft:
        found = None if default_on_gpu(on_gpu) else _mapped(source, draft)
        yield found or Opened(source.load(on_gpu), source.processor, draft, source=source)


def _mapped(source: Source, draft: Draft) -> Opened | None:
    """None where what a model saves are not all tensors of its safetensors files."""
    kind, names = source.model_class, weight_files(source.folder)
    if kind is None or not names or getattr(source.config, "quantization_config", None):
        return None
    files = [*names, INDEX] if (source.folder / INDEX).is_file() else names
    check_disk({draft.path: sum((source.folder / name).stat().st_size for name in files)})
    with saving(draft.final):
        for name in files:
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, draft.path / name)
    try:
        maps = [MappedFile(draft.path / name) for name in names]
        tensors = {key: tensor for file in maps for key, tensor in file.tensors.items()}
        with quiet():
            model, found = kind.from_pretrained(
                None, config=source.config, state_dict=tensors, dtype="auto", output_loading_info=True
            )
        places = {(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors.values()}
        if all((t.data_ptr(), t.dtype, t.shape) in places for t in model.state_dict().values()):
            source.say_unread(kind, found, "saved as they are")
            source.set_generation(model)
            return Opened(model, source.processor, draft, maps, source)
    except Exception:  # whatever a library raises for a folder of this kind
        pass  # loading it says what is wrong, if anything is
    for name in files:
        (draft.path / name).unlink()
    return None
