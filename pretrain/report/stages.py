"""Several runs as one page, in the order in which each took up the weights of the one before: 427M pairs, then
ImageNet-22K, then ImageNet-1K.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from pretrain.report import scores, sections
from pretrain.report.charts import Series, line_chart
from pretrain.report.page import page
from pretrain.report.record import RunRecord, read_run
from pretrain.report.summary import summary

PAGE = "stages.html"
_SECTION = re.compile(r'<section id="([\w-]+)"')


def write_stages(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page over the runs in `folders`, first to last, and return its path: `output`, else stages.html in the
    last run's folder. Like a run's own page it is one file without scripts or links outwards.

    Raises UserError where a folder is no run directory, or is named twice.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice; name each stage once, first to last")
    names = stage_names([run.folder.resolve() for run in runs])
    results = [
        {**result, "title": f"{name}: {result.get('title') or result['name']}"}
        for name, run in zip(names, runs, strict=True)
        for result in run.results
    ]
    told = "".join(_stage(place, name, runs) for place, name in enumerate(names))
    body = [f'<ol class="stages">{told}</ol>', scores.scores(results), _together(names, runs)]
    body += [_details(place, name, runs[place]) for place, name in enumerate(names)]
    target = output if output is not None else runs[-1].folder / PAGE
    subtitle = " → ".join(names)
    footer = "Written by internimage report from the files of these runs"
    write_durably(target, page(names[-1], subtitle, "\n".join(body), footer))
    return target


def stage_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are alike."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [f"{f.parent.name}/{f.name}" for f in folders]


def lineage(run: RunRecord, earlier: Sequence[RunRecord]) -> tuple[str, bool]:
    """What the run started from, in words, and whether that is the stage before it (the first of all may be any)."""
    start = run.config.get("initialize_from")
    if not start:
        return "starts from random weights", not earlier
    path = Path(str(start))
    if not earlier:
        return f"starts from {path.name}", True
    before = earlier[-1].folder.resolve()
    if before == path.resolve() or before in path.resolve().parents or before.name in path.parts:
        return f"starts from the stage before ({path.name})", True
    return f"starts from {path}, which is not in the folder of the stage before", False


def _stage(place: int, name: str, runs: Sequence[RunRecord]) -> str:
    told, follows = lineage(runs[place], runs[:place])
    note = f'<p class="note{"" if follows else " notice"}">{"" if follows else "Note: it "}{escape(told)}</p>'
    return f"<li><h2>{place + 1}. {escape(name)}</h2>{note}{summary(runs[place])}</li>"


def _together(names: Sequence[str], runs: Sequence[RunRecord]) -> str:
    """Losses and validation of all stages, each from its own first step on."""
    losses = [Series(name, *run.series("loss")) for name, run in zip(names, runs, strict=True)]
    checked = [
        Series(name, [step for step, _ in run.validation], [value for _, value in run.validation])
        for name, run in zip(names, runs, strict=True)
    ]
    charts = [
        ("Loss of each stage, by its own steps", line_chart(losses, unit="loss")),
        ("Main score on validation", line_chart(checked, unit="share of samples", noisy=False)),
    ]
    drawn = "".join(f"<figure><figcaption>{title}</figcaption>{chart}</figure>" for title, chart in charts if chart)
    return f'<section id="together"><h2>The stages together</h2><div class="charts">{drawn}</div></section>'


def _details(place: int, name: str, run: RunRecord) -> str:
    """The rest of a run's own page, folded away, its anchors numbered so that each is there once."""
    parts = (sections.headline(run), sections.curves(run), sections.figures(run), sections.events(run))
    inside = _SECTION.sub(rf'<section id="\1-{place + 1}"', "".join((*parts, sections.folded(run))))
    title = f"{place + 1}. {escape(name)}: curves, events, settings"
    return f'<details><summary>{title}</summary><div class="run">{inside}</div></details>'
