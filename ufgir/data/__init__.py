"""Load images and labels from any supported layout (class folders, CSV/JSONL listings, parquet, the Hub) as a checked
`DatasetDict` with the columns `image` and `label`. The package also has splits, label unification, streams, the data
report, the catalog of data sets, the preparation of raw downloads (`prepare`) and the drawn leaves (`synthetic_leaves`)."""

from .. import _moved
from .checks import DatasetError
from .folders import load_images
from .labels import to_multi_hot
from .load import SYNTHETIC_LEAVES, load_ufgir_dataset
from .streams import StreamedImages
from .transformed import TransformedImages


__all__ = [
    "SYNTHETIC_LEAVES",
    "DatasetError",
    "StreamedImages",
    "TransformedImages",
    "load_images",
    "load_ufgir_dataset",
    "to_multi_hot",
]

__getattr__ = _moved.names_of(__name__)
