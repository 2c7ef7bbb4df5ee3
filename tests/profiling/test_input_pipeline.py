"""`ufgir benchmark --input-pipeline`: the same images in every format, no images between processes, and the bottleneck."""

import pytest
import torch
from PIL import Image

from ufgir.cli import entry as cli
from ufgir.profiling import input_pipeline


OPTIONS = "--image-sizes 32 --patch-size 8 --hidden-size 16 --num-hidden-layers 4 --num-attention-heads 2 --threads 1"


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Write a folder of six PNG images of noise."""
    folder = tmp_path_factory.mktemp("leaves")
    for index in range(6):
        file = folder / "train" / f"class_{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (24, 20, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(file)
    return folder


class TestInputPipeline:
    def test_formats_hold_the_same_pictures(self, leaves, tmp_path):
        images = input_pipeline.sample(str(leaves), 5, 32)
        formats = input_pipeline.as_formats(images, tmp_path)
        assert list(formats) == ["as stored", "PNG files", "PNG in parquet", "JPEG files", "JPEG in parquet"]
        assert len(list(tmp_path.glob("*.parquet"))) == 2 * input_pipeline.SHARDS
        for name, data in formats.items():
            assert len(data) == 5
            same = [a.tobytes() == b.tobytes() for a, b in zip(data["image"], images["image"], strict=True)]
            assert all(same) or name.startswith("JPEG")

    def test_speeds_and_what_crosses(self, leaves, tmp_path):
        found = input_pipeline.measure_pipeline(str(leaves), [32], [0, 1], count=4, batch_size=2, repetitions=1)
        assert len(found.stages) == 5 * 3 and set(found.loaders) == {(32, 0), (32, 1)}
        assert all(speed > 0 for speed in (*found.stages.values(), *found.loaders.values()))
        assert found.crossing["pixel_values"] == "float32 (3, 32, 32)" and not found.images_cross
        assert found.crossing_bytes == 3 * 32 * 32 * 4 + 8
        assert any("no image is pickled" in text for text in input_pipeline.remarks(found))
        facts = {"command": "c", "host": "h", "date": "d", "versions": {}}
        files = input_pipeline.write_pipeline(tmp_path, found, facts)
        assert [f.name for f in files] == ["pipeline.csv", "pipeline.md", "pipeline.json"]

    def test_pictures_that_cross_are_noticed(self, leaves, monkeypatch):
        images = input_pipeline.sample(str(leaves), 2, 32)
        monkeypatch.setattr(
            input_pipeline, "transforms", lambda size: {"training transform": lambda image, generator: image}
        )
        monkeypatch.setattr(
            input_pipeline,
            "default_data_collator",
            lambda samples: {"pixel_values": [s["pixel_values"] for s in samples]},
        )
        assert input_pipeline.crossing(images, 32)[2]

    @pytest.mark.parametrize(
        ("device", "model", "words"),
        [
            ("cpu", 10.0, "the model is the bottleneck; preparing an image costs 4.8%"),
            ("cpu", 1000.0, "the input pipeline is the bottleneck"),
            ("cuda", 150.0, "the model is the bottleneck as long as there are 2 workers"),
            ("cuda", 1000.0, "the input pipeline is the bottleneck on this machine, whose 2 cores feed 20%"),
        ],
    )
    def test_the_bottleneck_is_named(self, device, model, words):
        found = input_pipeline.Pipeline("x", 4, (1.0, 1.0), device=device, cores=2)
        found.stages["as stored", "decode + training transform", 32] = 100.0
        found.models[32] = "evit", model
        assert words in input_pipeline.verdict(found, 32)

    def test_command(self, capsys, leaves, tmp_path):
        argv = [
            "--input-pipeline",
            str(leaves),
            *OPTIONS.split(),
            "--count",
            "4",
            "--workers",
            "0",
            "--output",
            str(tmp_path),
        ]
        assert cli.main(["benchmark", *argv]) == 0
        text = capsys.readouterr().out
        assert "images/s on one core" in text and "bottleneck" in text and "evit + CLCA, 0.1" in text
