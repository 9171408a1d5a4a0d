"""The report: self-contained, escaped, right about which samples are paired, and drawn at the right place."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from aligner.run.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, stacked_bars
from aligner.run.report import write_report


class Page(HTMLParser):
    """Collects tags and text; an unescaped sample would show up as a tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


def write_run(path, metrics, samples=(), config="steps: 1\n"):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples:
        (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (path / "config.yaml").write_text(config)
    return path


def sample(step, split, prompt, response, reward):
    return {"step": step, "split": split, "prompt": prompt, "response": response, "reward": reward}


STEP = {
    "reward/mean": 0.5, "kl/mean": 1.0, "response_length/mean": 20.0, "entropy/mean": 2.5, "clip_fraction": 0.1,
    "time/sample": 3.0, "time/refit": 1.0,
}  # fmt: skip


def test_before_and_after_are_paired_by_prompt(tmp_path):
    samples = [
        sample(0, "eval", "p1", "old one", -1.0),
        sample(0, "eval", "p2", "old two", 2.0),
        sample(5, "eval", "p1", "halfway", 9.0),
        sample(8, "eval", "p2", "new two", 1.0),
        sample(8, "eval", "p1", "new one", 3.0),
        sample(7, "train", "t", "early train", 0.0),
        sample(8, "train", "t", "late train", 0.0),
    ]
    metrics = [{"step": 0, "eval/reward/mean": 0.5}, {"step": 8, **STEP, "eval/reward/mean": 2.0, "eval/kl/mean": 3.25}]
    text = write_report(write_run(tmp_path / "run", metrics, samples)).read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    assert [re.sub("(<[^>]*>)+", "|", row) for row in rows] == [
        "|prompt|step 0|step 8|",
        "|p1|-1.000| old one|+3.000| new one|",
        "|p2|+2.000| old two|+1.000| new two|",
        "|prompt|response|",
        "|t|+0.000| late train|",
    ]
    assert 'class="chip up">+3.000' in text and 'class="chip down">+1.000' in text
    assert "+0.500 \u2192 +2.000" in text and "<b>3.25</b><span>KL per held-out response, nats" in text
    assert "halfway" not in text and "early train" not in text


def test_text_is_escaped_and_nothing_is_fetched(tmp_path):
    evil = "<script>alert(1)</script> & <img src=http://x.y/z>"
    run = write_run(tmp_path / "run", [{"step": 1, **STEP}], [sample(1, "train", evil, evil, 0.0)], f"name: {evil}\n")
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags and "img" not in page.tags and page.links == []
    assert page.words.count(evil) == 1 and f" {evil}" in page.words and f"name: {evil}\n" in page.words


def test_one_step_with_nothing_but_a_loss(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.75}])
    page = Page(write_report(run).read_text())
    assert page.tags.count("svg") == 1 and "0.7500" in page.words


def test_a_whole_run_has_every_panel_and_stays_small(tmp_path):
    metrics = [{"step": step, **STEP, "loss/value": 1.0 / step} for step in range(1, 3001)]
    path = write_report(write_run(tmp_path / "run", metrics))
    page = Page(path.read_text())
    titles = ["Reward", "KL to the reference", "Response length", "Entropy", "Clip fraction", "Value loss"]
    assert [word for word in page.words if word in titles] == titles and "Time of a step" in page.words
    assert path.stat().st_size < 1_500_000


def test_a_folder_without_metrics(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl; give the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        write_report(tmp_path)


def svg(panel):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", panel, re.DOTALL).group())


def test_line_chart_spans_the_plot():
    tree = svg(line_chart("t", "u", [Series(label="a", points=[(0, 0.0), (5, 10.0), (10, 5.0)], color="red")]))
    points = [tuple(map(float, p.split(","))) for p in tree.find("polyline").get("points").split()]
    middle, center = (TOP + HEIGHT - BOTTOM) / 2, (LEFT + WIDTH - RIGHT) / 2
    assert points == [(LEFT, HEIGHT - BOTTOM), (center, TOP), (WIDTH - RIGHT, middle)]
    assert [t.text for t in tree.iter("title")] == ["step 0: a 0", "step 5: a 10", "step 10: a 5"]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9, 1e12])
def test_line_chart_of_a_constant_stays_inside(value):
    tree = svg(line_chart("t", "u", [Series(label="a", points=[(4, value), (5, value)], color="red")]))
    for spot in tree.iter("circle"):
        assert TOP <= float(spot.get("cy")) <= HEIGHT - BOTTOM


def test_stacked_bars_stand_on_each_other():
    tree = svg(stacked_bars("t", "seconds", [1, 2], {"a": [1.0, 2.0], "b": [3.0, 2.0]}))
    first_a, _, first_b, _ = tree.findall("rect")
    height = HEIGHT - TOP - BOTTOM
    assert float(first_a.get("height")) == pytest.approx(height / 4, abs=0.1)
    assert float(first_b.get("height")) == pytest.approx(height * 3 / 4, abs=0.1)
    assert float(first_b.get("y")) + float(first_b.get("height")) == pytest.approx(float(first_a.get("y")), abs=0.1)


def test_many_bars_are_averaged_in_groups():
    tree = svg(stacked_bars("t", "seconds", list(range(1, 321)), {"a": [1.0, 3.0] * 160}))
    bars = tree.findall("rect")
    assert len(bars) == 160 and bars[0].find("title").text == "step 2: a 2 seconds"
