"""Run programs of others on our models: `make clients`, or `python -m tests.clients UV [CLIENT ...]`.

Each client is a file here, run in an environment of its own with the newest torch, a torchvision that fits, and the newest
transformers that the client admits. Its last line goes into docs/compatibility.md.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.compat.environments import WORK, CannotRunError, environment, requirements, run_rows, today


PYTHON = "3.12"


class Client(NamedTuple):
    """A program of others.

    Args:
        name: as people call it.
        since: the release of ours with which it works; "-" if it does not.
        package: whose version is shown, transformers by default.
        requirements: to install besides; by default the package.
        upstream: why it fails, where that is not for us to mend.
        needs: a variable of the environment without which it is skipped.
    """

    name: str
    since: str
    package: str = "transformers"
    requirements: tuple[str, ...] = ()
    upstream: str = ""
    needs: str = ""


CLIENTS = {
    "pipelines": Client("`pipeline`, both tasks", "0.2.0"),
    "auto_model": Client("`AutoModel` from remote code", "0.1.0"),
    "safetensors_load": Client("weights by safetensors alone", "0.1.0", "safetensors"),
    "trainer": Client("plain `Trainer`", "0.1.0"),
    "accelerate_loop": Client("a loop with accelerate", "0.1.0", "accelerate"),
    "examples": Client("transformers' two example scripts", "0.2.0", needs="EXAMPLES"),
    "data_parallel": Client("`nn.DataParallel`", "0.2.0", "torch"),
    "fsdp2": Client("FSDP2, `fully_shard`", "0.1.0", "torch"),
    "deepspeed_zero2": Client("DeepSpeed ZeRO-2 on a CPU", "0.1.0", "deepspeed"),
    "lightning_fit": Client("Lightning", "0.1.0", "lightning", ("lightning==2.6.*",)),
    "peft_adapters": Client("peft, `get_peft_model` and merge", "0.1.0", "peft"),
    "jit_trace": Client("`torch.jit.trace`", "0.2.0", "torch"),
    "onnx_runtime": Client("ONNX Runtime", "0.2.0", "onnxruntime", ("onnx", "onnxruntime", "onnxscript")),
    "openvino": Client("OpenVINO", "0.2.0", "openvino"),
    "torchao_int8": Client("torchao, int8 weights", "0.1.0", "torchao"),
    "bitsandbytes_int8": Client("bitsandbytes, 8 bit", "0.1.0", "bitsandbytes"),
    "captum": Client("captum", "0.2.0", "captum"),
    "grad_cam": Client("pytorch-grad-cam", "0.2.0", "grad-cam"),
    "optimum_onnx": Client(
        "optimum-onnx", "-", "optimum-onnx", ("optimum-onnx[onnxruntime]==0.1.0",), "it asks for an older transformers"
    ),
    "optimum_intel": Client(
        "optimum-intel",
        "-",
        "optimum-intel",
        ("optimum-intel==2.2.0", "openvino"),
        "it asks for an older transformers",
    ),
    "evaluator": Client(
        "`evaluate.evaluator`",
        "-",
        "evaluate",
        ("evaluate", "scipy", "scikit-learn"),
        "it asks for TensorFlow classes that transformers 5 removed",
    ),
    "auto_peft": Client(
        "peft, `AutoPeftModel`",
        "-",
        "peft",
        upstream="it imports classes of listed packages only, or those that its `import_allowlist` names",
    ),
}
COLUMNS = ("client", "what", "version", "transformers", "torch", "works since", "result", "date")


def run_client(uv: Path, key: str) -> tuple[list[str], bool]:
    """Return the cells of a row, and whether the client had the expected result."""
    client = CLIENTS[key]
    if client.needs and not os.environ.get(client.needs):
        raise CannotRunError(f"`{client.needs}` is not set: name the folder, see tests/clients/{key}.py")
    own = client.requirements or (() if client.package in ("torch", "transformers") else (client.package,))
    with environment(uv, PYTHON) as env:
        torch = ("torch", "torchvision", "pytest>=9,<10")
        try:
            env.install(*torch, *requirements(), *own)
        except CannotRunError as error:
            if not client.upstream:
                raise
            # Packages that ask for versions which exclude ours are put beside them, to see whether they work all the same.
            env.install(*torch, *requirements())
            env.install("--no-deps", *own, "optimum")
            print(f"{key}: installed against its own requirements ({error})", flush=True)
        versions = env.versions(client.package, "transformers", "torch")
        log = WORK / f"client-{key}.log"
        status = env.run("-m", f"tests.clients.{key}", log=log, timeout=1800)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = " ".join(re.sub(r" \(/[^)]*\)?", "", lines[-1]).split())[:200] if lines else f"status {status}"  # no paths
    works = status == 0
    result = (
        f"works: {said}" if works else f"fails: {client.upstream}: {said}" if client.upstream else f"**fails**: {said}"
    )
    shown = [versions.get(name, "-") for name in (client.package, "transformers", "torch")]
    return [client.name, *shown, client.since, result, today()], works != bool(client.upstream)


def not_run(key: str, reason: str) -> list[str]:
    """Return the cells of a client that could not be run."""
    client = CLIENTS[key]
    return [client.name, "-", "-", "-", client.since, reason, today()]


def main(arguments: list[str]) -> int | str:
    """Run; the exit status is 1 if a client that should work fails, or one that fails upstream works."""
    uv = Path(arguments[0]).absolute()
    return run_rows("clients", "CLIENTS", COLUMNS, list(CLIENTS), arguments[1:], partial(run_client, uv), not_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
