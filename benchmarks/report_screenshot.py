"""A report in a real browser: pictures at desktop and telephone width, light and dark, and what must not happen.

    python benchmarks/report_screenshot.py runs/compare/report.html pictures/

docs/report.png is pictures/report.png of this comparison, and docs/report-dark.png its dark twin. It takes a quarter of an hour on two
CPU cores:

    lorank compare --model benchmarks/shapes/llama-1m --rank 32 --method cola --method low-rank --method dense \\
        --set vocab_size=2048 --sequence-length 128 --batch-size 16 --steps 120 --warmup-steps 20 --eval-every 10 \\
        --set eval_tokens=20000 --save-every 0 --seeds 1,2,3 --sweep lr=3e-3,1e-2,3e-2 --for low-rank lr=1e-2

docs/analysis.png and docs/analysis-dark.png are those of runs/analyze-llama-2m/analysis.html, which takes ten minutes:

    lorank pretrain --model benchmarks/shapes/llama-2m --method dense --sequence-length 128 --batch-size 16 \\
        --set vocab_size=2048 --lr 3e-3 --steps 700 --warmup-steps 80 --eval-every 0 --save-every 0 \\
        --set eval_tokens=20000 --out runs/llama-2m
    lorank analyze runs/llama-2m --sequence-length 128 --budget 0.5

Needs a Chromium (apt-get install chromium). Fails if the page is wider than its window, if anything in it uses the
network, or if the script of the page fails.
"""

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = {"light": 1, "dark": 0}
FRAME = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe width="{width}" height="{height}" srcdoc="{page}"></iframe><p id="found"></p>
<script>
const frame = document.querySelector("iframe"), errors = [];
frame.contentWindow.addEventListener("error", (event) => errors.push(event.message));
frame.addEventListener("load", () => {{
  const page = frame.contentDocument.documentElement, inside = frame.contentWindow;
  for (const chart of frame.contentDocument.querySelectorAll("svg.chart")) {{
    const box = chart.getBoundingClientRect();
    if (box.width) chart.dispatchEvent(new inside.PointerEvent("pointermove", {{ clientX: box.left + box.width / 2, clientY: 9 }}));
    chart.dispatchEvent(new inside.PointerEvent("pointerleave"));
  }}
  const asked = inside.performance.getEntriesByType("resource").map((entry) => entry.name);
  found.textContent = JSON.stringify([page.scrollWidth, page.scrollHeight, asked, errors]);
}});
</script>"""


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    sys.exit("no Chromium found; install one, for example with apt-get install chromium")


def chromium(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


def shoot(report: Path, out: Path, kind: str, scheme: str) -> Path:
    """The whole page as out/KIND-SCHEME.png."""
    width, page = WIDTHS[kind], html.escape(report.read_text(), quote=True)
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.format(width=width, height=1000, page=page))
        window = f"--window-size={max(width, 500)},1000"
        seen = chromium("--virtual-time-budget=4000", window, "--dump-dom", frame.as_uri())
        found = re.search(r'<p id="found">\[(\d+),(\d+),(\[.*?\]),(\[.*?\])\]</p>', seen)
        assert found is not None, "the page did not load"
        assert int(found[1]) <= width, f"{kind}: the page is {found[1]} pixels wide in a window of {width}"
        assert found[3] == "[]", f"the page fetches {found[3]}"
        assert found[4] == "[]", f"the page's script failed: {found[4]}"
        height, picture = int(found[2]), out / f"{kind}-{scheme}.png"
        frame.write_text(FRAME.format(width=width, height=height, page=page))
        colours = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        chromium(colours, f"--window-size={width},{height}", f"--screenshot={picture}", frame.as_uri())
    return picture


def readme_picture(desktop: Path, out: Path) -> Path:
    """The first two screens of the desktop's picture side by side, in few colours."""
    from PIL import Image

    whole = Image.open(desktop).convert("RGB")
    width, height = whole.width, min(1560, whole.height // 2)
    both = Image.new("RGB", (2 * width, height))
    for column in range(2):
        both.paste(whole.crop((0, column * height, width, (column + 1) * height)), (column * width, 0))
    few = both.quantize(
        256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )  # thin lines keep their colours
    few.save(out, optimize=True)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("give the report and a folder for the pictures")
    target = Path(sys.argv[2]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    for kind in WIDTHS:
        for scheme in SCHEMES:
            print(shoot(Path(sys.argv[1]), target, kind, scheme))
    for scheme, end in (("light", ""), ("dark", "-dark")):
        print(readme_picture(target / f"desktop-{scheme}.png", target / f"report{end}.png"))
