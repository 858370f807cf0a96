"""How fast GSM-Infinite problems are made, by number of operations, on one core.

    python -m benchmarks.gsm_infinite_data --problems=400

The original generator is not run here; its attempts per problem are measured facts of its own (400 problems a
row, `sleep_jax/data/gsm_infinite/study/reference.json`), and its time is not known.
"""

import sys
import time
from collections.abc import Sequence

from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.data import gsm_infinite
from sleep_jax.data.gsm_infinite.study import statistics
from sleep_jax.kernels.measure import flags

NOTES = (
  "CPU time of one process; texts of 2,000-3,300 tokens, solutions included, as text.",
  "One attempt in eight is a problem of the other side (held out), so 8/7 of the original's are due.",
  "`original's attempts` are facts measured with the original generator, not timed here; `–`: not known.",
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = flags.Parser("benchmarks.gsm_infinite_data", __doc__)
  parser.add_argument("--problems", type=flags.count, default=400, help="for each number of operations")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  measure.pin(1)
  facts = tables.machine(("numpy", "tokenizers"))
  rows = []
  for subset, mode, low in (("medium", "forward", 2), ("hard", "forward", 1), ("symbolic", "forward", 1)):
    cfg = gsm_infinite.GsmInfiniteConfig(subset=subset, mode=mode, operations=(low, 8))
    theirs = statistics.reference_facts()["core"].get(f"{subset} {mode}", {})
    gsm_infinite.problem(cfg, 1, 0)
    for op in range(low, 9):
      begin, cpu = time.perf_counter(), time.process_time()
      made = [gsm_infinite.problem(cfg, 0, i, op=op) for i in range(args.problems)]
      cpu, wall = time.process_time() - cpu, time.perf_counter() - begin
      rows.append(
        {
          "subset": subset,
          "op": op,
          "problems / CPU s": args.problems / cpu,
          "CPU ms": 1e3 * cpu / args.problems,
          "wall ms": 1e3 * wall / args.problems,
          "attempts": sum(p.attempts for p in made) / len(made),
          "original's attempts": theirs.get(str(op), {}).get("attempts"),
        }
      )
  title = "Making GSM-Infinite problems"
  tables.save(
    args.out, "gsm_infinite_data", title, {"Speed: by operations": rows}, tables.finish(facts), NOTES
  )
  return 0


if __name__ == "__main__":
  sys.exit(command.run(main, None))
