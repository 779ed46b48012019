"""Class names and prompts of CLIP's data sets: their numbers, their order against torchvision's, and unknown names."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from torchvision import datasets
from torchvision.models import video

from mmpretrain.build_evaluation import build_eval_sets
from mmpretrain.config.schema import DataConfig, EvalSetConfig
from mmpretrain.data.classes import Classes, read_classes
from mmpretrain.data.clip_prompts import clip_prompts
from tests.evals.held_out import make_model, samples
from tests.tars import encode, write_tars

SIZES = {  # numbers of classes and templates in data/prompts.md of openai/CLIP; caltech101 has `background` there
    "birdsnap": (500, 1), "caltech101": (101, 34), "cifar10": (10, 18), "cifar100": (100, 18), "clevr_counts": (8, 1),
    "country211": (211, 5), "dtd": (47, 8), "eurosat": (10, 3), "fer2013": (7, 6), "fgvc_aircraft": (100, 2),
    "flowers102": (102, 1), "food101": (101, 1), "gtsrb": (43, 3), "hateful_memes": (2, 1), "imagenet": (1000, 80),
    "kinetics700": (700, 28), "kitti": (4, 1), "mnist": (10, 1), "oxford_pets": (37, 1), "pcam": (2, 1),
    "rendered_sst2": (2, 1), "resisc45": (45, 18), "stanford_cars": (196, 8), "stl10": (10, 2), "sun397": (397, 2),
    "ucf101": (101, 48), "voc2007": (20, 1),
}  # fmt: skip


def labels(name: str) -> list[str]:
    return [names[0] for names in clip_prompts(f"clip:{name}", "classes").names]


@pytest.mark.parametrize("name", SIZES)
def test_each_set_has_its_classes_and_templates(name: str) -> None:
    prompts = clip_prompts(f"clip:{name}", "classes")
    assert (len(prompts.names), len(prompts.templates)) == SIZES[name]
    names = [each for names in prompts.names for each in names]
    assert all(each == each.strip() and each for each in names)
    assert all(template.count("{}") == 1 for template in prompts.templates)
    repeated = {each for each in names if names.count(each) > 1}
    assert repeated <= {"crane", "maillot", "missile", "sunglasses"}  # ImageNet's, of two classes each


def test_flowers_have_the_order_of_torchvisions() -> None:
    ours, theirs = labels("flowers102"), datasets.Flowers102.classes
    others = {theirs[i]: name for i, name in enumerate(ours) if theirs[i] != name}
    assert others == {
        "globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "dtd", "food101", "stl10"])
def test_sets_that_torchvision_sorts_by_name_are_sorted(name: str) -> None:
    folders = [each.replace(" ", "_") for each in labels(name)]
    assert folders == sorted(folders)


def test_sets_of_other_orders_have_torchvisions(tmp_path: Path) -> None:
    words = {
        "annual crop": "AnnualCrop", "forest": "Forest", "brushland": "HerbaceousVegetation", "highway": "Highway",
        "industrial": "Industrial", "pasture": "Pasture", "permanent crop": "PermanentCrop",
        "residential": "Residential", "river": "River", "sea": "SeaLake",
    }  # fmt: skip
    for folder in words.values():
        (tmp_path / "eurosat" / "2750" / folder).mkdir(parents=True)
        (tmp_path / "eurosat" / "2750" / folder / "1.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8), "PNG"))
    order = {folder: name for word, folder in words.items() for name in labels("eurosat") if word in name}
    assert [order[folder] for folder in datasets.EuroSAT(tmp_path).classes] == labels("eurosat")
    pets = [each.lower() for each in labels("oxford_pets")]
    assert pets == sorted(pets)  # the annotations number breeds of cats and dogs together
    assert labels("caltech101")[:5] == ["off-center face", "centered face", "leopard", "motorbike", "accordion"]
    assert [each[0] for each in datasets.MNIST.classes] == labels("mnist")
    assert labels("fgvc_aircraft") == sorted(labels("fgvc_aircraft"))  # in the order of its file, variants.txt


def test_most_actions_are_spelt_as_in_kinetics_400() -> None:
    theirs = set(video.R3D_18_Weights.KINETICS400_V1.meta["categories"])
    assert len(theirs - set(labels("kinetics700"))) < 40


def test_a_class_with_several_names_has_the_texts_of_all() -> None:
    classes = read_classes("clip:fer2013", templates="clip:fer2013")
    assert classes.names[3] == "happy" and len(classes.texts[3]) == 2 * 6
    assert "look at how smiling they are." in classes.texts[3]
    assert classes.texts[0][0] == "a photo of a angry looking face."


def test_classes_and_templates_are_chosen_apart(tmp_path: Path) -> None:
    imagenet = read_classes("clip:imagenet", templates="clip:imagenet")
    assert imagenet == read_classes("clip:imagenet", templates="openai")
    assert imagenet.names == list(open_clip.IMAGENET_CLASSNAMES)
    (tmp_path / "names.txt").write_text("oak\nfir\n")
    assert read_classes(tmp_path / "names.txt", templates="clip:rendered_sst2") == Classes(
        ["oak", "fir"], [["a oak review of a movie."], ["a fir review of a movie."]]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "clip:cifar-10"}, r"^classes is 'clip:cifar-10'; did you mean 'cifar10'\?$"),
        ({"path": "clip:"}, r"^classes is 'clip:'; expected one of: birdsnap, caltech101, .*, voc2007$"),
        ({"path": "clip:dtd", "templates": "clip:dtt"}, r"^templates is 'clip:dtt'; did you mean 'dtd'\?$"),
        (
            {"path": "clip:dtd", "text_column": "text"},
            r"^text_column is 'text', but clip:dtd has no columns; expected null$",
        ),
    ],
)
def test_unknown_sets_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_classes(**arguments)


def test_a_data_set_takes_them_by_name(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    write_tars(tmp_path / "val", samples(), [23])
    config = EvalSetConfig(shards="val", label="cls", classes="clip:stl10", templates="clip:stl10")
    found = build_eval_sets({"val": config}, str(tmp_path), make_model(), 1 << 20, DataConfig())["val"].classes
    assert found is not None
    assert found.texts[7] == ["a photo of a monkey.", "a photo of the monkey."]
