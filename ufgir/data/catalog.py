"""Catalog of the fine-grained data sets that the original code supports, for the loader, `ufgir datasets` and docs/datasets.md.

Numbers of classes and images are those of the original's file lists; for imagenet and cifar, the published ones. The data
sets on the Hub were not loaded for this table: their columns are known only where given, and their order of classes was not
compared with the original's.
"""

import difflib
from dataclasses import dataclass

from .prepare.raw_layouts import AnnotationLists, FileNames


NOT_FOUND = "not found"


@dataclass(frozen=True)
class FineGrainedDataset:
    """An entry of the catalog.

    Args:
        name: the original's short name.
        title: content of the images.
        num_classes: number of classes K.
        train: number of images of train and validation together.
        test: number of images of the test split.
        source: origin of the data.
        hub_id: data set on the Hub that the short name loads; None if no loadable one was found.
        image_column, label_column: its columns; None if they were not looked up and are found by their types.
        splits: its split names -> ours, if they are misleading; only these splits are used.
        note: other remarks.
    """

    name: str
    title: str
    num_classes: int
    train: int
    test: int
    source: str
    hub_id: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    splits: tuple[tuple[str, str], ...] = ()
    note: str = ""

    @property
    def columns(self) -> str:
        """The columns on the Hub, as text."""
        if self.hub_id is None:
            return ""
        return f"{self.image_column}, {self.label_column}" if self.image_column else "not looked up: found by type"

    def instructions(self) -> str:
        """Explain how to get a data set that cannot be loaded by its short name."""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.name!r} ({self.title}, {self.num_classes:,} classes) cannot be loaded by its short name: no matching "
            f"data set was found on the Hub{note}. Download it from {self.source} and pass a folder train/<class>/<image>, "
            "test/<class>/<image>, or a folder of images with train_val.csv and test.csv (`class_id,dir`)."
        )

    def describe(self) -> str:
        """Describe the entry, one line per property."""
        lines = [f"{self.name}: {self.title}"]
        lines.append(f"classes: {self.num_classes:,}; images: {self.train:,} train + validation, {self.test:,} test")
        if self.hub_id is None:
            lines.append(f"on the Hub: {NOT_FOUND}")
        else:
            lines += [f"on the Hub: {self.hub_id}", f"columns there: {self.columns}"]
            lines.append(f"load it: load_ufgir_dataset({self.name!r}), or --dataset {self.name}")
        lines += [f"source: {self.source}"] + ([f"note: {self.note}"] if self.note else [])
        return "\n".join(lines)


FINE_GRAINED: dict[str, FineGrainedDataset] = {
    row.name: row
    for row in (
        FineGrainedDataset(
            "aircraft",
            "aircraft variants, FGVC-Aircraft",
            100,
            6_667,
            3_333,
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            note="HuggingFaceM4/FGVC-Aircraft is a loading script, Voxel51/FGVC-Aircraft is for FiftyOne",
        ),
        FineGrainedDataset(
            "cars",
            "car models, Stanford Cars",
            196,
            8_144,
            8_041,
            "the Hub",
            "tanganke/stanford_cars",
            note="also Donghyun99/Stanford-Cars",
        ),
        FineGrainedDataset(
            "cub",
            "birds, CUB-200-2011",
            200,
            5_994,
            5_794,
            "https://www.vision.caltech.edu/datasets/cub_200_2011/",
            "bentrevett/caltech-ucsd-birds-200-2011",
            note="also efekankavalci/CUB_200_2011, Donghyun99/CUB-200-2011",
        ),
        FineGrainedDataset(
            "dogs",
            "dog breeds, Stanford Dogs",
            120,
            12_000,
            8_580,
            "http://vision.stanford.edu/aditya86/ImageNetDogs/",
            "Donghyun99/Stanford-Dogs",
        ),
        FineGrainedDataset(
            "flowers",
            "flowers, Oxford 102",
            102,
            2_040,
            6_149,
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            note="nelorth/oxford-flowers is split differently, 7,169 and 1,020",
        ),
        FineGrainedDataset(
            "food",
            "dishes, Food-101",
            101,
            75_750,
            25_250,
            "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            "ethz/food101",
            "image",
            "label",
            (("train", "train"), ("validation", "test")),
            "its validation split is used as test",
        ),
        FineGrainedDataset(
            "nabirds",
            "birds, NABirds",
            555,
            23_929,
            24_633,
            "https://dl.allaboutbirds.org/nabirds",
            note="gjuggler/bird-data is a loading script; the contents of QianC95/NABirds were not checked",
        ),
        FineGrainedDataset(
            "pets",
            "cats and dogs, Oxford-IIIT Pet",
            37,
            3_680,
            3_669,
            "https://www.robots.ox.ac.uk/~vgg/data/pets/",
            "timm/oxford-iiit-pet",
            "image",
            "label",
        ),
        FineGrainedDataset(
            "vegfru",
            "vegetables and fruit, VegFru",
            292,
            43_800,
            116_931,
            "https://github.com/ustc-vim/vegfru",
            note="also zhaoyj688/vegfru on Kaggle; another count of its test images is 116,391",
        ),
        FineGrainedDataset(
            "inat17",
            "species, iNaturalist 2017",
            5_089,
            579_184,
            95_986,
            "https://github.com/visipedia/inat_comp/tree/master/2017",
        ),
        FineGrainedDataset(
            "moe",
            "anime faces, moeimouto-faces",
            173,
            11_454,
            2_943,
            "mylesoneill/tagged-anime-illustrations on Kaggle",
        ),
        FineGrainedDataset(
            "dafb",
            "anime characters, DAF:re",
            3_263,
            368_997,
            94_440,
            "Google Drive, through the original's download_daf_moe.py",
        ),
        FineGrainedDataset(
            "imagenet",
            "ImageNet-1k",
            1_000,
            1_281_167,
            50_000,
            "https://www.image-net.org",
            "ILSVRC/imagenet-1k",
            "image",
            "label",
            (("train", "train"), ("validation", "test")),
            "gated; its validation split is used as test, because its test split has no labels",
        ),
        FineGrainedDataset(
            "cifar10",
            "CIFAR-10",
            10,
            50_000,
            10_000,
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            "uoft-cs/cifar10",
            "img",
            "label",
        ),
        FineGrainedDataset(
            "cifar100",
            "CIFAR-100",
            100,
            50_000,
            10_000,
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            "uoft-cs/cifar100",
            "img",
            "fine_label",
        ),
    )
}


def find_dataset(name: str) -> FineGrainedDataset:
    """Return the entry of a short name; raise ValueError, with a similar name, if there is none."""
    if name not in FINE_GRAINED:
        close = difflib.get_close_matches(name, FINE_GRAINED, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"`NAME` must be one of {', '.join(FINE_GRAINED)}, got {name}.{hint}")
    return FINE_GRAINED[name]


HEADER = ("name", "what", "classes", "train + validation", "test", "on the Hub", "columns", "source", "note")


def table_rows() -> list[tuple[str, ...]]:
    """Return one row per data set, with the columns of `HEADER`."""
    return [
        (
            row.name,
            row.title,
            f"{row.num_classes:,}",
            f"{row.train:,}",
            f"{row.test:,}",
            row.hub_id or NOT_FOUND,
            row.columns,
            row.source,
            row.note,
        )
        for row in FINE_GRAINED.values()
    ]


def markdown_table() -> str:
    """Return the table as Markdown, without a trailing line break."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- | --- | ---: | ---: | ---: | --- | --- | --- | --- |"]
    for name, title, classes, train, test, hub, columns, source, note in table_rows():
        hub = hub if hub == NOT_FOUND else f"[{hub}](https://huggingface.co/datasets/{hub})"
        source = f"<{source}>" if source.startswith("http") else source
        lines.append(f"| `{name}` | {title} | {classes} | {train} | {test} | {hub} | {columns} | {source} | {note} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class UltraFGVCSet:
    """Published properties of a set of Ultra-FGVC."""

    name: str
    title: str
    layout: FileNames | AnnotationLists
    classes: int
    train: int  # images
    test: int
    train_per_class: tuple[int, int]  # fewest, most
    test_per_class: tuple[int, int]


STAGES = ("R1", "R3", "R4", "R5", "R6")  # R2 was not published


SETS = {
    s.name: s
    for s in (
        UltraFGVCSet("cotton", "Cotton80", FileNames("cotton_square_new"), 80, 240, 240, (3, 3), (3, 3)),
        UltraFGVCSet("soylocal", "SoyLocal", FileNames("soybean200_square"), 200, 600, 600, (3, 3), (3, 3)),
        UltraFGVCSet("soygene", "SoyGene", AnnotationLists(), 1110, 12763, 11143, (3, 15), (3, 13)),
        UltraFGVCSet("soyageing", "SoyAgeing", AnnotationLists(STAGES), 198, 4950, 4950, (25, 25), (25, 25)),
        *(
            UltraFGVCSet(
                f"soyageing_{stage.lower()}",
                f"SoyAgeing {stage}",
                AnnotationLists((stage,)),
                198,
                990,
                990,
                (5, 5),
                (5, 5),
            )
            for stage in STAGES
        ),
        UltraFGVCSet("soyglobal", "SoyGlobal", FileNames("soybean2000"), 1938, 5814, 5814, (3, 3), (3, 3)),
    )
}
