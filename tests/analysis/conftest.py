"""Fixtures shared by the tests of tests/analysis."""

import pytest
import torch

from tests.analysis.helpers import PROCESSOR, pictures
from ufgir.data.transformed import TransformedImages
from ufgir.transforms.preprocessing import EvalTransform


@pytest.fixture(scope="module")
def raw():
    return pictures()


@pytest.fixture(scope="module")
def dataset(raw):
    return TransformedImages(raw, EvalTransform(PROCESSOR))


@pytest.fixture(scope="module")
def pixels(dataset):
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
