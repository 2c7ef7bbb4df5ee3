"""Images and tiny models for the tests of the analyses."""

import csv
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers import tiny_model
from ufgir.transforms.preprocessing import make_image_processor


PROCESSOR = make_image_processor(32, resize_size=32)
CLASSES = ["ash", "beech", "cedar", "date palm", "elm", "fir", "ginkgo"]
REDUCED = {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}


def picture(index):
    noise = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32))


def pictures(count=37):
    columns = {"image": [picture(i) for i in range(count)], "label": [i % 7 for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict(columns, features=features)


def float_model(**changes):
    return tiny_model(**({"num_labels": 7} | REDUCED | changes)).float()


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shards(folder):
    return pq.read_table(sorted(Path(folder).glob("images-*.parquet"))).to_pylist()
