"""Retrieval, zero-shot, top-1 and the linear probe on a set whose right answers are known."""

import itertools
import json
import math

import pytest
import torch
from evaluation_shapes import COLOURS, Painter, colour_tokens, write_set

from data_pipeline.errors import UserError
from pretrain.evaluation import (
    linear_probe,
    put_beside,
    read_results,
    retrieval,
    summary,
    top1,
    value_of,
    write_result,
    zero_shot,
)
from pretrain.evaluation.classification import prompts_of
from pretrain.evaluation.probe import fit_logistic
from pretrain.evaluation.retrieval import baselines
from pretrain.evaluation.sets import describe_set
from pretrain.tasks.class_names import rows_by_name


def test_a_model_that_knows_the_colours_retrieves_all(painter, shapes, config):
    result = retrieval(painter, shapes, config, tokenizer=colour_tokens, ks=(1, 2), batch_size=5)
    assert [value_of(result, f"{way}_recall@{k}") for way in ("image_to_text", "text_to_image") for k in (1, 2)] == [
        1
    ] * 4
    chance = {entry["name"]: entry["chance"] for entry in result["scores"]}
    assert chance["image_to_text_recall@1"] == pytest.approx(1 / 3)  # three different captions, not twelve
    assert chance["text_to_image_recall@2"] == pytest.approx(
        1 - math.comb(8, 2) / math.comb(12, 2)
    )  # any of four is right
    assert (result["samples"], result["captions"], result["set"]) == (12, 3, "held-out")
    assert result["attribution"] == "drawn by this test"


def test_examples_are_evenly_spaced_and_carry_picture_and_marks(painter, shapes, config):
    result = retrieval(painter, shapes, config, tokenizer=colour_tokens, examples=3, batch_size=5)
    captions = [f"{c} circle" for c in COLOURS] * 4
    assert [e["caption"] for e in result["examples"]] == [captions[i] for i in (2, 6, 10)]
    for example in result["examples"]:
        assert example["image"].startswith("data:image/png;base64,")
        assert [f["correct"] for f in example["retrieved"]] == [True, False, False]
        assert example["retrieved"][0]["caption"] == example["caption"]
        assert (example["place"], example["candidates"]) == (1, 3)


def test_a_collapsed_model_scores_chance_in_everything(painter, shapes, config):
    painter.encode_image = painter.classify = lambda images: torch.ones(len(images), 3)
    for result in (
        retrieval(painter, shapes, config, tokenizer=colour_tokens),
        zero_shot(painter, shapes, config, tokenizer=lambda texts: torch.ones(len(texts), 3)),
        top1(painter, shapes, config, classes=tuple(COLOURS)),
    ):
        for entry in result["scores"]:
            assert entry["value"] == pytest.approx(entry["chance"]), entry["name"]


def test_zero_shot_takes_the_class_whose_name_is_nearest(painter, shapes, config):
    result = zero_shot(painter, shapes, config, tokenizer=colour_tokens, templates=("{}", "a {} thing"))
    assert value_of(result, "top1") == 1
    assert result["scores"][0]["beside"] == {"largest category": pytest.approx(1 / 3)}
    shuffled = zero_shot(painter, shapes, config, tokenizer=lambda texts: colour_tokens(texts).roll(1, 1))
    assert value_of(shuffled, "top1") == 0


def test_prompts_put_each_name_into_each_template():
    assert prompts_of(["cat", "dog"], ["{}", "a {}."]) == ["cat", "a cat.", "dog", "a dog."]
    for wrong in ([], ["no place"], ["{} {}"]):
        with pytest.raises(UserError, match="template"):
            prompts_of(["cat"], wrong)


def test_top1_counts_the_right_class_and_reports_each(painter, shapes, config):
    painter.classify = lambda images: painter.encode_image(images) * torch.tensor([1.0, 1.0, -1.0])  # never blue
    result = top1(painter, shapes, config, classes=tuple(COLOURS))
    assert value_of(result, "top1") == pytest.approx(2 / 3)
    assert {name: row["value"] for name, row in result["per_class"].items()} == {"red": 1, "green": 1, "blue": 0}


@pytest.mark.parametrize("rows", list(itertools.permutations(COLOURS)))
def test_labels_of_a_set_in_any_order_are_matched_by_name(rows, painter, tmp_path, config):
    """The painter's rows are red, green, blue: named otherwise, what is right is what those names say."""
    folder = write_set(tmp_path / "set", classes=("blue", "green", "red"))
    result = top1(painter, folder, config, classes=rows)
    right = [name for name, colour in zip(rows, COLOURS, strict=True) if name == colour]
    assert {name: row["value"] for name, row in result["per_class"].items()} == {c: float(c in right) for c in rows}


def test_a_set_may_lack_classes_of_the_model_but_not_have_others(painter, tmp_path, config):
    painter.classify = lambda images: torch.nn.functional.pad(painter.encode_image(images), (0, 1), value=-9.0)
    fewer = write_set(tmp_path / "fewer")
    assert value_of(top1(painter, fewer, config, classes=(*COLOURS, "grey")), "top1") == 1
    named = top1(painter, fewer, config, classes=tuple(COLOURS))  # and a row that no class of the data has trained
    assert named["classes"] == 4 and value_of(named, "top1") == 1
    renamed = write_set(tmp_path / "renamed", classes=("red", "green", "azure"), labels=("red", "green", "azure"))
    message = r"1 of 3 classes.*: azure\n.*\(3\): red, green, azure\n.*the model \(3\): red, green, blue"
    with pytest.raises(UserError, match=message):
        top1(painter, renamed, config, classes=tuple(COLOURS))
    with pytest.raises(UserError, match="names no classes"):
        top1(painter, fewer, config, classes=None)


def test_long_lists_of_classes_are_cut_to_ten():
    numbers = [str(n) for n in range(25)]
    with pytest.raises(UserError) as error:
        rows_by_name(["x", *numbers[:12]], numbers, have="the model")
    assert str(error.value).splitlines() == [
        "13 of 25 classes are not among those of the model: 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, ... and 3 more",
        "  wanted (25): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... and 15 more",
        "  the model (13): x, 0, 1, 2, 3, 4, 5, 6, 7, 8, ... and 3 more",
    ]


def test_equal_class_names_are_told_apart_for_labels_and_kept_for_prompts(tmp_path):
    folder = write_set(tmp_path / "set", classes=("red", "green", "blue", "green"))
    about = describe_set(folder)
    assert about.classes == ("red", "green", "blue", "green")
    assert about.distinct == ("red", "green #1", "blue", "green #3")


def test_a_classifier_of_another_width_is_refused(painter, tmp_path, config):
    folder = write_set(tmp_path / "set", classes=("blue", "grey", "green", "red"))
    with pytest.raises(UserError, match=r"4 classes are named.*3 rows"):
        top1(painter, folder, config, classes=("blue", "grey", "green", "red"))


def test_a_set_without_captions_is_refused(painter, tmp_path, config):
    with pytest.raises(UserError, match="no sample has a caption"):
        retrieval(painter, write_set(tmp_path / "set", captions=False), config, tokenizer=colour_tokens)


def test_evaluation_leaves_the_training_mode_as_it_was(painter, shapes, config):
    painter.train()
    painter.frozen = torch.nn.Dropout().eval()
    top1(painter, shapes, config, classes=tuple(COLOURS))
    assert painter.training and not painter.frozen.training


def test_the_linear_probe_learns_what_is_linear(painter, shapes, tmp_path, config):
    validation = write_set(tmp_path / "validation", classes=("blue", "red", "green"))
    result = linear_probe(painter, shapes, validation, shapes, config, penalties=(1e-3, 1e3))
    assert value_of(result, "top1") == 1
    assert result["settings"]["validation_top1"] == 1 and result["settings"]["train"] == "held-out"


def test_the_logistic_fit_is_the_optimum():
    """At the minimum the gradient vanishes: sum_n (p_nc - y_nc) x_n / N + penalty W = 0."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.randint(4, (200,))
    fit = fit_logistic(x, y, 4, 0.01)
    excess = (fit(x).softmax(1) - torch.nn.functional.one_hot(y, 4)) / 200
    assert (excess.T @ x.double() + 0.01 * fit.weight).abs().max() < 1e-7
    assert excess.sum(0).abs().max() < 1e-7


def test_a_strong_penalty_leaves_only_the_class_frequencies():
    x, y = torch.randn(100, 3), torch.tensor([0] * 70 + [1] * 30)
    fit = fit_logistic(x, y, 2, 1e6)
    assert fit(x).softmax(1)[:, 0].mean() == pytest.approx(0.7, abs=1e-3)


def test_results_are_written_whole_and_read_back(tmp_path, painter, shapes, config):
    result = top1(painter, shapes, config, classes=tuple(COLOURS))
    path = write_result(tmp_path, "top1", result)
    assert path == tmp_path / "evaluation/top1.json" and list(path.parent.iterdir()) == [path]
    assert read_results(tmp_path) == {"top1": json.loads(json.dumps(result))}
    with pytest.raises(UserError, match="plain file name"):
        write_result(tmp_path, "../top1", result)


def test_another_result_can_stand_beside(painter, shapes, config):
    result = top1(painter, shapes, config, classes=tuple(COLOURS))
    worse = {"scores": [{"name": "top1", "value": 0.25}]}
    both = put_beside(result, "untrained", worse)
    assert both["scores"][0]["beside"]["untrained"] == 0.25 and "untrained" not in both["scores"][1]["beside"]
    assert "untrained" not in result["scores"][0]["beside"]
    assert summary([both])[0][:3] == ("Classification: top-1 accuracy", "1.000", "0.333")


def test_a_painter_is_a_painter():
    assert Painter().encode_image(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_baselines_are_what_answers_without_looking_score(seed):
    """Against every choice of k answers, and every order that a category allows."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(4), torch.randint(4, (5,), generator=generator)])
    labels = torch.randint(2, (9,), generator=generator)
    found = baselines(owner, labels, 4, (1, 2))
    pairs = list(zip(owner.tolist(), labels.tolist(), strict=True))
    for k in (1, 2):
        constant = max(sum(o in answer for o, _ in pairs) / 9 for answer in itertools.combinations(range(4), k))
        assert found["image_to_text", k]["constant answer"] == pytest.approx(constant)
        assert found["text_to_image", k]["constant answer"] == pytest.approx(k / 4)
        forward = [
            expected_hit([pairs.count((t, c)) for t in range(4)], [t == o for t in range(4)], k) for o, c in pairs
        ]
        assert found["image_to_text", k]["category oracle"] == pytest.approx(sum(forward) / 9)
        back = [expected_hit([pairs.count((t, c)) for _, c in pairs], [o == t for o, _ in pairs], k) for t in range(4)]
        assert found["text_to_image", k]["category oracle"] == pytest.approx(sum(back) / 4)


def expected_hit(values: list[int], right: list[bool], k: int) -> float:
    """Share of the k-element answers, among those that leave out no larger value, that hold a right one."""
    order = sorted(values, reverse=True)[:k]
    answers = [a for a in itertools.combinations(range(len(values)), k) if sorted(values[i] for i in a)[::-1] == order]
    return sum(any(right[i] for i in a) for a in answers) / len(answers)


def test_an_oracle_needs_a_label_of_every_picture(painter, shapes, config):
    owner = torch.tensor([0, 1, 1])
    assert "category oracle" not in baselines(owner, torch.tensor([0, -1, 1]), 2, (1,))["image_to_text", 1]
    beside = retrieval(painter, shapes, config, tokenizer=colour_tokens)["scores"][0]["beside"]
    assert beside == {"constant answer": pytest.approx(1 / 3), "category oracle": 1.0}  # a caption is a colour here
