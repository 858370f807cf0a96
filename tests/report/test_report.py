"""The page claims what the numbers say, escapes what it was given, and loads nothing."""

import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sleep_jax.report import accuracy, changes, claims, diagram, load, page, tables
from tests.report import fake_runs

ENV = {
  "command": ["/somewhere/experiments/rule110.py", "--config=a.py:tiny", "--workdir=work/a b"],
  "versions": {"python": "3.12.1", "jax": "0.12.0"},
  "host": "secret-host",
  "platform": "Linux",
}


def runs_of(tmp_path, *specs, **settings):
  """Writes and reads runs given as (N, final exact, seed); `settings` go to all of them."""
  for i, (passes, exact, *seed) in enumerate(specs):
    points = [(200, exact / 2), (400, exact)]
    fake_runs.write(tmp_path / f"run{i}", passes, points, seed=seed[0] if seed else 0, **settings)
  return fake_runs.read(tmp_path / "run*")


def written(tmp_path, found, **options) -> str:
  return page.write_html(tmp_path / "out" / "page.html", found, **options).read_text()


def visible(text: str) -> str:
  """The page's text without tags, on one line, with ordinary spaces."""
  return re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.S)))


# ---- claims --------------------------------------------------------------------------------------


def test_the_order_holds(tmp_path):
  said = claims.claim(runs_of(tmp_path, (1, 0.38), (2, 0.92), (4, 0.98)))
  assert said == (
    "After the same 1.33 M training tokens, more passes of sleep gave more exact answers (N = 1 < 2 < 4): "
    "N = 1: 38.0 %, N = 2: 92.0 %, N = 4: 98.0 % (best constant answer 27.8 %; one seed)."
  )


def test_the_order_does_not_hold(tmp_path):
  said = claims.claim(runs_of(tmp_path, (1, 0.38), (2, 0.92), (4, 0.76)))
  assert "the order N = 1 < 2 < 4 does not hold" in said
  assert said.endswith("N = 4 is 16.0 points below N = 2.")
  assert "more passes of sleep gave more" not in said


def test_a_small_difference_is_none(tmp_path):
  said = claims.claim(runs_of(tmp_path, (1, 0.38), (2, 0.975), (4, 0.98)))
  assert "does not hold" in said and "N = 2 and N = 4 are less than 2 points apart" in said
  said = claims.claim(runs_of(tmp_path / "b", (1, 0.970), (2, 0.975), (4, 0.98)))
  assert "sleep made no clear difference" in said


def test_more_sleep_is_worse(tmp_path):
  said = claims.claim(runs_of(tmp_path, (1, 0.9), (2, 0.5)))
  assert "does not hold" in said and "N = 2 is 40.0 points below N = 1" in said


def test_nobody_beats_the_constant(tmp_path):
  found = runs_of(tmp_path, (1, 0.27), (2, 0.285))
  said = claims.claim(found)
  assert "no N is clearly above guessing" in said and "27.8 %" in said
  assert claims.compute_claim(found) == ""


def test_sleep_that_gains_nothing_saves_no_tokens(tmp_path):
  compute = claims.compute_claim(runs_of(tmp_path, (1, 0.9), (2, 0.5)))
  assert "N = 1, with the only Muon learning rate tried, is ahead of N = 2" in compute
  assert "saves" not in compute


def test_a_single_run_says_nothing_about_sleep(tmp_path):
  found = runs_of(tmp_path, (4, 0.98))
  assert claims.claim(found).startswith(
    "Only N = 4 was run, so nothing can be said about the effect of sleep"
  )
  assert claims.compute_claim(found) == ""


def test_runs_without_an_evaluation_claim_nothing(tmp_path):
  fake_runs.write(tmp_path / "a", 4, [])
  found = fake_runs.read(tmp_path / "a")
  assert "claims nothing" in claims.claim(found)
  assert "claims nothing" in visible(written(tmp_path, found))


def test_tokens_are_equal_though_one_run_went_on(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(400, 0.38), (1600, 0.99)], steps=1600)
  fake_runs.write(tmp_path / "n4", 4, [(400, 0.98)])
  said = claims.claim(fake_runs.read(tmp_path / "n*"))
  assert "1.33 M" in said and "N = 1: 38.0 %" in said and "99.0" not in said


def test_seeds_are_averaged_and_counted(tmp_path):
  found = runs_of(tmp_path, (1, 0.36, 0), (1, 0.48, 1), (4, 0.98, 0), (4, 0.46, 1))
  assert "N = 1: 42.0 %, N = 4: 72.0 %" in claims.claim(found)
  assert "means over 2 seeds" in claims.claim(found)
  notes = claims.caveats(found)
  assert "Accuracy rises with every step of N in 1 of 2 seeds." in notes
  apart = (
    "Distance to N = 1 in the same seeds, with its 95 % interval: N = 4: +30.0 points (-100.0 to +100.0)."
  )
  assert apart in notes  # two seeds, 62 and -2 points: nothing is settled


@pytest.mark.parametrize(
  ("plain", "said"),
  [
    (0.53, "is behind N = 4 (53.0 % against 98.0 %"),
    (0.99, "is level with N = 4"),
    (1.0, "is ahead of N = 4"),
  ],
)
def test_equal_compute_takes_the_best_learning_rate_of_the_plain_model(tmp_path, plain, said):
  last = {1.0: 0.90}.get(plain, 0.98)
  fake_runs.write(tmp_path / "n1_bad", 1, [(400, 0.38), (1600, 0.40)], steps=1600)
  fake_runs.write(tmp_path / "n1", 1, [(400, 0.42), (1600, plain)], lr=0.01, steps=1600)
  fake_runs.write(tmp_path / "n4", 4, [(100, 0.4), (400, last)])
  found = fake_runs.read(tmp_path / "n*")
  compute = claims.compute_claim(found)
  assert "with the best of 2 Muon learning rates" in compute and said in compute
  assert ("saves there is training tokens, not compute" in compute) == (plain > 0.9)
  assert "more passes of sleep gave more exact answers" in claims.claim(found)  # at equal tokens all the same
  assert compute in visible(written(tmp_path, found))


def test_cpu_seconds_are_not_compared_on_an_accelerator_and_passes_are(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(400, 0.38)], env={"backend": "gpu"})
  fake_runs.write(tmp_path / "n4", 4, [(100, 0.6)], env={"backend": "gpu"}, steps=100)
  found = fake_runs.read(tmp_path / "n*")
  assert "is behind N = 4 (38.0 % against 60.0 % after 400 passes)" in claims.compute_claim(found)
  assert tables.equal_compute_table(found) == []
  assert "CPU seconds do not measure their compute" in visible(written(tmp_path, found))


def test_what_else_was_changed_is_said(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(400, 0.38)], lr=0.01)
  fake_runs.write(tmp_path / "n4", 4, [(400, 0.98)], extra=[{"kind": "done", "step": 400}])
  notes = claims.caveats(fake_runs.read(tmp_path / "n*"))
  assert "One seed: another may order the runs differently." in notes
  assert "The runs compared differ in more than N: N = 1, Muon lr 0.01; N = 4, Muon lr 0.003." in notes
  assert "Not finished, or stopped: n1." in notes


def test_tasks_are_never_mixed(tmp_path):
  fake_runs.write(tmp_path / "a1", 1, [(400, 0.9)], t=2)
  fake_runs.write(tmp_path / "a2", 1, [(400, 0.3)], t=8)
  assert "t = 2: 90.0 %; t = 8: 30.0 %" in claims.claim(fake_runs.read(tmp_path / "a*"))
  fake_runs.write(tmp_path / "a3", 4, [(400, 0.8)], t=8)
  said = claims.claim(fake_runs.read(tmp_path / "a*"))
  assert said.startswith("t = 2: Only N = 1 was run") and "t = 8: After the same" in said
  assert "N = 1: 30.0 %, N = 4: 80.0 %" in said


# ---- the page ------------------------------------------------------------------------------------


class Loads(HTMLParser):
  """Collects everything that a browser would fetch or run, and checks that tags close."""

  VOID = ("meta", "img", "rect", "path")

  def __init__(self):
    super().__init__()
    self.fetched, self.open, self.images = [], [], 0

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    if tag in ("script", "link", "iframe", "object", "embed", "base"):
      self.fetched.append(tag)
    for name, value in attrs:
      if name in ("src", "href", "srcset", "data", "action", "xlink:href") and not value.startswith("data:"):
        self.fetched.append(value)
      self.images += name == "src"

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_is_self_contained(tmp_path):
  for passes in (1, 4):
    extra = [fake_runs.sleep_row(400, 2, passes)]
    fake_runs.write(tmp_path / f"n{passes}", passes, [(200, 0.3), (400, 0.2 * passes)], extra=extra, env=ENV)
  found = fake_runs.read(tmp_path / "n*")
  drawn = {"curves": [accuracy.demo_curves(found)], "about_sleep": [changes.sleep_changes(found)]}
  text = written(tmp_path, found, **drawn)
  parsed = Loads()
  parsed.feed(text)
  assert parsed.fetched == [] and parsed.open == [] and parsed.images == 2
  assert (
    "Windows are read one after the other" in text and "not measured." not in text
  )  # the diagram of sleep
  assert not re.search(r"https?://|url\((?!#)|@import", text)
  assert "default-src 'none'" in text
  assert "prefers-color-scheme: dark" in text


def test_the_page_shows_what_is_needed_to_repeat_the_runs(tmp_path):
  found = runs_of(tmp_path, (1, 0.38), (4, 0.98), env=ENV)
  text = visible(written(tmp_path, found))
  assert "python -m experiments.rule110 --config=a.py:tiny '--workdir=work/a b'" in text
  assert re.sub(r"\s+", " ", json.dumps(found[0].config, indent=2)) in text
  assert "versions.jax: 0.12.0" in text
  assert "secret-host" not in text
  assert "38.0 %" in text and "98.0 %" in text
  assert "make them so" in visible(written(tmp_path, found, command="make them so"))


def test_what_was_not_recorded_is_said(tmp_path):
  text = visible(written(tmp_path, runs_of(tmp_path, (1, 0.38), (4, 0.98))))
  assert "The command was not recorded." in text
  assert "How much S changed in each pass: not measured." in text
  assert text.count("not measured") > 3


def test_values_are_escaped(tmp_path):
  evil = "<script>alert(1)</script>"
  fake_runs.write(
    tmp_path / evil.replace("/", "_"), 1, [(400, 0.4)], boundary=evil, env={"versions": {evil: evil}}
  )
  (path,) = [p for p in tmp_path.iterdir() if p.is_dir()]
  text = written(tmp_path, fake_runs.read(path), title=evil, command=evil)
  assert "<script" not in text
  assert html.escape(evil) in text


def test_no_runs_are_an_error(tmp_path):
  with pytest.raises(load.RunError):
    page.write_html(tmp_path / "page.html", [])


@pytest.mark.parametrize("windows", [1, 2, 3, 9])
def test_the_diagram_shows_each_window_asleep_and_the_question_awake(windows):
  text = diagram.standalone(windows, "4")
  root = ElementTree.fromstring(text)
  said = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
  shown = [1, 2, windows] if windows > 3 else list(range(1, windows + 1))
  assert [s for s in said if s.startswith("window ")] == [f"window {w}" for w in shown]
  assert said.count("\N{MULTIPLICATION SIGN} 4") == said.count("writes") == len(shown)
  assert said.count("S") == len(shown) + 1 and said.count("reads") == 1
  assert text.count('marker-end="url(#accent)"') == 2 * len(shown) + 1  # S goes on once from each window
  assert "var(" not in text and "url(#" in text and not re.search(r"https?://(?!www\.w3\.org)", text)
  assert "var(--accent)" in diagram.inline(windows, "4")
