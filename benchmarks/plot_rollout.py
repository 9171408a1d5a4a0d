"""Draws docs/images/sampling.png from the newest rows of results/rollout.csv; needs matplotlib."""

import csv
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    curves: dict[str, dict[int, float]] = {}
    with (ROOT / "benchmarks/results/rollout.csv").open() as file:
        for row in csv.DictReader(file):
            if row["shape"].endswith(" 64 in 64 out"):
                batch = int(row["shape"].split()[0][1:])
                name = f"{row['impl']} {row['dtype']}"
                curves.setdefault(name, {})[batch] = 64 * batch / float(row["seconds_median"])  # later rows replace
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for name, points in sorted(curves.items()):
        batches = sorted(points)
        style = "o-" if name.startswith("native") else "s--"
        axes.plot(batches, [points[b] for b in batches], style, label=name, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(BATCHES, [str(b) for b in BATCHES])
    rates = [2**k for k in range(5, 12)]
    axes.set_yticks(rates, [str(r) for r in rates])
    axes.set_xlabel("sequences at once")
    axes.set_ylabel("new tokens per second")
    axes.set_title("SmolLM2-135M, 64 tokens in, 64 out, greedy, prefill included", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/sampling.png", dpi=110)


if __name__ == "__main__":
    main()
