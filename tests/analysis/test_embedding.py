"""Two-dimensional embeddings of features: groups, thumbnails, colors, and rejected input."""

import numpy as np
import pytest
import torch

from tests.analysis.helpers import float_model
from ufgir.analysis import figures as analysis_figures
from ufgir.analysis.embedding import collect_features, embed, spread_out
from ufgir.analysis.inputs import batches
from ufgir.utils import plotting as figures


# Embedding


def test_embeddings_keep_groups_together():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = rng.normal(size=(60, 12)) + 30 * rng.normal(size=(3, 12))[labels]
    for method in ("tsne", "pca"):
        points = embed(features, method)
        np.testing.assert_array_equal(points, embed(features, method))
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(60)
        assert (labels[distances.argmin(axis=1)] == labels).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": np.ones((3, 5))}, "at least 4 images, got 3"),
        ({"method": "umap"}, "tsne or pca, got 'umap'"),
        ({"perplexity": 0.5}, "at least 1, got 0.5"),
        ({"features": np.full((9, 5), np.nan)}, "finite"),
    ],
)
def test_invalid_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        embed(**({"features": np.ones((9, 5))} | arguments))


def test_features_are_those_the_head_reads(dataset, pixels):
    model = float_model()
    with torch.no_grad():
        cls = model.vit(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
        logits = model(pixels).logits
    source = lambda: batches(dataset, 10)  # noqa: E731
    found = collect_features(model, source())
    np.testing.assert_allclose(found.values, cls.numpy(), atol=1e-5)
    assert (found.indices, found.labels) == ([*range(37)], [i % 7 for i in range(37)])
    aggregated = torch.from_numpy(collect_features(model, source(), "cla").values)
    again = model.classifier.out_proj(aggregated.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    assert not model.classifier.out_proj._forward_pre_hooks
    plain = float_model(head="linear")
    pooled = torch.from_numpy(collect_features(plain, source(), "pooled").values)
    torch.testing.assert_close(plain.classifier(pooled), plain(pixels).logits, atol=1e-4, rtol=1e-4)


def test_thumbnails_are_spread_out():
    points = np.array([[0.0, 0.0], [0.01, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert set(spread_out(points, 4)) == {2, 3, 4, 0} or set(spread_out(points, 4)) == {2, 3, 4, 1}
    assert len(spread_out(points, 5, apart=0.1)) == 4
    assert len(spread_out(np.zeros((3, 2)), 3)) == 1  # all in one place
    assert spread_out(points, 0) == []


@pytest.mark.parametrize("classes", [3, 24, 90])
def test_many_classes_have_distinct_styles(classes):
    with figures.style():
        labels = [*range(classes), -1]
        points = np.random.default_rng(0).normal(size=(classes + 1, 2))
        drawn = analysis_figures.draw_points(points, labels, [f"c{i}" for i in range(classes)], ("x", "y"))
        axes = drawn.axes[0]
        if classes <= 24:
            looks = {
                (tuple(c.get_facecolor()[0]), tuple(c.get_paths()[0].vertices.ravel())) for c in axes.collections[1:]
            }
            assert len(looks) == classes
            assert len(axes.get_legend().get_texts()) == classes + 1
        else:
            assert [text.get_text() for text in axes.texts] == [str(i) for i in range(classes)]
