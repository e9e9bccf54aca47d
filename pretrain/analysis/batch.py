"""The samples of one step of a run: where they came from, and how training saw them (`internimage inspect batch`)."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_pipeline.errors import UserError
from data_pipeline.reading import Batch, ImageText, ImageTextTargets, Reader
from data_pipeline.reading.events import BAD_SAMPLE, INCOMPLETE_SAMPLE, read_jsonl
from pretrain.configuration import RunConfig, load_config
from pretrain.training.segments import read_segments

_SHOWN = 64
_COLUMNS = 8
_TEXT = 26  # pixels under each pair of views


def inspect_batch(run: Path | str, step: int, *, output: Path | None = None, shown: int = _SHOWN) -> dict[str, Any]:
    """The global batch of `step` of the run in `run`: {"run", "step", "samples": [...], "pictures": path}.

    Each sample has position, source, epoch, shard, row, key, url, caption, label, sha256, and, where the run's events
    say that it was bad, `bad` (the reasons) and `replaced_by` (shard, row, key, url, caption, label, sha256 of the one
    that was used); `incomplete` says what the used one lacked. The first `shown` are drawn, their views side by side,
    to `output` (default: `run/batch-STEP.png`). Raises UserError where `run` is no run directory or its sets are gone.
    """
    run = Path(run)
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml")
    config = load_config(str(file))
    with _reader(config, run) as reader:
        samples = reader.records(step)
        faults = _faults(run / "events.jsonl", step)
        for sample in samples:
            sample.update(faults.get(sample["position"], {}))
            if sample.get("replaced_by"):
                sample["replaced_by"] = reader.record(sample["source"], **sample["replaced_by"])
        seen = reader.at(reader.positions(step)[:shown])
    output = output or run / f"batch-{step:08d}.png"
    contact_sheet(seen, samples).save(output)
    return {"run": str(run), "step": step, "pictures": str(output), "samples": samples}


def contact_sheet(batch: Batch[ImageTextTargets], samples: list[dict[str, Any]]) -> Image.Image:
    """The views of each row side by side, its caption or label and its key below."""
    rows, views, size = batch.views.shape[:3]
    width, height = views * size + 4, size + _TEXT + 4
    columns = min(rows, max(1, _COLUMNS // views))
    sheet = Image.new("RGB", (columns * width, -(-rows // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        x, y = row % columns * width, row // columns * height
        for view in range(views):
            sheet.paste(Image.fromarray(batch.views[row, view].numpy()), (x + view * size, y))
        sample = samples[row].get("replaced_by") or samples[row]  # what the picture shows
        letters = (width - 6) // 6
        for line, text in enumerate((sample["caption"] or sample["label"] or "", f"{sample['shard']} {sample['key']}")):
            plain = str(text).encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font can draw
            draw.text((x + 2, y + size + 1 + 12 * line), plain[:letters], fill="black")
    return sheet


def _reader(config: RunConfig, run: Path) -> Reader[ImageTextTargets]:
    data = config.data.model_copy(update={"workers": 0, "max_bad_rate": 1.0})
    return Reader(
        data,
        ImageText(),
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        segments=read_segments(run),
    )


def _faults(events: Path, step: int) -> dict[int, dict[str, Any]]:
    """What the run recorded about the samples of `step`, by position: `bad`, its reasons, and `replaced_by`, of one
    that was not used; `incomplete`, of one that was used without something, which may be the one that replaced it."""
    found: dict[int, dict[str, Any]] = {}
    for event in read_jsonl(events):
        word = {BAD_SAMPLE: "bad", INCOMPLETE_SAMPLE: "incomplete"}.get(str(event.get("kind")))
        if word is None or event.get("step") != step:
            continue
        fault = found.setdefault(event["position"], {})
        reasons = fault.get(word, "").split(", ") if word in fault else []
        fault[word] = ", ".join(dict.fromkeys([*reasons, event["reason"]]))  # a resumed run says it again
        if word == "bad":
            fault["replaced_by"] = event.get("replaced_by")
    return found
