"""`internimage predict`: single pictures through a fine-tuned run.

FOLDER/NAME.png          the picture with what the task says of it; NAME.jpg.png where another picture has its name
FOLDER/NAME.labels.png   the class of every pixel, of a task that gives one
FOLDER/predictions.json  COCO's results: [{"image_id", "category_id", "bbox"?, "score", "segmentation"?}, ...]
FOLDER/pictures.json     {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}]}
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from data_pipeline.format.index import IMAGE_EXTENSIONS
from data_pipeline.reading.decode.pixels import BadSample
from pretrain.evaluation.dense.objects import category_ids
from pretrain.evaluation.encoding import inference
from pretrain.evaluation.loading import load_module
from pretrain.tasks.task import task_of
from pretrain.training.checkpoint.disk import AUTO

PREDICTIONS, PICTURES = "predictions.json", "pictures.json"
_log = logging.getLogger(__name__)


def predict_pictures(
    checkpoint: Path | str,
    images: Sequence[Path],
    to: Path,
    *,
    least: float = 0.5,
    choice: str = AUTO,
    which: str = "ema",
    say: Callable[[str], None] = _log.info,
) -> int:
    """Writes what the run's task says of each picture into `to`; the number of pictures.

    images: files, or folders whose pictures are taken. least: objects of a lower score are not drawn, but in the JSON.
    Raises UserError for a picture that cannot be read, where the task predicts nothing, and where two pictures would
    have one name in `to`, or a picture itself be written over.
    """
    loaded = load_module(checkpoint, which, choice)
    task, names = task_of(loaded.config), loaded.classes or ()
    say(f"predicting: {loaded.checkpoint.path}, {loaded.checkpoint.title}, {loaded.checkpoint.weights_title(which)}")
    sources = loaded.checkpoint.trained_on.sources
    ids = category_ids(sources[0].about if len(sources) == 1 else {}, len(names))
    found = list(dict.fromkeys(_files(images)))
    if not found:
        raise UserError(f"no picture among {', '.join(map(str, images))}; name image files, or folders of them")
    targets = _targets(found, to)
    results: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    to.mkdir(parents=True, exist_ok=True)
    with inference(loaded.module):
        for number, ((path, name), target) in enumerate(zip(found, targets, strict=True), 1):
            try:
                made = task.predict(
                    loaded.module,
                    path.read_bytes(),
                    loaded.config,
                    classes=names,
                    image_id=number,
                    categories=ids,
                    least=least,
                )
            except BadSample as bad:
                raise UserError(f"{path}: cannot be read as a picture: {bad}") from None
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(made.drawn).save(target)
            if made.label_map is not None:
                Image.fromarray(made.label_map).save(_label_map_of(target))
            results += made.results
            height, width = made.drawn.shape[:2]
            pictures.append({"id": number, "file_name": name.as_posix(), "width": width, "height": height})
    categories = [{"id": one, "name": name} for one, name in zip(ids, names, strict=False)]
    write_durably(to / PREDICTIONS, json.dumps(results) + "\n")
    write_durably(to / PICTURES, json.dumps({"images": pictures, "categories": categories}, indent=1) + "\n")
    return len(pictures)


def _files(images: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(file, its name in the output) of every picture."""
    for path in images:
        if not path.exists():
            raise UserError(f"{path}: no such picture or folder")
        if path.is_file():
            yield path, Path(path.name)
            continue
        for file in sorted(path.rglob("*")):
            if file.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and file.is_file():
                yield file, file.relative_to(path)


def _targets(found: Sequence[tuple[Path, Path]], to: Path) -> list[Path]:
    """The file that each picture is drawn into. Raises UserError where that cannot be without a loss."""
    short = [(to / name).with_suffix(".png") for _, name in found]
    shared = {target for target, times in Counter(short).items() if times > 1}
    targets = [to / f"{name}.png" if one in shared else one for (_, name), one in zip(found, short, strict=True)]
    owners: dict[Path, Path] = {}
    inputs = {path.resolve() for path, _ in found}
    for (path, _), target in zip(found, targets, strict=True):
        for file in (target, _label_map_of(target)):
            if (other := owners.setdefault(file, path)) != path:
                raise UserError(f"{other} and {path} would both be drawn into {file}; predict them apart (--to)")
            if file.resolve() in inputs:
                raise UserError(f"{path}: its prediction would be written over the picture {file}; name another --to")
    return targets


def _label_map_of(target: Path) -> Path:
    return target.with_suffix(".labels.png")
