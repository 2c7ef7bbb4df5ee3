"""What `ufgir benchmark` times: a batch in PyTorch, eager or compiled, or in the runtime of an exported file, and a training step."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..export import Exporter
from ..export.checks import Logits
from ..export.onnx_files import open_session
from ..export.openvino_files import compile_ir, import_openvino
from ..utils.extras import install_command
from .benchmark_cases import BACKENDS, Setting
from .timing import Run, peak_memory_increase


FIELDS = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "f32",
}  # OpenVINO's names of what is not int8


class Prepared(NamedTuple):
    """A function to time.

    Attributes:
        run: computes a batch, or a training step.
        activation_memory, peak_memory: bytes, see `Result`; None if they cannot be measured.
        seconds: time of an export that was made before, to be added to that of loading the file.
    """

    run: Run
    activation_memory: int | None = None
    peak_memory: int | None = None
    seconds: float = 0.0


class Files:
    """Exported files of the models that are measured, each made once.

    Args:
        calibration: image size -> batches (B, C, H, W) for int8 in OpenVINO.
    """

    def __init__(self, calibration: Callable[[int], Iterable[torch.Tensor]]) -> None:
        self.calibration = calibration
        self._folder = tempfile.TemporaryDirectory(prefix="ufgir-")
        self._exporters: dict[Any, Exporter] = {}
        self._made: dict[Any, tuple[Path, float]] = {}

    def get(self, key: Any, model: nn.Module, setting: Setting) -> tuple[Path, float]:
        """Return the file of a model for a setting, and the seconds that its export took if it was made by an earlier call.

        Args:
            key: stands for the model, with its weights and image size.
            model: the model.
            setting: has a backend that reads files.
        """
        file = file_of(setting)
        assert file is not None
        suffix, precision = file
        place = (key, suffix, precision)
        if place not in self._made:
            start = time.perf_counter()
            if key not in self._exporters:
                self._exporters[key] = Exporter(model)
            quantizes = (suffix, precision) == (".xml", "int8")
            more = {"calibration": list(self.calibration(model.config.image_size))} if quantizes else {}
            path = Path(self._folder.name, f"{len(self._made)}{suffix}")
            self._exporters[key].write(path, precision=precision, drawn=(1,), **more)
            self._made[place] = path, time.perf_counter() - start
            return path, 0.0
        return self._made[place]

    def forget_models(self, needed: Iterable[tuple[Any, Setting]] = ()) -> None:
        """Free the memory of models and graphs; the files stay.

        Args:
            needed: keys and settings of models that will be asked for. Graphs of which a file does not exist yet are kept.
        """
        files = ((key, file_of(setting)) for key, setting in needed)
        keep = {key for key, file in files if file is not None and (key, *file) not in self._made}
        self._exporters = {key: exporter for key, exporter in self._exporters.items() if key in keep}

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()


def file_of(setting: Setting) -> tuple[str, str] | None:
    """Return suffix and precision of the file that a backend reads, or None."""
    if setting.backend == "onnx":
        return ".onnx", setting.dtype
    if setting.backend == "openvino":  # it chooses the others when it loads the file
        return ".xml", "int8" if setting.dtype == "int8" else "float32"
    return None


def why_not(setting: Setting) -> str | None:
    """Return why a backend does not run a setting, or None."""
    backend = BACKENDS[setting.backend]
    if setting.mode == "training" and not backend.trains:
        return f"{backend.title} does not train"
    if setting.dtype not in backend.dtypes:
        return f"{backend.title} is measured in {', '.join(backend.dtypes)} only"
    return None


def prepare(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, files: Files, key: Any
) -> contextlib.AbstractContextManager[Prepared]:
    """Return a context manager for the function to time.

    Args:
        model: the model on the device, in the dtype of the setting (float32 for int8) and its mode.
        pixels: a batch (B, C, H, W) in float32, on the device.
        setting, device: what is measured, and where.
        files: exported files.
        key: stands for the model in `files`.

    Raises:
        ValueError: if the backend does not run the setting, or a package or compiler is missing.
    """
    if (why := why_not(setting)) is not None:
        raise ValueError(why)
    if setting.mode == "training":
        return _training(model, pixels, setting, device)
    return _MAKERS[setting.backend](model, pixels, setting, device, files, key)


def compiled(function: Callable, device: torch.device) -> Callable:
    """Compile a function as one graph without breaks, on a GPU as a CUDA graph. Cases do not share compiled code."""
    options = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
    if device.type != "cuda":
        return torch.compile(function, **options)
    # Raise an error if a CUDA graph is not possible, instead of measuring something else with a log message.
    graphs = {**torch._inductor.list_mode_options("reduce-overhead"), "triton.cudagraph_or_error": True}
    made = torch.compile(function, options=graphs, **options)

    def run(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call are no longer needed
        return made(*args)

    return run


def packed_weights(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which compiling for inference on a CPU packs the weights once, as constants of the graph.

    Otherwise every call hands the weights over as inputs, and MKL packs each of them again before it multiplies. The setting counts
    when a function is first called, without gradients; as an option of `torch.compile` it comes too late for the weights of a model.
    """
    return torch._inductor.config.patch(freezing=True) if device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _torch(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, files: Files, key: Any
) -> Iterator[Prepared]:
    """Compute the logits of a batch with torch."""
    pixels = pixels.to(next(model.parameters()).dtype)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model(images).logits

    function = compiled(forward, device) if setting.backend == "compiled" else forward

    def run() -> None:
        with torch.inference_mode():
            function(pixels)

    if setting.backend != "eager":
        with packed_weights(device):
            run()  # compiles
        yield Prepared(run)
        return
    activations = peak_memory_increase(run, device)
    yield Prepared(run, activations, activations + size_of(model))


@contextlib.contextmanager
def _aoti(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, files: Files, key: Any
) -> Iterator[Prepared]:
    """Compute the logits of a batch with a library that AOTInductor compiles from the program of torch.export."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(f"AOTInductor needs a C++ compiler, and there is no {compiler}. Install one or set CXX")
    pixels = pixels.to(next(model.parameters()).dtype)
    with tempfile.TemporaryDirectory(prefix="ufgir-") as folder, torch.no_grad(), packed_weights(device):
        program = torch.export.export(Logits(model), (pixels,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "model.pt2")))
        function = torch._inductor.aoti_load_package(path)

    def run() -> None:
        with torch.inference_mode():
            function(pixels)

    yield Prepared(run)


@contextlib.contextmanager
def _onnx(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, files: Files, key: Any
) -> Iterator[Prepared]:
    """Compute the logits of a batch with ONNX Runtime; int8 with dynamic quantization."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX Runtime is not installed: {install_command('export')}") from error
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"this ONNX Runtime has no {provider}")
    path, seconds = files.get(key, model, setting)
    session = open_session(path, torch.get_num_threads(), setting.batch_size, provider)
    if provider not in session.get_providers():  # its libraries did not load
        raise ValueError(f"this ONNX Runtime cannot start its {provider}")
    binding = session.io_binding()  # images and logits stay where they are
    images = onnxruntime.OrtValue.ortvalue_from_numpy(pixels.cpu().numpy(), device.type, device.index or 0)
    binding.bind_ortvalue_input("pixel_values", images)
    binding.bind_output("logits", device.type, device.index or 0)
    yield Prepared(lambda: session.run_with_iobinding(binding), seconds=seconds)


@contextlib.contextmanager
def _openvino(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, files: Files, key: Any
) -> Iterator[Prepared]:
    """Compute the logits of a batch with OpenVINO; int8 by NNCF, the rest in float32."""
    import_openvino()
    import openvino

    if device.type != "cpu":
        raise ValueError("OpenVINO is measured on a CPU only")
    path, seconds = files.get(key, model, setting)
    program = compile_ir(path, FIELDS[setting.dtype], torch.get_num_threads(), tuple(pixels.shape))
    request = program.create_infer_request()
    images = openvino.Tensor(pixels.numpy())
    yield Prepared(lambda: request.infer([images]), seconds=seconds)


@contextlib.contextmanager
def _training(model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device) -> Iterator[Prepared]:
    """Run forward, backward and AdamW. The learning rate is tiny, so that the weights and the tokens that ATS keeps do not change."""
    labels = torch.arange(setting.batch_size, device=device) % model.config.num_labels
    dtype = getattr(torch, setting.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(pixel_values=images, labels=labels).loss

    function = compiled(forward, device) if setting.backend == "compiled" else forward

    def gradients() -> None:
        scaler.scale(function(pixels, labels)).backward()

    def run() -> None:
        gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if setting.backend != "eager":
        yield Prepared(run)
        return
    activations = activation_memory(model, gradients, device)
    run()  # creates the optimizer state
    kept = size_of(model) + sum(_bytes(v) for state in optimizer.state.values() for v in state.values())
    yield Prepared(run, activations, kept + peak_memory_increase(run, device))


def activation_memory(model: nn.Module, gradients: Run, device: torch.device) -> int:
    """Return by how many bytes memory grows at most in forward and backward (`gradients`), with gradients already allocated."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grown = peak_memory_increase(gradients, device)
    model.zero_grad(set_to_none=True)
    return grown


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def size_of(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(map(_bytes, (*model.parameters(), *model.buffers())))


_MAKERS: dict[str, Callable[..., contextlib.AbstractContextManager[Prepared]]] = {
    "eager": _torch,
    "compiled": _torch,
    "aoti": _aoti,
    "onnx": _onnx,
    "openvino": _openvino,
}
