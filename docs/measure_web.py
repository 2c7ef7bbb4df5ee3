"""Measure the page without a server: sizes, and milliseconds per image in Chromium and in ONNX Runtime for Python.

    python docs/measure_web.py outputs/demo

prints the table of docs/web.md. The ViT-S has random weights, which do not affect the time. Timing is interleaved: each round measures
Chromium and ONNX Runtime with one and with two threads. It needs an idle machine, Chromium and playwright.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from clca import CLCAViTConfig, CLCAViTForImageClassification
from ufgir.profiling.macs import dense_config
from ufgir.transforms.preprocessing import make_image_processor, read_image_processor
from ufgir.web.server import make_server
from ufgir.web.site import Site, build_site


VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 200}
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
THREADS = (1, 2)
PATIENCE = 300_000  # milliseconds


def models(demo: Path) -> dict[str, tuple[CLCAViTForImageClassification, object]]:
    """Return the models to measure: the demo, and a ViT-S without and with reduction."""
    torch.manual_seed(0)
    trained = CLCAViTForImageClassification.from_pretrained(demo).eval()
    plain = CLCAViTForImageClassification.from_pretrained(
        demo, config=dense_config(trained.config), ignore_mismatched_sizes=True
    )
    reduced = CLCAViTConfig(**VIT_S, **CLCA, reduction="evit", keep_rate=0.1, reduction_layers=[3, 6, 9])
    small, large = read_image_processor(demo), make_image_processor(224)
    return {
        "demo, dense": (plain.eval(), small),
        "demo, EViT + CLCA 0.5": (trained, small),
        "ViT-S, dense": (CLCAViTForImageClassification(dense_config(reduced)).eval(), large),
        "ViT-S, EViT + CLCA 0.1": (CLCAViTForImageClassification(reduced).eval(), large),
    }


class Native:
    """Model in ONNX Runtime in this process."""

    def __init__(self, site: Site, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        path = site.folder / site.graphs[0][0]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        shape = self.session.get_inputs()[0].shape
        self.feeds = {"pixel_values": np.random.default_rng(0).normal(size=shape).astype("f4")}

    def times(self, count: int = 5) -> list[float]:
        """Return the milliseconds of each run, after a warm-up."""
        found = []
        for _ in range(1 + count):
            start = time.perf_counter()
            self.session.run(None, self.feeds)
            found.append(1e3 * (time.perf_counter() - start))
        return found[1:]


def browser_times(page: Page, image: Path) -> list[float]:
    """Return the milliseconds of each run in the browser, as measured by the page."""
    panel = page.locator("#panel-A")
    shown = int(panel.get_attribute("data-shown") or 0)
    panel.get_by_label("Choose an image").set_input_files(image)
    expect(panel).to_have_attribute("data-shown", str(shown + 1), timeout=PATIENCE)
    return page.evaluate("globalThis.ufgir.A.times")


def measure(site: Site, chromium: str, image: Path, rounds: int) -> dict[tuple[str, int], float]:
    """Return (runtime, number of threads) -> median milliseconds."""
    found: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        server = stack.enter_context(make_server(site.folder, 0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        stack.callback(browser.close)
        pages = {}
        for threads in THREADS:
            page = browser.new_context(bypass_csp=True, service_workers="block").new_page()
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/?threads={threads}")
            ready = re.compile(rf"with {threads} thread")
            expect(page.locator("#status")).to_have_text(ready, timeout=PATIENCE)
            pages[threads] = page
        native = {threads: Native(site, threads) for threads in THREADS}
        for _ in range(rounds):
            for threads in THREADS:
                found.setdefault(("Chromium", threads), []).extend(browser_times(pages[threads], image))
                found.setdefault(("native", threads), []).extend(native[threads].times())
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the trained demo model")
    parser.add_argument("--rounds", type=int, default=6, help="of five timed runs each [%(default)s]")
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16", "int8"])
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    say = sys.stdout.write
    say(
        "| model | weights | GMACs | model, MB | page, MB (gzip) | Chromium, 1 thread, ms | 2 threads | ONNX Runtime, 1 thread, ms | 2 threads | Chromium / native | 1 / 2 threads |\n"
    )
    say("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "leaf.png")
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
        ratios = {}
        for name, (model, processor) in models(args.demo).items():
            for precision in args.precisions:
                # logits of random weights in int8 differ a lot, which does not affect the time
                site = build_site(model, processor, Path(folder, name.replace(" ", "_") + precision), None, precision)
                found = measure(site, args.chromium, image, args.rounds)
                sizes = site.sizes
                weights = sum(size for file, (size, _) in sizes.items() if file.startswith("model/"))
                page, packed = (sum(size[kind] for size in sizes.values()) for kind in (0, 1))
                macs = site.graphs[0][1].macs / 1e9
                one, two = (found["Chromium", threads] for threads in THREADS)
                cells = [
                    name,
                    precision,
                    f"{macs:.3g}",
                    f"{weights / 1e6:.1f}",
                    f"{page / 1e6:.1f} ({packed / 1e6:.1f})",
                ]
                cells += [f"{value:.1f}" for value in (one, two, found["native", 1], found["native", 2])]
                cells += [f"{one / found['native', 1]:.1f}", f"{one / two:.2f}"]
                say(f"| {' | '.join(cells)} |\n")
                sys.stdout.flush()
                ratios[name, precision] = (macs, one)
        say(
            "\nRealised share of the GMAC ratio in Chromium, one thread (dense ms / reduced ms over dense GMACs / reduced GMACs):\n\n"
        )
        names = list(models(args.demo))
        for dense, reduced in ((names[0], names[1]), (names[2], names[3])):
            for precision in args.precisions:
                (macs, ms), (fewer, less) = ratios[dense, precision], ratios[reduced, precision]
                say(
                    f"- {reduced}, {precision}: {ms / less:.2f} of {macs / fewer:.2f}, {(ms / less) / (macs / fewer):.2f}\n"
                )
    processor_name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    say(
        f"\n{processor_name}, {os.cpu_count()} cores, {datetime.date.today()}; load {load:.1f} before, {os.getloadavg()[0]:.1f} after.\n"
    )


if __name__ == "__main__":
    main()
