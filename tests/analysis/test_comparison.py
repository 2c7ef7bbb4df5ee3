"""Comparison of models layer by layer: features and their similarity."""

import numpy as np
import pytest
import torch

from tests.analysis.helpers import float_model
from ufgir.analysis.comparison import compare_models
from ufgir.analysis.inputs import Batch, LayerOutputs, batches
from ufgir.interpret.patterns import kept_patches
from ufgir.interpret.similarity import BatchedCKA, linear_cka, pwcca_distance


# Features on the way


@pytest.mark.parametrize("cache", [{}, {"cross_layer_cache": False, "num_clr_tokens": 0, "head": "linear"}])
def test_layer_outputs_are_the_recorded_hidden_states(cache, pixels):
    model = float_model(**cache)
    with torch.no_grad(), LayerOutputs(model, [0, 2, 4]) as outputs:
        hidden = model(pixels[:2], output_hidden_states=True).hidden_states
        found = outputs.all_tokens()
    for layer, tokens in zip([0, 2, 4], found, strict=True):
        torch.testing.assert_close(tokens, hidden[layer + 1])
    model(pixels[:2])
    assert outputs.tokens == {}  # it looks no longer


def test_padding_is_not_among_the_tokens(pixels):
    model = float_model(reduction="ats", keep_rate=0.9)
    with torch.no_grad(), LayerOutputs(model, [2]) as outputs:
        model(pixels)
        (tokens,), seen = outputs.all_tokens(), outputs.masks[2]
    assert not seen.all()
    assert not tokens[~seen].any()


def test_batches_leave_broken_images_out_or_stop(raw, dataset):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index in (0, 5):
                raise OSError("image file is truncated")
            return dataset[index]

    found = list(batches(Broken(), 4, start=3, skip_broken=True))
    assert [batch.indices for batch in found] == [[3, 4, 6], [7, 8, 9]]
    assert [batch.broken for batch in found] == [["image 5"], []]
    with pytest.raises(ValueError, match=r"image 0 cannot be read: .*truncated"):
        list(batches(Broken(), 4))
    with pytest.raises(ValueError, match="empty"):
        list(batches(torch.utils.data.Subset(dataset, []), 4))


# Comparing


def test_comparing_two_models(dataset, pixels):
    a, b = float_model(), float_model(keep_rate=0.25, reduction_layers=[2, 3])
    source = batches(dataset, 10)
    found = compare_models([a, b], source, ["cka-plain", "pwcca", "cka", "norms", "patterns"], layers=([0, 4], [4]))
    with torch.no_grad(), LayerOutputs(a, [0, 4]) as of_a, LayerOutputs(b, [4]) as of_b:
        output_a, output_b = a(pixels, output_assignments=True), b(pixels, output_assignments=True)
        xs, (y,) = of_a.cls(), of_b.cls()
    for measure, function in (("cka-plain", linear_cka), ("pwcca", pwcca_distance)):
        np.testing.assert_allclose(found.matrices[measure], [[function(x, y)] for x in xs], atol=1e-5)
    assert found.matrices["cka"].shape == (2, 1)
    assert [(row["model"], row["layer"]) for row in found.norms] == [("a", 0), ("a", 4), ("b", 4)]
    assert (found.images, found.scalars()["cka-plain_layer_4"]) == (37, found.matrices["cka-plain"][1, 0])
    kept = [kept_patches(o.assignments, m.config).float().mean(dim=(0, 2)) for o, m in ((output_a, a), (output_b, b))]
    assert [row["kept_a_mean"] for row in found.stages] == pytest.approx(kept[0].tolist())
    assert [row["kept_b_mean"] for row in found.stages] == pytest.approx(kept[1].tolist())
    assert found.maps[0]["depth_mean"].shape == (4, 4)
    assert found.map_metrics["emd"] > 0


def test_layers_of_one_model_on_all_tokens(dataset, pixels):
    found = compare_models([float_model()], batches(dataset, 10), ["cka"], features="tokens")
    matrix = found.matrices["cka"]
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    expected = BatchedCKA()
    with torch.no_grad():
        for part in pixels.split(10):
            expected.update(float_model()(part, output_hidden_states=True).hidden_states[1:])
    np.testing.assert_allclose(matrix, expected.matrix(), rtol=1e-4)


def test_a_model_with_pixels_of_its_own_gets_them(dataset):
    model = float_model()
    other = {"pixel_values": torch.zeros(5, 3, 32, 32), "pixel_values_2": torch.randn(5, 3, 32, 32)}
    found = compare_models([model, model], [Batch([*range(5)], other, 5, [])], ["cka-plain"], layers=([4], [4]))
    assert np.isnan(found.matrices["cka-plain"]).all()  # the first saw equal images
    with pytest.raises(ValueError, match="no images"):
        compare_models([model], [], ["cka"])
