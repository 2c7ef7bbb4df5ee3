"""A process that loads what an old release wrote. Run by test_old_release.py and make_release_fixture.py, never imported.

`python old_release_process.py package SCRATCH FOLDER ...` loads the folders with this package; with `own_code` instead of
`package`, and `python -P`, each with the code that lies in it, where this package cannot be imported. SCRATCH holds
`pictures.safetensors`; `<how>.safetensors` (pixels and logits) and `<how>.json` (what else was found) are written there. With
this package, commands of `ufgir` that `commands.json` in SCRATCH lists are run there, too, and print.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file


class NoPackage:
    """Import hook that hides the package if it is installed."""

    hidden = ("clca", "ufgir", "modeling_clca", "configuration_clca", "run_ufgir")

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


how, scratch, folders = sys.argv[1], Path(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]]
trust = {}
if how == "own_code":
    sys.meta_path.insert(0, NoPackage())
    from transformers import AutoImageProcessor, pipeline
    from transformers import AutoModelForImageClassification as Model

    trust = {"trust_remote_code": True}
else:
    from transformers import AutoImageProcessor

    from clca import CLCAViTForImageClassification as Model

pictures = [Image.fromarray(picture.numpy()) for picture in load_file(scratch / "pictures.safetensors")["pictures"]]
found: dict[str, object] = {"capability": torch.backends.cpu.get_cpu_capability(), "modules": {}, "classified": {}}
tensors: dict[str, torch.Tensor] = {}
for folder in folders:
    name = folder.name
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    assert torch.equal(pixels, tensors.setdefault("pixels", pixels)), name
    model, info = Model.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(info.values()), info
    with torch.no_grad():
        tensors[f"logits.{name}"] = model.eval()(pixels).logits
    found["modules"][name] = type(model).__module__
    if how == "own_code":
        classify = pipeline("image-classification", model=str(folder), **trust)
        found["classified"][name] = classify(pictures, top_k=3)
found["imported"] = sorted(name for name in sys.modules if name.partition(".")[0] in NoPackage.hidden)
if how == "package" and (scratch / "commands.json").exists():
    from ufgir.cli import main

    found["statuses"] = [main(command) for command in json.loads((scratch / "commands.json").read_text())]
(scratch / f"{how}.json").write_text(json.dumps(found), encoding="utf-8")
save_file({key: value.contiguous() for key, value in tensors.items()}, scratch / f"{how}.safetensors")
