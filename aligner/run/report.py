"""The report of a run: one HTML file with its curves, its samples before and after, and its config. Works offline."""

import html
from pathlib import Path

from aligner.run.atomic import atomic_write
from aligner.run.chart import COLORS, Series, line_chart, stacked_bars
from aligner.run.directory import CONFIG, METRICS, SAMPLES, read_jsonl

REPORT = "report.html"
MAX_SAMPLES = 40
# Title, unit, and (metric, label) of each line; a panel whose metrics the run lacks is left out.
PANELS = (
    ("Reward", "reward units", (("reward/mean", "training"), ("eval/reward/mean", "held out"))),
    ("KL to the reference", "nats per response", (("kl/mean", "training"), ("eval/kl/mean", "held out"))),
    ("Response length", "tokens", (("response_length/mean", "training"), ("eval/response_length/mean", "held out"))),
    ("Loss", "", (("loss", "training"), ("eval/loss", "held out"))),
    ("Accuracy", "share of pairs", (("accuracy", "training"), ("eval/accuracy", "held out"))),
    (
        "Implicit rewards",
        "beta times the log-ratio",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margin", "margin")),
    ),
    (
        "Divergence from the teacher",
        "nats",
        (("loss/distillation", "training"), ("eval/loss/distillation", "held out")),
    ),
    ("Distance", "nats", (("distance", "training"), ("eval/distance", "held out"))),
    ("Entropy", "nats per token", (("entropy/mean", "policy"),)),
    ("Clip fraction", "share of tokens", (("clip_fraction", "policy"),)),
    ("Value loss", "squared reward units", (("loss/value", "critic"),)),
    ("Gradient norm", "before clipping", (("grad_norm/policy", "policy"), ("grad_norm/value", "critic"))),
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1e293b;background:#f8fafc;margin:0}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:40px 0 12px}.muted,small{color:#64748b}
.tiles{display:flex;flex-wrap:wrap;gap:14px;margin:22px 0}
.tile{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:12px 18px;min-width:120px}
.tile b{display:block;font-size:21px;font-weight:600}.tile span{color:#64748b;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px}
figure{background:#fff;border:1px solid #e2e8f0;border-radius:10px;margin:0;padding:14px 16px 8px}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:#64748b}.grid{stroke:#eef2f7}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:#475569;min-height:18px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
table{border-collapse:collapse;width:100%;background:#fff;border:1px solid #e2e8f0;font-size:14px;table-layout:fixed}
th,td{text-align:left;vertical-align:top;padding:9px 12px;border-bottom:1px solid #e2e8f0}
th{background:#f1f5f9;font-weight:600}td{white-space:pre-wrap;overflow-wrap:anywhere}
col.prompt{width:24%}.chip{display:inline-block;border-radius:6px;padding:0 7px;font-size:12.5px;background:#e2e8f0}
.up{background:#dcfce7;color:#166534}.down{background:#fee2e2;color:#991b1b}
pre{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:14px;overflow:auto;font-size:13px}
summary{cursor:pointer;font-size:19px;font-weight:600;margin:40px 0 12px}
"""


def write_report(run_path: Path) -> Path:
    """Write RUN/report.html and return its path.

    run_path: a run folder with metrics.jsonl; samples.jsonl and config.yaml are used when they are there.
    Raises ValueError when the folder holds no finished step.
    """
    run_path = Path(run_path)
    if not (run_path / METRICS).is_file():
        raise ValueError(f"{str(run_path)!r} holds no {METRICS}; give the folder of a run (runs/<program>-<time>).")
    metrics = read_jsonl(run_path / METRICS)
    if not metrics:
        raise ValueError(f"{str(run_path / METRICS)!r} is empty; wait for the run's first step.")
    samples = read_jsonl(run_path / SAMPLES) if (run_path / SAMPLES).is_file() else []
    config = (run_path / CONFIG).read_text(encoding="utf-8") if (run_path / CONFIG).is_file() else ""
    name = html.escape(run_path.resolve().name)
    body = [
        f"<h1>{name}</h1>",
        _summary(metrics),
        f'<div class="charts">{"".join(_charts(metrics))}</div>',
        _eval_table([row for row in samples if row["split"] == "eval"]),
        _train_table([row for row in samples if row["split"] == "train"]),
        f"<details><summary>Config</summary><pre>{html.escape(config)}</pre></details>" if config else "",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    atomic_write(run_path / REPORT, page)
    return run_path / REPORT


def _points(metrics: list[dict], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in metrics if name in row]


def _phases(row: dict) -> dict[str, float]:
    return {name.removeprefix("time/"): value for name, value in row.items() if name.startswith("time/")}


def _summary(metrics: list[dict]) -> str:
    tiles = [("steps", f"{metrics[-1]['step']}")]
    for name, label in (
        ("eval/reward/mean", "held-out reward"),
        ("reward/mean", "training reward"),
        ("eval/accuracy", "held-out accuracy"),
        ("eval/loss", "held-out loss"),
    ):
        if points := _points(metrics, name):
            first, last = points[0][1], points[-1][1]
            tiles.append((label, f"{first:+.3f} → {last:+.3f}" if len(points) > 1 else f"{last:+.3f}"))
            break
    for name, label, form in (
        ("eval/kl/mean", "KL per held-out response, nats", "{:.2f}"),
        ("kl/mean", "KL per response, nats", "{:.2f}"),
        ("loss", "loss", "{:.4f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ):
        if (points := _points(metrics, name)) and not (name == "kl/mean" and _points(metrics, "eval/kl/mean")):
            tiles.append((label, form.format(points[-1][1])))
    if seconds := sum(sum(_phases(row).values()) for row in metrics):
        tiles.append(("time in steps", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"))
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _charts(metrics: list[dict]) -> list[str]:
    charts = []
    for title, unit, lines in PANELS:
        series = [
            Series(label=label, points=points, color=COLORS[i], dots=name.startswith("eval/"))
            for i, (name, label) in enumerate(lines)
            if (points := _points(metrics, name))
        ]
        if series:
            charts.append(line_chart(title, unit, series))
    timed = [(row["step"], _phases(row)) for row in metrics if _phases(row)]
    if timed:
        names = list(dict.fromkeys(name for _, phases in timed for name in phases))
        values = {name: [phases.get(name, 0.0) for _, phases in timed] for name in names}
        charts.append(stacked_bars("Time of a step", "seconds", [step for step, _ in timed], values))
    return charts


def _eval_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    before, after = ([row for row in rows if row["step"] == step] for step in (first, last))
    if first == last:
        return f"<h2>Held-out samples at step {first}</h2>" + _table(
            ["prompt", "response"], [[_text(r["prompt"]), _response(r)] for r in before[:MAX_SAMPLES]]
        )
    waiting: dict[str, list[dict]] = {}
    for row in after:
        waiting.setdefault(row["prompt"], []).append(row)
    pairs = [(row, waiting[row["prompt"]].pop(0)) for row in before if waiting.get(row["prompt"])]
    cells = [
        [_text(old["prompt"]), _response(old), _response(new, _change(old, new))] for old, new in pairs[:MAX_SAMPLES]
    ]
    return "<h2>Held-out samples, before and after</h2>" + _table(["prompt", f"step {first}", f"step {last}"], cells)


def _train_table(rows: list[dict]) -> str:
    if not rows:
        return ""
    last = max(row["step"] for row in rows)
    cells = [[_text(r["prompt"]), _response(r)] for r in rows if r["step"] == last][:MAX_SAMPLES]
    return f"<h2>Training samples of step {last}</h2>" + _table(["prompt", "response"], cells)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    columns = '<col class="prompt">' + "<col>" * (len(heads) - 1)
    return f"<table><colgroup>{columns}</colgroup><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _response(row: dict, change: str = "") -> str:
    return f'<span class="chip {change}">{row["reward"]:+.3f}</span> {_text(row["response"])}'


def _change(old: dict, new: dict) -> str:
    return "up" if new["reward"] > old["reward"] else "down" if new["reward"] < old["reward"] else ""


def _text(text: str) -> str:
    return html.escape(text.strip())
