"""Zero-shot classification: classes read from files, the mean over templates, and scores with ties."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from mmpretrain.data.classes import Classes, read_classes
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.evals.embeddings import embed_texts
from mmpretrain.evals.zero_shot import ZeroShot
from mmpretrain.reporting import pictures
from tests.evals.held_out import LABELS, TOKENIZER, make_context, make_model, make_set

TSV = 'id\tlabel\tname\ttext\n0\tred_fox\tred fox\ta fox, "red"\n1\telk\telk\tan elk\'s photo\n'


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    path = tmp_path / "classes.tsv"
    path.write_text(TSV)
    return path


def test_classes_of_a_tsv_fill_open_clips_templates(tsv: Path) -> None:
    classes = read_classes(tsv)
    assert classes.names == ["red_fox", "elk"]
    assert classes.texts == [[fill(name) for fill in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in classes.names]
    assert len(classes.texts[0]) == 80 and "a bad photo of a red_fox." in classes.texts[0]


def test_classes_are_named_by_the_column_that_is_asked_for(tsv: Path) -> None:
    assert read_classes(tsv, class_column="name").names == ["red fox", "elk"]


def test_simple_templates_are_open_clips_seven(tsv: Path) -> None:
    texts = read_classes(tsv, templates="simple").texts
    assert texts[1] == [fill("elk") for fill in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert len(texts[1]) == 7


def test_templates_of_ones_own_take_the_name_where_the_braces_are(tsv: Path) -> None:
    texts = read_classes(tsv, templates=["a {}.", "{}, drawn"]).texts
    assert read_classes(tsv, templates=["{x} {}}"]).texts[0] == [f"{{x}} {read_classes(tsv).names[0]}}}"]
    assert texts == [["a red_fox.", "red_fox, drawn"], ["a elk.", "elk, drawn"]]


def test_texts_of_ones_own_are_used_as_they_are(tsv: Path) -> None:
    classes = read_classes(tsv, text_column="text")
    assert classes == Classes(["red_fox", "elk"], [['a fox, "red"'], ["an elk's photo"]])


def test_a_plain_list_has_one_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("red fox\n\nelk \n")
    assert read_classes(path, templates=["{}"]) == Classes(["red fox", "elk"], [["red fox"], ["elk"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_column": "lable"}, r"classes.tsv has no column 'lable'; it has: id, label, name, text$"),
        ({"text_column": "txt"}, r"classes.tsv has no column 'txt'; it has: id, label, name, text$"),
        (
            {"templates": "opnai"},
            r"^templates is 'opnai'; expected openai, simple, clip:NAME, or a list of sentences with \{\}",
        ),
        ({"templates": ["a photo"]}, r"^templates is \['a photo'\]; expected sentences, each with \{\} where"),
        ({"templates": []}, r"^templates is \[\]; expected sentences"),
        ({"templates": 5}, r"^templates is 5; expected sentences"),
    ],
)
def test_wrong_columns_and_templates_are_refused_in_one_line(tsv: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_classes(tsv, **arguments)


@pytest.mark.parametrize(
    ("content", "text_column", "message"),
    [
        (None, None, r"which is no file; expected a TSV with a header or one name a line"),
        ("", None, r"names no class; expected at least one"),
        ("label\ttext\n", None, r"names no class; expected at least one"),
        ("cat\ndog\n", "text", r"has no columns; expected a TSV with a header"),
        ("label\ttext\ncat\ta cat\ndog\n", "text", r"classes: 'dog' has no 'text'; expected a value in each line$"),
        ("text\tlabel\na cat\tcat\na dog\n", None, r"classes: a class has no 'label'; expected a value in each line$"),
    ],
)
def test_files_without_classes_are_refused_in_one_line(
    tmp_path: Path, content: str | None, text_column: str | None, message: str
) -> None:
    path = tmp_path / "classes"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_classes(path, text_column=text_column)
    assert "\n" not in str(error.value)


def test_scores_are_counted_with_ties_against_the_model() -> None:
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 0: first
            [0.9, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6],  # 0: a tie is no hit, but among five
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 4: fourth
            [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],  # 4: a model that says the same of all
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 3: fifth
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # 2: sixth
            [0.1, 0.1, 0.9, 0.3, 0.4, 0.5, 0.6],  # 2: first
            [float("nan")] * 7,  # 2: no numbers
        ]
    )
    labels = torch.tensor([0, 0, 4, 4, 3, 2, 2, 2])
    scores = class_scores(right_class_ranks(similarity, labels), labels, 7)
    # Classes 1, 5 and 6 have no image, and no recall that could enter the mean.
    assert scores == pytest.approx({"acc1": 2 / 8, "acc5": 5 / 8, "mean_per_class_recall": (1 / 2 + 1 / 3 + 0 + 0) / 4})


@pytest.mark.parametrize("num_classes", [2, 5, 6])
def test_accuracy_at_five_is_of_more_than_five_classes(num_classes: int) -> None:
    labels = torch.arange(20) % num_classes
    scores = class_scores(right_class_ranks(torch.zeros(20, num_classes), labels), labels, num_classes, "x_")
    assert scores == {"x_acc1": 0, "x_mean_per_class_recall": 0, **({"x_acc5": 0} if num_classes > 5 else {})}


@torch.no_grad()
def test_a_class_is_the_mean_of_its_templates_embeddings(tmp_path: Path) -> None:
    texts = [["a cat", "a photo of one small cat"], ["a dog"], ["an ant", "ants", "the ant of all ants"]]
    data = make_set(tmp_path, label="json.label", classes=Classes(LABELS, texts))
    model = make_model()
    context = make_context(model, data)
    scores = ZeroShot()("val", context)
    images = context.embedded("val").images
    hits, by_class = [], {}
    means = []
    for group in texts:
        mean = sum(embed_texts(model, TOKENIZER, [text], 1)[0] for text in group) / len(group)
        means.append(mean / mean.norm())
    for image, label in zip(images, context.embedded("val").labels.tolist(), strict=True):
        similarities = [float(image @ mean) for mean in means]
        hits.append(similarities.index(max(similarities)) == label)
        by_class.setdefault(label, []).append(hits[-1])
    assert 0 < sum(hits) < len(hits)
    recall = sum(sum(each) / len(each) for each in by_class.values()) / 3
    assert scores == pytest.approx({"acc1": sum(hits) / len(hits), "mean_per_class_recall": recall})


def test_it_is_run_on_sets_that_have_classes_and_labels(tmp_path: Path) -> None:
    classes = Classes(LABELS, [[name] for name in LABELS])
    for fields, expected in (
        ({"label": "cls", "classes": classes}, ["val"]),
        ({"label": "cls"}, []),
        ({"classes": classes}, []),
    ):
        assert ZeroShot().applicable_datasets(make_context(data=make_set(tmp_path, **fields))) == expected


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_scores_do_not_depend_on_the_chunks(tmp_path: Path, chunk_size: int) -> None:
    texts = [["a cat", "a photo of one small cat"], ["a dog"], ["an ant", "ants"]]
    data = make_set(tmp_path, label="json.label", classes=Classes(LABELS, texts))
    assert ZeroShot(chunk_size=chunk_size)("val", make_context(data=data)) == ZeroShot()("val", make_context(data=data))


@torch.no_grad()
def test_confusion_shows_the_classes_that_occur_as_truth_or_prediction(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(64)]
    context = make_context(data=make_set(tmp_path, label="cls", classes=Classes(names, [[name] for name in names])))
    ZeroShot()("val", context)
    data = context.embedded("val")
    weights = F.normalize(embed_texts(context.model, TOKENIZER, names, 4), dim=-1)
    predicted, labels = (data.images @ weights.T).argmax(dim=1).tolist(), data.labels.tolist()
    occur = sorted({*predicted, *labels})
    assert set(labels) == {0, 1, 2} and 3 < len(occur) < 20
    matrix = np.zeros((len(occur), len(occur)), dtype=np.int64)
    for label, prediction in zip(labels, predicted, strict=True):
        matrix[occur.index(label), occur.index(prediction)] += 1
    expected = pictures.confusion(matrix, [names[i] for i in occur])
    np.testing.assert_array_equal(context.shown.pictures["eval-val/confusion"], expected)
