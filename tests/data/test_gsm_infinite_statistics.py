"""GSM-Infinite's law: ours against the original's, each number from the text alone and with its error."""

import collections
import json
import math
import pathlib
import re

import numpy as np
import pytest

from sleep_jax.config import ConfigError
from sleep_jax.data import gsm_infinite as gsm
from sleep_jax.data.gsm_infinite import solver, tokenizer, words
from sleep_jax.data.gsm_infinite.study import comparison, reading, statistics
from sleep_jax.data.gsm_infinite.study.statistics import Estimate

DATA = pathlib.Path(__file__).parents[1] / "data"
LOST = "ref-op8-0294"  # the original lost a definition here, and no reader finds the answer
MIX = gsm.GsmInfiniteConfig(  # as the original's sample was put together
  subset="both", mode="both", templates=(0.6, 0.2, 0.2), min_tokens=2050, max_tokens=3250
)
# The original's sample of d = 3 is longer than the even lengths that it was to have (mean 2650), and so are
# its counts of words and noise, but not its tokens a sentence; and definitions got lost in it, not in ours.
KNOWN = ("tokens", "words", "characters", "sentences", "N", "noise share", "U hidden")


def readings(problems):
  return [reading.read_problem(p.question, p.context, p.num_tokens) for p in problems]


def recorded(name):
  return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


class TestReading:
  def test_roles_are_those_that_the_original_wrote_down(self):
    told_twice = 0
    for row in recorded("gsm_infinite_reference.jsonl"):
      if row["id"] == LOST:
        continue
      found = reading.sentence_roles(row["question"], row["context"])
      twice = len(set(solver.split_sentences(row["context"]))) < len(found)
      told_twice += twice
      assert sorted(found) == sorted(row["sentence_roles"]), row["id"]
      assert twice or found == row["sentence_roles"], row["id"]
    assert told_twice < 5

  def test_the_kept_readings_are_those_of_the_original_texts(self):
    kept = set((pathlib.Path(reading.__file__).parent / "reference_readings.jsonl").read_text().splitlines())
    assert len(statistics.reference_readings()) == 319
    read = 0
    for row in recorded("gsm_infinite_reference.jsonl"):
      if row["id"] != LOST:
        made = reading.read_problem(row["question"], row["context"], row["tokens_qwen"])
        assert statistics.as_json(made) in kept, row["id"]
        assert (made.op, made.depth, made.template) == (row["op"], row["d"], row["template"])
        read += 1
    assert read > 50

  def test_ours_are_read_as_they_were_made(self):
    for i in range(60):
      p = gsm.problem(MIX, 2, i)
      r = reading.read_problem(p.question, p.context, p.num_tokens)
      assert (r.op, r.depth, r.mode, r.template) == (p.op, p.depth, p.mode, p.template)
      assert reading.sentence_roles(p.question, p.context) == p.sentence_roles and r.answer == p.answer
      assert sum(r.forms.values()) == r.sentences == len(p.sentence_roles)

  def test_by_hand(self):
    context = (
      "The number of adult bear in Pine Ridge equals 2 plus the number of adult wolf in Pine Ridge. The"
      " number of adult wolf in Pine Ridge equals 3. The number of adult gecko in Coral Reef equals the"
      " sum of the total number of adult animals in Pine Ridge and the number of adult fox in Maple Creek."
      " The number of adult fox in Maple Creek equals 1"
    )
    r = reading.read_problem("What is the total number of adult animals in Pine Ridge?", context, 99)
    assert (r.op, r.depth, r.mode, r.chain, r.asked, r.answer) == (5, 2, "forward", 3, "total", 8)
    assert r.roles == {"N": 1, "S": 2, "U": 1} and (r.names_asked, r.names_needed) == (1, 1)
    assert r.forms == {"N sum": 1, "S literal": 1, "S plus one": 1, "U literal": 1}

  def test_forms_are_told_apart(self):
    said = {
      "equals 3": "literal",
      "equals the number of a in B": "copy",
      "equals 3 times the number of a in B": "times one",
      "equals 2 plus the difference between the number of a in B and the total in B": "literal with two",
      "equals the sum of the number of a in B and the number of c in B": "sum",
      "equals the sum of the number of a in B, the number of c in B, and the number of d in B": "many",
      "exists, and its number is greater than 0": "hidden",
    }
    for right, form in said.items():
      assert reading.sentence_form(f"The number of x in Y {right}") == form


class TestEstimate:
  def test_errors_are_those_of_textbooks(self):
    rng = np.random.default_rng(0)
    sample = statistics.reference_readings()[:100]
    tokens = np.array([r.tokens for r in sample])
    got = statistics.estimate(sample, "tokens")
    assert got.value == pytest.approx(tokens.mean())
    assert got.error == pytest.approx(tokens.std(ddof=1) / 10)
    # a quotient of sums, against the bootstrap
    got = statistics.estimate(sample, "names needed")
    drawn = [
      statistics.estimate([sample[i] for i in rng.integers(0, 100, 100)], "names needed").value
      for _ in range(300)
    ]
    assert got.error == pytest.approx(np.std(drawn), rel=0.2)

  def test_halves_of_one_sample_are_alike_and_other_kinds_are_not(self):
    sample = statistics.reference_readings()
    found = [statistics.deviations(sample[::2], sample[1::2], m) for m in statistics.METRICS]
    assert max(found) < 4
    two, three = ([r for r in sample if r.depth == d] for d in (2, 3))
    assert statistics.deviations(two, three, "U") > 4
    assert statistics.deviations(two, three, "tokens a sentence") > 4
    assert (
      statistics.answer_distance([r.answer for r in sample[::2]], [r.answer for r in sample[1::2]])[1] < 3
    )
    easy, hard = (
      [r.answer for r in sample if r.op in ops and r.mode == "forward"] for ops in ((1, 2), (7, 8))
    )
    assert statistics.answer_distance(easy, hard)[1] > 4

  def test_a_fact_has_the_error_of_its_sample_and_its_rounding(self):
    ours = [r for r in statistics.reference_readings() if r.op == 2 and r.depth == 2 and r.mode == "forward"]
    error, apart = statistics.against_fact("majority", 0.3, ours)
    share = (statistics.estimate(ours, "majority").value * len(ours) + 0.3 * 400) / (len(ours) + 400)
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 400), rel=0.02) and apart < 4
    assert str(Estimate(0.12345, 0.01)) == "0.123±0.010" and str(Estimate(82.14, 0.31)) == "82.1±0.3"


class TestLaw:
  """Fixed seeds: a bound of 4.5 standard errors either holds for good or shows that the law changed."""

  @pytest.mark.parametrize("num", [500, pytest.param(4000, marks=pytest.mark.slow)])
  def test_ours_is_the_original(self, num):
    made = [gsm.problem(MIX, 0, i) for i in range(num)]
    ours = readings(made)
    assert all(p.answer == r.answer for p, r in zip(made, ours, strict=True))
    theirs = statistics.reference_readings()
    for depth in (2, 3):
      for mode in ("forward", "reverse"):
        a, b = ([r for r in side if (r.depth, r.mode) == (depth, mode)] for side in (ours, theirs))
        for metric in [*statistics.METRICS, "majority"]:
          if metric not in KNOWN or (depth == 2 and metric != "U hidden"):
            assert statistics.deviations(a, b, metric) < 4.5, (depth, mode, metric)
        assert statistics.answer_distance([r.answer for r in a], [r.answer for r in b])[1] < 4.5, (
          depth,
          mode,
        )
    for op in range(1, 9):
      a, b = ([r for r in side if r.op == op] for side in (ours, theirs))
      for metric in ("S", "U", "chain", "majority", "tokens a sentence", "names asked", "names needed"):
        assert statistics.deviations(a, b, metric) < 4.5, (op, metric)
    # Sentences at equal length: 83.9 at 2695 tokens in the original, and as many in ours.
    longer = statistics.estimate(theirs, "tokens").value / statistics.estimate(ours, "tokens").value
    ratio = statistics.estimate(theirs, "sentences").value / statistics.estimate(ours, "sentences").value
    assert abs(ratio / longer - 1) < (0.02 if num >= 4000 else 0.04)
    _, found = comparison.against_facts(ours)
    assert max(found.values(), default=0) < 4.5 and (num < 4000 or len(found) > 100)

  def test_tables_say_what_differs(self):
    theirs = list(statistics.reference_readings())
    table, found = comparison.against_readings(theirs, "cell")
    assert "*" not in table and max(found.values()) == 0.0
    films = [r for r in theirs if r.template == "movie_festival_awards"]
    table, found = comparison.against_readings(films, "cell")
    (row,) = [line for line in table.splitlines() if line.startswith("| tokens a sentence")]
    assert row.count("*") == 4 and max(found.values()) > 4
    table, _ = comparison.against_readings(films, "operations")
    assert table.splitlines()[0].count("op ") == 8
    told = comparison.verdict({"a": 0.5, "b": 2.5, "U at d = 2": 5.0})
    assert told.startswith("3 comparisons, standard errors apart: 2 beyond 2")
    assert told.endswith("Beyond 3: U at d = 2 5.0")


class TestLength:
  def test_lengths_are_those_of_qwen(self):
    known = json.loads((DATA / "qwen_token_counts.json").read_text(encoding="utf-8"))
    count = tokenizer.counter("")
    assert count.exact
    for text, tokens in known["texts"]:
      assert count(text) == count.whole(text) == tokens
    for name, template in words.TEMPLATES.items():
      for field, sums in known["names"][name].items():
        assert [sum(count(f" {x}") for x in group) for group in getattr(template, field)] == sums

  def test_problems_have_the_length_that_they_say(self):
    for i in range(20):
      p = gsm.problem(MIX, 1, i)
      assert p.num_tokens == tokenizer.counter("").whole(p.text)

  def test_the_table_is_that_of_all_phrases(self, tmp_path):
    trained = tokenizer.train(words.phrases(), 2000)
    table = tokenizer.lengths(trained, words.phrases())
    assert min(table.values()) == 2 and len(table) > 100
    kept = json.loads((pathlib.Path(tokenizer.__file__).parent / "qwen_lengths.json").read_text())
    pieces = {piece for text in words.phrases() for piece in tokenizer.pieces(text)}
    assert set(kept) <= pieces  # nothing is kept that no problem has


class TestModulus:
  # The command line's defaults of the original: R = 23 and p = 23.
  CFG = gsm.GsmInfiniteConfig(
    subset="medium", operations=(2, 8), number_range=23, modulus=23, noise=False, templates=(1, 0, 0)
  )

  def test_answers_are_even_as_the_originals(self):
    """The original: nearly uniform on 1..22, 0..22 for larger op, and a majority baseline of 0.06-0.08."""
    for op in (2, 6, 8):
      made = [gsm.problem(self.CFG, 0, i, op=op) for i in range(400)]
      for p in made[:60]:
        assert gsm.solve(p.question, p.context, 23) == p.answer
        assert gsm.count_operations(p.question, p.context) == op
      counted = collections.Counter(p.answer for p in made)
      assert set(counted) <= set(range(23)) and len(counted) >= 22
      assert max(counted.values()) / 400 < 0.08 + 4 * math.sqrt(0.08 / 400)

  def test_it_changes_answers_and_solutions_say_so(self):
    larger = wrapped = 0
    for i in range(80):
      p = gsm.problem(self.CFG, 0, i, op=8)
      whole = gsm.solve(p.question, p.context)
      larger += not 0 <= whole < 23
      wrapped += whole != p.answer
      assert p.answer == whole % 23
      assert p.solution.count(" (mod 23).") == p.solution.count("Define")
      assert re.search(r"Answer: (\d+)\.$", p.solution)[1] == str(p.answer)
    assert larger == wrapped > 20

  def test_without_one_nothing_is_said(self):
    assert gsm.GsmInfiniteConfig().modulus == -1
    assert "mod" not in gsm.problem(gsm.GsmInfiniteConfig(noise=False), 0, 0).solution

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      ({"modulus": 0}, r"^data.modulus: must be -1 \(none\) or at least data.number_range = 5, got 0$"),
      ({"modulus": 4}, r"^data.modulus: must be -1 \(none\) or at least data.number_range = 5, got 4$"),
      (
        {"modulus": 23, "mode": "both"},
        r"^data.modulus: needs data.mode = forward and word problems, got both",
      ),
      ({"modulus": 23, "subset": "symbolic"}, r"^data.modulus: needs data.mode = forward and word problems"),
    ],
  )
  def test_what_cannot_be_is_one_line(self, changes, message):
    with pytest.raises(ConfigError, match=message):
      gsm.GsmInfiniteConfig(**changes)


class TestSymbolic:
  """Against the 80 problems of the original's sample, 10 for each number of operations."""

  CFG = gsm.GsmInfiniteConfig(subset="symbolic")

  def parts(self, question, context):
    """Forms, size of the answer, share of the core, and the root's number, of a text."""
    said = solver.split_sentences(context)
    numbers = [int(s.rpartition(" = ")[2]) for s in said if re.fullmatch(r"assign V\d{6} = -?\d+", s)]
    forms = collections.Counter(
      sign[1] if (sign := re.search(r" ([+-]) 1$", s)) else "copy"
      for s in said
      if not s[-1:].isdigit() or " V" in s
    )
    size = len(gsm.solve(question, context))
    return forms, size, gsm.count_operations(question, context), numbers, len(said)

  def test_it_has_the_law_of_the_original(self):
    theirs = [
      self.parts(r["question"], r["context"]) for r in recorded("gsm_infinite_symbolic_reference.jsonl")
    ]
    ours = []
    for i in range(400):
      p = gsm.problem(self.CFG, 0, i, op=1 + i % 8)
      ours.append(self.parts(p.question, p.context))
      assert p.num_tokens == tokenizer.counter("").whole(p.text)
    for side in (ours, theirs):
      forms = sum((part[0] for part in side), collections.Counter())
      for sign in ("copy", "+", "-"):
        share, total = forms[sign] / forms.total(), forms.total()
        assert abs(share - 1 / 3) < 4.5 * math.sqrt(2 / 9 / total), (sign, share)
      roots = [n for part in side for n in part[3]]
      assert len(roots) == len(side) and 0 <= min(roots) and max(roots) <= 10
      assert abs(np.mean(roots) - 5) < 4.5 * math.sqrt(10 / len(roots))
    for op in range(1, 9):
      a, b = ([part[1] for part in side if part[2] == op] for side in (ours, theirs))
      spread = np.std(a) * math.sqrt(1 / len(a) + 1 / len(b))
      assert len(a) == 50 and abs(np.mean(a) - np.mean(b)) <= 4.5 * spread, op
    # statements of a problem: 2,000 to 3,300 tokens on both sides, 19 tokens a statement
    a, b = ([part[4] for part in side] for side in (ours, theirs))
    assert abs(np.mean(a) - np.mean(b)) < 4.5 * np.std(a) * math.sqrt(1 / len(a) + 1 / len(b))
