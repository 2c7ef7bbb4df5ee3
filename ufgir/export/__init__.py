"""Export a trained model to a file that runs without this package: ONNX, OpenVINO IR or a torch.export program.

The exported program maps normalized `pixel_values` (B, C, height, width) to `logits` (B, K), for any batch size, at the image size and
keep rate of the model. Token counts are constants of the graph, so each keep rate has its own file. Every file is compared with the
model before it gets its name.

```python
from ufgir.export import export_model

exported = export_model(model, "leaves.xml", precision="int8", calibration=batches)
exported.check.agreement   # share of the images with the model's class
exported.float_operators   # what int8 left in floating point
```
"""

from .checks import Check
from .exporter import (
    FORMATS,
    PRECISIONS,
    Exported,
    Exporter,
    budget_files,
    check_exportable,
    check_format,
    export_budgets,
    export_model,
)
from .tensorrt import TENSORRT_OPERATORS


__all__ = [
    "FORMATS",
    "PRECISIONS",
    "TENSORRT_OPERATORS",
    "Check",
    "Exported",
    "Exporter",
    "budget_files",
    "check_exportable",
    "check_format",
    "export_budgets",
    "export_model",
]
