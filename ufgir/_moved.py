"""Import paths of release 0.1.0 that still work: where each module of then is now.

`import ufgir.loading` gives a module that looks names up in the modules listed here, and warns once. Where a package has the name of
an old module (`ufgir.data`), the package itself answers for the names that the module had.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# old module -> the modules that hold its names today, separated by spaces
MOVED = {
    "dataset_scripts.parquet_folder": "ufgir.data.prepare.parquet_folder",
    "dataset_scripts.raw_layouts": "ufgir.data.prepare.raw_layouts",
    "ufgir.adapters": "ufgir.training.adapters",
    "ufgir.analysis": "ufgir.analysis.dataset_pass",
    "ufgir.analysis_figures": "ufgir.analysis.figures",
    "ufgir.analysis_inputs": "ufgir.analysis.inputs",
    "ufgir.app": "ufgir.app.page",
    "ufgir.app_html": "ufgir.app.html",
    "ufgir.app_model": "ufgir.app.viewer",
    "ufgir.arguments": "ufgir.utils.arguments ufgir.utils.text",
    "ufgir.attention_maps": "ufgir.interpret.attention_maps",
    "ufgir.augmentation": "ufgir.transforms.augmentation ufgir.training.augmentation",
    "ufgir.benchmark": "ufgir.profiling.benchmark",
    "ufgir.benchmark_cases": "ufgir.profiling.benchmark_cases",
    "ufgir.benchmark_report": "ufgir.profiling.benchmark_report",
    "ufgir.callbacks": "ufgir.training.callbacks",
    "ufgir.checkpointing": "ufgir.training.checkpointing",
    "ufgir.checkpoints": "ufgir.checkpoints.original_keys ufgir.checkpoints.from_original",
    "ufgir.checkpoints.resample": "clca.resample_clca",
    "ufgir.cli": "ufgir.cli.entry",
    "ufgir.commands": "ufgir.cli",
    "ufgir.commands.analysis_options": "ufgir.cli.analysis_options",
    "ufgir.commands.analyze": "ufgir.cli.analyze",
    "ufgir.commands.app": "ufgir.cli.app",
    "ufgir.commands.benchmark": "ufgir.cli.benchmark",
    "ufgir.commands.common": "ufgir.cli.common ufgir.utils.text ufgir.checkpoints.loading",
    "ufgir.commands.compare": "ufgir.cli.compare",
    "ufgir.commands.convert": "ufgir.cli.convert",
    "ufgir.commands.correlate": "ufgir.cli.correlate",
    "ufgir.commands.data_report": "ufgir.cli.data_report",
    "ufgir.commands.datasets": "ufgir.cli.datasets",
    "ufgir.commands.embed": "ufgir.cli.embed",
    "ufgir.commands.export": "ufgir.cli.export",
    "ufgir.commands.outputs": "ufgir.cli.outputs",
    "ufgir.commands.predict": "ufgir.cli.predict",
    "ufgir.commands.prepare": "ufgir.cli.prepare",
    "ufgir.commands.pretrained": "ufgir.cli.pretrained",
    "ufgir.commands.profile": "ufgir.cli.profile ufgir.profiling.macs",
    "ufgir.commands.results": "ufgir.cli.results",
    "ufgir.commands.sweep": "ufgir.cli.sweep",
    "ufgir.commands.visualize": "ufgir.cli.visualize",
    "ufgir.comparison": "ufgir.analysis.comparison",
    "ufgir.costs": "ufgir.profiling.macs",
    "ufgir.data": "ufgir.data.load",
    "ufgir.data_checks": "ufgir.data.checks",
    "ufgir.data_folders": "ufgir.data.folders",
    "ufgir.data_labels": "ufgir.data.labels",
    "ufgir.data_listings": "ufgir.data.listings",
    "ufgir.data_report": "ufgir.data.report",
    "ufgir.data_splits": "ufgir.data.splits",
    "ufgir.data_streams": "ufgir.data.streams",
    "ufgir.data_tables": "ufgir.data.tables ufgir.data.hub ufgir.data.columns",
    "ufgir.distillation": "ufgir.training.distillation",
    "ufgir.distributed": "ufgir.training.distributed ufgir.utils.distributed",
    "ufgir.elastic": "ufgir.training.keep_rates ufgir.checkpoints.keep_rates",
    "ufgir.ema": "ufgir.training.ema",
    "ufgir.embedding": "ufgir.analysis.embedding",
    "ufgir.feature_maps": "ufgir.interpret.feature_maps",
    "ufgir.figures": "ufgir.utils.plotting",
    "ufgir.filling": "ufgir.checkpoints.state_dicts ufgir.utils.text",
    "ufgir.fine_grained": "ufgir.data.catalog",
    "ufgir.folders": "ufgir.utils.files ufgir.checkpoints.convert",
    "ufgir.freezing": "ufgir.training.freezing",
    "ufgir.from_timm": "ufgir.checkpoints.from_timm",
    "ufgir.from_transformers": "ufgir.checkpoints.from_transformers",
    "ufgir.gradients": "ufgir.training.gradients",
    "ufgir.growth": "ufgir.profiling.scaling",
    "ufgir.image_operations": "ufgir.transforms.operations",
    "ufgir.input_pipeline": "ufgir.profiling.input_pipeline",
    "ufgir.layer_profile": "ufgir.profiling.layers",
    "ufgir.loading": "ufgir.checkpoints.loading",
    "ufgir.locking": "ufgir.utils.locks",
    "ufgir.metrics": "ufgir.evaluation.metrics",
    "ufgir.model_card": "ufgir.checkpoints.model_card ufgir.utils.files ufgir.utils.metric_names",
    "ufgir.optimization": "ufgir.training.optimization",
    "ufgir.original_files": "ufgir.checkpoints.from_original ufgir.checkpoints.convert_original",
    "ufgir.paper_figures": "ufgir.runs.figures",
    "ufgir.patterns": "ufgir.interpret.patterns",
    "ufgir.picture_sheets": "ufgir.visualization.sheet",
    "ufgir.prediction": "ufgir.evaluation.prediction",
    "ufgir.prediction_files": "ufgir.evaluation.prediction_files",
    "ufgir.pretrained": "ufgir.checkpoints.convert",
    "ufgir.profiling": "ufgir.profiling.macs",
    "ufgir.resample": "clca.resample_clca",
    "ufgir.results": "ufgir.runs.tables",
    "ufgir.run_checks": "ufgir.training.option_checks",
    "ufgir.run_queue": "ufgir.runs.queue",
    "ufgir.run_records": "ufgir.runs.records ufgir.utils.provenance",
    "ufgir.run_tables": "ufgir.runs.tables ufgir.utils.files",
    "ufgir.running": "ufgir.utils.statistics",
    "ufgir.saliency": "ufgir.interpret.saliency",
    "ufgir.schedules": "ufgir.training.schedules",
    "ufgir.similarity": "ufgir.interpret.similarity",
    "ufgir.streaming": "ufgir.data.streams",
    "ufgir.sweep": "ufgir.runs.sweep ufgir.utils.text",
    "ufgir.teacher": "ufgir.training.teacher",
    "ufgir.timing": "ufgir.profiling.timing",
    "ufgir.timm_architectures": "ufgir.checkpoints.timm_architectures",
    "ufgir.timm_keys": "ufgir.checkpoints.timm_keys",
    "ufgir.tracing": "ufgir.interpret.tracing",
    "ufgir.training": "ufgir.training.trainer",
    "ufgir.transforms": "ufgir.transforms.preprocessing ufgir.transforms.images ufgir.data.splits ufgir.data.transformed",
    "ufgir.visualization": "ufgir.visualization.kinds",
}


def names_of(old: str, warn: bool = True) -> Callable[[str], Any]:
    """Return the module-level `__getattr__` that finds the names of an old module where they are today.

    Args:
        old: the name of a module in `MOVED`.
        warn: whether each use of a name warns.
    """
    places = MOVED[old].split()

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            for place in places:
                module = importlib.import_module(place)
                if name in vars(module):
                    if warn:
                        _warn(f"{old}.{name}", f"{place}.{name}")
                    return vars(module)[name]
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return __getattr__


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved to {new}.", FutureWarning, stacklevel=3)


class _MovedModules(MetaPathFinder, Loader):
    """Finds old modules that no file has the name of any more."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MOVED[old].split()[0]
        _warn(old, new)
        module.__doc__ = f"Has moved to `{new}`."
        module.__path__ = []  # old packages had modules; this finder finds those, too
        vars(module)["__getattr__"] = names_of(old, warn=False)


def install() -> None:
    """Make the old import paths work, after all others. A second call changes nothing."""
    if not any(type(finder).__name__ == _MovedModules.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
