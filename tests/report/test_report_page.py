"""The report, read by an HTML parser as a browser would read it."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import run_config, write_checkpoint

from data_pipeline.errors import UserError
from data_pipeline.reading import events as reader_events
from pretrain.report import write_report, write_stages
from pretrain.report.charts import MOST_POINTS, Mark, Series, line_chart, number, stacked_chart
from pretrain.report.record import read_run
from pretrain.report.summary import how_good, trend
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog

VOID = {"meta", "link", "img", "br", "line", "rect", "circle", "path"}


class Page(HTMLParser):
    """Collects tags with their attributes and the text of each section; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.sections[self.section] = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture
def chain(run_dir: Path, tmp_path: Path) -> list[Path]:
    """Three runs, each but the first with the weights of the one before: by a checkpoint of it, and by an export."""
    folders = [tmp_path / name for name in ("pairs", "in22k", "in1k")]
    starts = (None, folders[0] / "checkpoints/step-00000400", "exports/in22k/model.safetensors")
    for folder, start in zip(folders, starts, strict=True):
        shutil.copytree(run_dir, folder)
        with open(folder / "config.yaml", "a") as file:
            file.write("" if start is None else f"initialize_from: {start}\n")
    return folders


def test_stages_stand_on_one_page_with_what_each_started_from(chain):
    written = write_stages(chain)
    assert written == chain[-1] / "stages.html"
    page = Page(written.read_text(encoding="utf-8"))
    test_nothing_is_fetched_and_nothing_is_run(page)
    assert len(page.sections) == len([1 for tag, _ in page.tags if tag == "section"]), "each anchor once"
    assert {"scores", "together", "curves-1", "curves-3", "settings-2"} <= set(page.sections)
    for name in ("pairs", "in22k", "in1k"):
        assert f"{name}: Fine-tuned classification" in page.sections["scores"]
        assert name in page.sections["together"]
    text = written.read_text(encoding="utf-8")
    head = text[text.index('<ol class="stages">') : text.index('<section id="scores">')]
    assert head.count('<dl class="answers">') == 3 and "starts from random weights" in head
    assert "starts from the stage before (step-00000400)" in head
    assert "starts from the stage before (model.safetensors)" in head and "Note:" not in head


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 2)])
def test_a_stage_that_did_not_start_from_the_one_before_is_said_so(order, chain):
    text = write_stages([chain[place] for place in order], chain[0] / "out.html").read_text(encoding="utf-8")
    assert text.count("Note: it starts from") == sum(b != a + 1 for a, b in pairwise(order))


def test_a_stage_named_twice_is_refused(chain):
    with pytest.raises(UserError, match="named twice"):
        write_stages([chain[0], chain[1], chain[0] / "."])


def test_every_section_of_a_whole_run_is_there(page):
    assert list(page.sections) == ["scores", "samples", "curves", "inner-runs", "events", "settings"]
    assert "CC BY-SA 4.0" in page.sections["samples"]
    inner = page.sections["inner-runs"]
    assert "finetune" in inner and "random/seed-0" in inner and "Top-1 accuracy on validation" in inner
    assert "preset: m3i" in page.sections["settings"] and "0.19.8" in page.sections["settings"]


@pytest.mark.parametrize("kind", EventKind)
def test_an_event_has_the_colour_of_what_it_tells(tmp_path: Path, kind: EventKind) -> None:
    news = {
        "good": {"checkpoint", "validated", "done"},
        "stopped": {"stopped"},
        "resumed": {"resume"},
        "plain": {
            *("start", "notice", "initialized", "synchronous_checkpoints", "incomplete_sample", "inexact_order"),
            *("config_changed", "checkpoint_copied"),
        },
    }
    expected = next((colour for colour, kinds in news.items() if kind.value in kinds), "bad")
    EventLog(tmp_path, 0)(kind, step=3, message="what happened")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert [attrs["class"] for attrs in page.all("i") if "dot" in str(attrs.get("class"))] == [f"dot {expected}"]


def test_every_kind_that_the_reader_records_is_known() -> None:
    written = {value for name, value in vars(reader_events).items() if name.isupper() and isinstance(value, str)}
    assert written and written <= set(EventKind)


def test_nothing_is_fetched_and_nothing_is_run(page):
    assert not page.all("script") and not page.all("iframe") and not page.all("object") and not page.all("base")
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")], f"handler on <{tag}>"
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            if name in attrs:
                assert str(attrs[name]).startswith("data:"), f"<{tag} {name}={attrs[name]!r}>"
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in policies[0]


def test_styles_import_nothing(run_dir):
    style = re.search(r"<style>(.*?)</style>", write_report(run_dir).read_text(), re.S).group(1)
    assert "@import" not in style and "url(" not in style
    assert style.count("{") == style.count("}") and "prefers-color-scheme: dark" in style


def test_every_drawing_is_well_formed_xml(run_dir):
    drawings = re.findall(r"<svg.*?</svg>", write_report(run_dir).read_text(), re.S)
    assert len(drawings) > 10
    for drawing in drawings:
        for element in xml.fromstring(drawing).iter():
            for name, value in element.attrib.items():
                assert "nan" not in value and "inf" not in value, (element.tag, name, value)


def test_each_score_stands_beside_its_chance_and_baselines(page):
    text = re.sub(r"[\s\xa0]+", " ", page.sections["scores"])
    for shown in (
        "12.0 %",
        "0.5 %",
        "63.0 %",
        "11.1 %",
        "20.0 %",
        "55.0 %",
        "largest category",
        "8.0 % – 17.0 %",
    ):
        assert shown in text, shown
    assert "×" not in text, "a multiple of chance flatters what a constant answer can reach"


def test_the_head_of_the_page_answers_what_a_reader_asks_first(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    answers = text[text.index('<dl class="answers">') : text.index('<dl class="tiles">')]
    for told in (
        "51,200 images seen",
        "images of 64 px",
        "Image-text retrieval, image to text, recall@1: 12.0 %, above untrained (0.6 %)",
        "Fine-tuned classification, top-1 accuracy: 63.0 %, above from random weights (55.0 %)",
        "loss falling: ",
        "finetune: best on validation 52.0 % at step 120 of 120",
        "bad sample: 1",
        "stopped and resumed once",
    ):
        assert told in answers, told


@pytest.mark.parametrize(
    ("value", "interval", "verdict"),
    [(0.5, [0.4, 0.6], "above"), (0.5, [0.2, 0.7], "not told apart from"), (0.1, [0.05, 0.15], "below")],
)
def test_a_score_is_judged_by_the_best_of_its_baselines(value, interval, verdict):
    beside = {"constant answer": 0.3, "untrained": 0.01}
    score = {"name": "a", "title": "a", "value": value, "interval": interval, "chance": 0.02, "beside": beside}
    (line,) = how_good([{"name": "r", "title": "R", "scores": [score]}])
    assert f", {verdict} constant answer" in line


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([10 - 0.1 * i for i in range(50)], "falling"),
        ([2 + 0.1 * math.sin(9 * i) for i in range(50)], "level"),
        ([2 + 0.05 * i for i in range(50)], "rising"),
        ([1.0] * 5, "too early"),
        ([1.0] * 20 + [math.nan], "not finite in 1 of 21"),
    ],
)
def test_a_trend_is_told_where_it_is_more_than_noise(losses, word):
    assert word in trend(range(len(losses)), losses)


def test_a_confusion_table_shades_shares_of_its_rows(page, run_dir):
    cells = [attrs.get("style") for attrs in page.all("td") if "--share" in str(attrs.get("style"))]
    assert cells == ["--share:70%", "--share:30%", "--share:18%", "--share:82%"]


def test_bands_stack_up_to_the_sum():
    svg = stacked_chart([Series("a", [0, 10], [1, 2]), Series("b", [0, 10], [3, 2])], unit="loss")
    lower, upper = (
        e.get("d") for e in xml.fromstring(svg[: svg.index("<ul")]).iter("path") if e.get("class") == "band"
    )
    tops = [float(point.split()[1]) for point in re.split("[MLZ]", upper)[1:3]]
    assert tops[0] == tops[1], "1 + 3 = 2 + 2"
    assert re.split("[MLZ]", lower)[1:3] == re.split("[MLZ]", upper)[4:2:-1], "b stands on a"
    assert stacked_chart([Series("a", [0, 1], [1, -1]), Series("b", [0, 1], [1, 1])], unit="loss") == ""


def test_what_the_newest_checkpoint_says_is_at_the_head(tmp_path):
    module = torch.nn.ModuleDict({"image": torch.nn.Linear(1000, 300), "text": torch.nn.Linear(100, 1000)})
    write_checkpoint(tmp_path, run_config(), module)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    text = write_report(tmp_path).read_text()
    assert "animals (160 samples)" in text
    assert "0.3 M parameters in the image model, 0.1 M beside it" in text


def test_right_captions_are_marked_and_wrong_ones_are_not(page):
    right = [attrs for attrs in page.all("li") if attrs.get("class") == "right"]
    assert len(right) == 2  # "green circle" and "red circle <symbol>"; the other two pictures have none
    assert "red circle <symbol>" in page.sections["samples"]
    assert len(page.all("img")) == 4
    places = re.findall(r"its own: place (\d+) of 190", page.sections["samples"])
    assert places == ["1", "2", "41", "41"], "also where a tick stands: the list may end before the true caption"
    assert "cut to the centre square" in page.sections["samples"]


def test_text_from_the_data_cannot_become_markup(run_dir):
    path = run_dir / "evaluation/retrieval.json"
    result = json.loads(path.read_text())
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    result["title"] = result["attribution"] = result["examples"][0]["caption"] = attack
    result["examples"][0]["retrieved"][0]["caption"] = attack
    result["examples"][1]["image"] = 'https://example.org/x.png" onload="alert(1)'
    path.write_text(json.dumps(result))
    (run_dir / "config.yaml").write_text("model: {name: '<b>bold</b>'}")
    page = Page(write_report(run_dir).read_text())
    test_nothing_is_fetched_and_nothing_is_run(page)
    assert len(page.all("img")) == 3
    assert attack in page.sections["samples"]


def test_a_stop_and_a_resume_are_marked_on_every_curve(page):
    marks = [a["class"] for a in page.all("line") if str(a.get("class")).startswith("mark")]
    charts = 10  # loss, its parts twice, accuracy, rate, throughput, time, gradient, memory, and rank below
    assert marks.count("mark stopped") == charts and marks.count("mark resumed") == charts


def test_a_young_run_has_a_report_of_what_it_has(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    page = Page(write_report(tmp_path).read_text())
    assert list(page.sections) == ["curves"]
    assert len(page.all("circle")) == 1  # a single point shows as a dot


def test_a_run_without_metrics_shows_its_events(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time": "2026-01-01T10:00:00", "kind": "start"}\nnot json\n[1]\n')
    assert list(Page(write_report(tmp_path).read_text()).sections) == ["events"]


def test_broken_files_are_left_out(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/a.json").write_text("{")
    (tmp_path / "evaluation/b.json").write_text('{"scores": [{"name": "x", "value": NaN}]}')
    (tmp_path / "config.yaml").write_text("a: [1")
    (tmp_path / "environment.json").write_text('{"torch": "2"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert list(Page(write_report(tmp_path).read_text()).sections) == ["settings"]


def test_a_malformed_result_is_shown_as_far_as_it_goes(run_dir):
    bad = {
        "scores": [7, {"name": "a", "value": 0.5, "interval": [0.1]}, {"name": "b", "value": None}],
        "per_class": {"x": 3, "y": {"value": 0.25}, "z": {"value": 0.75, "samples": 4}},
        "examples": [{"retrieved": 4}, {"retrieved": [{"score": 1}]}, {"retrieved": [{"caption": "kept"}], "place": 9}],
    }
    (run_dir / "evaluation/bad.json").write_text(json.dumps(bad))
    page = Page(write_report(run_dir).read_text())
    assert "kept" in page.sections["samples"] and "75.0\xa0%" in page.sections["scores"]
    assert "50.0\xa0%" in page.sections["scores"]


def test_a_folder_that_is_no_run_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_steps_told_twice_after_a_resume_count_once_and_the_later_counts(tmp_path):
    rows = [{"step": s, "loss": v} for s, v in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 8.5), (3, 7.5), (4, 6.0)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_run(tmp_path).series("loss") == ([1.0, 2.0, 3.0, 4.0], [9.0, 8.5, 7.5, 6.0])


def test_writing_again_replaces_the_page_and_leaves_no_partial(run_dir):
    first = write_report(run_dir).read_text()
    assert write_report(run_dir).read_text() == first
    assert not list(run_dir.glob("*.partial"))


def test_a_line_goes_through_its_points():
    svg = xml.fromstring(line_chart([Series("a", [0, 10], [0, 1])], unit=""))
    (path,) = (e for e in svg.iter("path") if e.get("class") == "line")
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in re.split("[ML]", path.get("d"))[1:])
    assert (x0, x1) == (58, 506)
    assert y0 == pytest.approx(212) and y1 == pytest.approx(12 + 200 * 0.05 / 1.05, abs=0.1)  # 5 % of room above


def test_a_gap_in_the_values_is_a_gap_in_the_line():
    svg = line_chart([Series("a", range(5), [1, 2, math.nan, 2, 1])], unit="")
    assert svg.count("M") == 2


def test_a_long_run_is_drawn_with_a_bounded_number_of_points():
    svg = line_chart([Series("a", range(100_000), [math.sin(i / 9000) for i in range(100_000)])], unit="")
    assert len(re.findall("[ML]", svg)) <= 2 * MOST_POINTS


def test_marks_outside_the_curve_are_not_drawn():
    assert "mark" not in line_chart([Series("a", [0, 1], [0, 1])], marks=[Mark(7, "late")], unit="")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12345, "12,345"), (0.25, "0.25"), (2.5e-5, "2.5e-5"), (1e-4, "1e-4"), (-3, "-3")]
)
def test_numbers_read_short(value, text):
    assert number(value) == text
