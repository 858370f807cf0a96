"""What the numbers allow one to say: sentences made from runs, so that no page claims more than they show."""

import dataclasses
import itertools
from collections.abc import Sequence

from sleep_jax.report import intervals
from sleep_jax.report.curves import constant, settings
from sleep_jax.report.load import Run, is_number
from sleep_jax.report.tables import amount, budgets, reached

# Percentage points under which two accuracies count as the same: about two standard errors of the
# difference of two rates on some thousand held-out sequences.
TOLERANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Standing:
  """The best setting of one N at some budget: its label, its runs and their exact accuracies in per cent."""

  num_passes: int
  label: str
  runs: tuple[Run, ...]
  exact: tuple[float, ...]

  @property
  def mean(self) -> float:
    """Mean over the runs."""
    return sum(self.exact) / len(self.exact)

  @property
  def rank(self) -> tuple[int, float]:
    """What the best is the highest of: first the runs, or one lucky seed would beat the mean of five."""
    return len(self.exact), self.mean


def standings(runs: Sequence[Run], by: str, budget: float | None) -> list[Standing]:
  """The best setting of each N once `budget` is spent (`by`: of `tables.spent`), ordered by N.

  Best is the highest mean over seeds among the settings with most seeds, for every N alike. Runs that ended
  before the budget do not count. None are known where nobody measured it (`budget` None).
  """
  best: dict[int, Standing] = {}
  if budget is None:
    return []
  for label, members in settings(runs):
    at = [(r, row) for r in members if (row := reached(r, budget, by)) is not None]
    if not at or members[0].num_passes is None:
      continue
    here = Standing(
      members[0].num_passes, label, tuple(r for r, _ in at), tuple(100 * x["exact"] for _, x in at)
    )
    if here.num_passes not in best or here.rank > best[here.num_passes].rank:
      best[here.num_passes] = here
  return [best[n] for n in sorted(best)]


def claim(runs: Sequence[Run]) -> str:
  """What the runs show about N at equal training tokens: one sentence a task."""
  tasks = _tasks(runs)
  if not tasks:
    return "No run has been evaluated yet, so this page claims nothing."
  if len(tasks) > 1 and len(passes := {r.num_passes for r in runs if r.evals}) == 1:
    found = "; ".join(f"{name}: {_percent(_last(members))}" for name, members in tasks)
    only = f"Only N = {passes.pop()} was run, so these runs compare tasks, not sleep."
    return f"{only} Exact answers at the end: {found}."
  return " ".join((f"{name}: " if len(tasks) > 1 else "") + _claim(members) for name, members in tasks)


def _claim(runs: Sequence[Run]) -> str:
  budget = budgets(runs, "tokens")[1]
  found = standings(runs, "tokens", budget)
  if budget is None or not found:
    return "The runs name no N, so nothing can be said about sleep."
  values = ", ".join(f"N = {s.num_passes}: {_percent(s.mean)}" for s in found)
  floor = constant(runs)
  seeds = {len(s.runs) for s in found}
  basis = [
    f"best constant answer {_percent(floor)}" if floor is not None else "best constant answer not measured"
  ]
  basis.append(
    "one seed" if seeds == {1} else f"means over {'-'.join(map(str, sorted({min(seeds), max(seeds)})))} seeds"
  )
  after, basis = f"{amount(budget)} training tokens", "; ".join(basis)
  if len(found) == 1:
    return (
      f"Only N = {found[0].num_passes} was run, so nothing can be said about the effect of sleep: "
      f"it gives {_percent(found[0].mean)} exact answers after {after} ({basis})."
    )
  if _is_guessing(found):
    return f"After the same {after} no N is clearly above guessing, so nothing shows yet: {values} ({basis})."
  order = "N = " + " < ".join(str(s.num_passes) for s in found)
  verdicts = [_compare(a, b) for a, b in itertools.pairwise(found)]
  if not any(verdicts):
    return (
      f"After the same {after}, more passes of sleep gave more exact answers ({order}): {values} ({basis})."
    )
  ends = f"{values} ({basis}); {', and '.join(v for v in verdicts if v)}."
  if all(b.mean - a.mean >= TOLERANCE for a, b in itertools.pairwise(found)):
    return f"After the same {after}, the means rise with N ({order}): {ends}"
  if max(s.mean for s in found) - min(s.mean for s in found) < TOLERANCE:
    return f"After the same {after}, sleep made no clear difference: {ends}"
  return f"After the same {after}, the order {order} does not hold: {ends}"


def _compare(less: Standing, more: Standing) -> str:
  """Empty if `more` sleep is clearly better, else what is the case."""
  gain = more.mean - less.mean
  unsettled = _unsettled(less, more)
  if unsettled and abs(gain) >= TOLERANCE:
    return f"{unsettled} do not tell N = {less.num_passes} and N = {more.num_passes} apart"
  if gain >= TOLERANCE:
    return ""
  if gain <= -TOLERANCE:
    return f"N = {more.num_passes} is {-gain:.1f} points below N = {less.num_passes}"
  return f"N = {less.num_passes} and N = {more.num_passes} are less than {TOLERANCE:g} points apart"


def _gains(less: Standing, more: Standing) -> list[float]:
  """Points by which `more` is above `less`, in each seed that both were run with."""
  before = {r.seed: y for r, y in zip(less.runs, less.exact, strict=True)}
  return [y - before[r.seed] for r, y in zip(more.runs, more.exact, strict=True) if r.seed in before]


def _unsettled(less: Standing, more: Standing) -> str:
  """ "3 seeds" if the 95 % interval of the gain in so many seeds holds 0; "" if not, and for one seed."""
  gains = _gains(less, more)
  low, high = intervals.of_mean(gains)
  return f"{len(gains)} seeds" if low <= 0.0 <= high else ""


def compute_claim(runs: Sequence[Run]) -> str:
  """Whether N = 1 catches up when it may make as many passes asleep; "" if the runs cannot tell.

  Each N > 1 is compared with the best setting of N = 1 at the most passes (steps times N) that both made.
  """
  sentences = []
  tasks = _tasks(runs)
  for name, members in tasks:
    plain = [r for r in members if r.num_passes == 1]
    verdicts: dict[str, list[str]] = {
      "is behind": [], "is level with": [], "is ahead of": [], "is not clearly apart from": [],
    }  # fmt: skip
    tokens_saved = False
    for passes in sorted({r.num_passes for r in members if r.num_passes and r.num_passes > 1}):
      pair = plain + [r for r in members if r.num_passes == passes]
      gains, both, budget = {}, [], None
      for by in ("tokens", "passes"):
        budget = budgets(pair, by)[1]
        both = standings(pair, by, budget)
        gains[by] = both[1].mean - both[0].mean if len(both) == 2 else None
      if budget is None or gains["passes"] is None or _is_guessing(both):
        continue
      verdict = "is behind"
      if abs(gains["passes"]) >= TOLERANCE and _unsettled(*both):
        verdict = "is not clearly apart from"
      elif gains["passes"] < TOLERANCE:
        verdict = "is ahead of" if gains["passes"] <= -TOLERANCE else "is level with"
        tokens_saved |= gains["tokens"] is not None and gains["tokens"] >= TOLERANCE
      values = f"{_percent(both[0].mean)} against {_percent(both[1].mean)} after {budget:,.0f} passes"
      verdicts[verdict].append(f"N = {passes} ({values})")
    parts = [f"{verdict} {_listed(items)}" for verdict, items in verdicts.items() if items]
    if not parts:
      continue
    rates = len({r.get("optim.muon_lr") for r in plain})
    tried = f"the best of {rates} Muon learning rates" if rates > 1 else "the only Muon learning rate tried"
    end = ": what sleep saves there is training tokens, not compute" if tokens_saved else ""
    start = f"{name}: at" if len(tasks) > 1 else "At"
    sentences.append(f"{start} equal compute N = 1, with {tried}, {_listed(parts)}{end}.")
  return " ".join(sentences)


def _is_guessing(found: Sequence[Standing]) -> bool:
  """Whether none of them is clearly above the best constant answer."""
  floor = constant([r for s in found for r in s.runs])
  return floor is not None and max(s.mean for s in found) < floor + TOLERANCE


def caveats(runs: Sequence[Run]) -> list[str]:
  """What a reader should know before believing the claims: seeds, confounders, unfinished runs."""
  notes = []
  tasks = _tasks(runs)
  for name, members in tasks:
    found = standings(members, "tokens", budgets(members, "tokens")[1])
    before = f"{name}: " if len(tasks) > 1 else ""
    if len(found) > 1:
      notes.append(before + _seed_note(found))
      notes += [before + note for note in _differences(found)]
      labels = [label for label, _ in settings([s.runs[0] for s in found])]
      if any("," in label for label in labels):
        notes.append(f"{before}The runs compared differ in more than N: {'; '.join(labels)}.")
    rates: dict[int, set[float]] = {}
    for run in members:
      if run.num_passes and is_number(run.get("optim.muon_lr")):
        rates.setdefault(run.num_passes, set()).add(run.get("optim.muon_lr"))
    if len(rates) > 1:
      tried = "; ".join(f"N = {n}: {', '.join(f'{r:g}' for r in sorted(rates[n]))}" for n in sorted(rates))
      notes.append(f"{before}Muon learning rates tried: {tried}.")
  if any(r.accelerated for r in runs):
    notes.append("Runs on an accelerator: CPU seconds do not measure their compute, so none is compared.")
  unfinished = [r.name for r in runs if not r.rows.get("done")]
  if unfinished:
    notes.append(f"Not finished, or stopped: {', '.join(unfinished)}.")
  return notes


def _seed_note(found: Sequence[Standing]) -> str:
  by_seed = [{r.seed: y for r, y in zip(s.runs, s.exact, strict=True)} for s in found]
  seeds = set.intersection(*(set(values) for values in by_seed))
  if len(seeds) < 2:
    return "One seed: another may order the runs differently."
  rising = sum(all(a[s] < b[s] for a, b in itertools.pairwise(by_seed)) for s in seeds)
  return f"Accuracy rises with every step of N in {rising} of {len(seeds)} seeds."


def _differences(found: Sequence[Standing]) -> list[str]:
  """How far each N is from the smallest in the same seeds, with the mean's interval; [] for one seed."""
  parts = []
  for standing in found[1:]:
    gains = _gains(found[0], standing)
    if len(gains) > 1:
      low, high = intervals.of_mean(gains, -100.0, 100.0)
      mean = sum(gains) / len(gains)
      parts.append(f"N = {standing.num_passes}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")
  if not parts:
    return []
  return [
    f"Distance to N = {found[0].num_passes} in the same seeds, with its 95 % interval: {'; '.join(parts)}."
  ]


def _tasks(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """Runs that were evaluated, by task, with a name for each: "t = 4" where their depths tell them apart."""
  groups: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.evals:
      groups.setdefault(run.task, []).append(run)
  depths = [members[0].depth for members in groups.values()]
  clear = None not in depths and len(set(depths)) == len(depths)
  return [
    (f"{members[0].experiment.letter} = {depth}" if clear else f"Task {i}", members)
    for i, (depth, members) in enumerate(zip(depths, groups.values(), strict=True), 1)
  ]


def _last(runs: Sequence[Run]) -> float:
  values = [100 * r.last("eval")["exact"] for r in runs]
  return sum(values) / len(values)


def _listed(items: Sequence[str]) -> str:
  """["a", "b", "c"] -> "a, b and c"."""
  return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _percent(value: float) -> str:
  return f"{value:.1f} %"
