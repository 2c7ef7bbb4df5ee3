"""Streams of rows: data that are read while they are used, with the same columns and classes as data in memory."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from .data_checks import DatasetError
from .data_labels import class_feature, is_multi_label, split_text


SHARDS = 64  # of data that lie in a local folder: the most DataLoader workers that `datasets` can feed from them


def to_stream(splits: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    """The same data as a stream, row by row."""
    return datasets.IterableDatasetDict(
        {name: split.to_iterable_dataset(num_shards=min(SHARDS, len(split))) for name, split in splits.items()}
    )


def _encode(
    labels: Sequence[Any], names: Sequence[str] | None, index: Mapping[str, int], separator: str | None, where: str
) -> dict[str, list[Any]]:
    """A batch of labels -> class indices; DatasetError for a class that is not known."""

    def code(label: Any) -> int:
        name = names[label] if names is not None and label is not None and 0 <= label < len(names) else label
        if name is not None and str(name) in index:
            return index[str(name)]
        raise DatasetError(
            f"{where} has an image of the class {name!r}, which is not among the {len(index)} `class_names`."
        )

    if separator is not None:
        labels = [split_text(text, separator) for text in labels]
    codes = (list(dict.fromkeys(map(code, label))) if isinstance(label, list) else code(label) for label in labels)
    return {"label": list(codes)}


def unify_stream_labels(
    splits: Mapping[str, datasets.IterableDataset],
    source: str,
    class_names: Sequence[str] | None = None,
    separator: str | None = None,
) -> datasets.IterableDatasetDict:
    """`label` as `ClassLabel`, or lists of it, with the same names in every split of a stream; nothing is read.

    Args:
        splits: streams with the columns `image` and `label`.
        source: what messages call the data.
        class_names: the classes by index. By default those of the labels' `ClassLabel`.
        separator: what stands between the classes of one image in a text.

    Raises:
        DatasetError: the classes are not known without reading all labels, or differ between splits; and, while a stream is
            read, a label that is none of `class_names`.
    """
    kinds = {name: class_feature(split.features["label"]) for name, split in splits.items()}
    first = next(iter(kinds.values()))
    if class_names is None:
        if unknown := [name for name, kind in kinds.items() if kind is None]:
            raise DatasetError(
                f"`streaming`: the labels of {source}, {', '.join(unknown)}, are no ClassLabel, so that the list of all "
                "labels would be needed to know the classes: give them in `class_names`, or do not stream."
            )
        if other := [name for name, kind in kinds.items() if kind.names != first.names]:
            raise DatasetError(
                f"{source}: {', '.join(other)} lists other classes, or in another order, than {next(iter(kinds))}: give "
                "`class_names`."
            )
    names = list(class_names if class_names is not None else first.names)
    index = {name: i for i, name in enumerate(names)}
    streams = {}
    for name, split in splits.items():
        feature = split.features["label"]
        if kinds[name] is not None and kinds[name].names == names:
            streams[name] = split
            continue
        lists = is_multi_label(feature) or separator is not None
        kind = datasets.ClassLabel(names=names)
        arguments = {"names": kinds[name] and kinds[name].names, "index": index, "separator": separator}
        encode = functools.partial(_encode, where=f"{source}: {name}", **arguments)
        features = {"image": datasets.Image(), "label": datasets.List(kind) if lists else kind}
        # not decoded for the sake of the labels; and no `features` for map, after which a cast is no longer heeded
        raw = split.cast_column("image", datasets.Image(decode=False))
        streams[name] = raw.map(encode, input_columns=["label"], batched=True).cast(datasets.Features(features))
    return datasets.IterableDatasetDict(streams)
