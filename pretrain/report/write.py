"""A run directory in, `report.html` out."""

from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from pretrain.report import scores, sections
from pretrain.report.page import page
from pretrain.report.predictions import predictions
from pretrain.report.record import RunRecord, read_run
from pretrain.report.summary import summary


def write_report(run_dir: Path | str, output: Path | None = None) -> Path:
    """Write `output`, by default `run_dir/report.html`, from what the directory holds now, and return its path.

    The page is one file without scripts or links outwards; it can be mailed. A young or broken run gives a page with
    the sections that it has records for. Raises UserError where `run_dir` is not a run directory.
    """
    run = read_run(Path(run_dir))
    body = "\n".join(
        part
        for part in (
            summary(run),
            sections.headline(run),
            scores.scores(run.results),
            scores.samples(run.results),
            predictions(run.results),
            sections.curves(run),
            sections.figures(run),
            sections.inner_runs(run),
            sections.events(run),
            sections.folded(run),
        )
        if part
    )
    text = page(run.folder.resolve().name, _subtitle(run), body, _footer(run))
    target = output if output is not None else run.folder / "report.html"
    write_durably(target, text)  # whoever reloads the page meanwhile must find the old one or the new one
    return target


def _subtitle(run: RunRecord) -> str:
    """Model, objective, image size and devices in one line, as far as they are known."""

    def at(*path: str) -> Any:
        node: Any = run.config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        return node

    size = at("data", "image_size")
    stage, precision = at("training", "zero_stage"), at("training", "precision")
    ranks = run.environment.get("ranks")
    facts = [
        at("model", "name"),
        f"{at('task', 'preset') or at('task', 'name')}" if at("task") else None,
        f"{size} × {size} px" if size else None,
        f"ZeRO-{stage}" if stage is not None else None,
        precision,
        f"{ranks} ranks" if isinstance(ranks, int) and ranks > 1 else None,
    ]
    return " · ".join(str(fact) for fact in facts if fact)


def _footer(run: RunRecord) -> str:
    packages = run.environment.get("packages")
    known = packages if isinstance(packages, dict) else {}
    facts = [f"{name} {known[name]}" for name in ("internimage-pretrain", "torch", "deepspeed") if known.get(name)]
    return " · ".join(["Written by internimage report from the files of this run", *facts])
