"""The shortcut: what answers many short problems without reading the question."""

from absl.testing import parameterized

from sleep_jax.data import gsm_infinite as gsm
from sleep_jax.data.gsm_infinite import shortcut


class GuessTest(parameterized.TestCase):
  @parameterized.parameters(
    ("The number of a in B equals 3. The number of c in D equals 2 plus the number of a in B.", 3),
    ("The number of a in B equals 2. The number of c in D equals 4. The number of e in F equals 4.", 4),
    ("The number of a in B equals 2. The number of c in D equals 4.", 2),
    ("The number of a in B equals 12. The number of c in D equals 1 plus the number of a in B.", 12),
    ("The number of a in B equals 3 times the number of c in D, and the number of e in F.", 3),
    ("assign V7 = 2. assign V8 = V7 + 1. assign V9 = V8 + 1.", 1),
    ("The number of a in B equals the number of c in D.", None),
  )
  def test_by_hand(self, context, want):
    self.assertEqual(shortcut.guess(context), want)

  def test_it_finds_the_only_number_of_a_text_and_no_sum(self):
    cfg = gsm.GsmInfiniteConfig(subset="medium", operations=(2, 4), min_tokens=50, max_tokens=160)
    made = [gsm.problem(cfg, 5, i, op=2 + 2 * (i % 2)) for i in range(60)]
    found = [shortcut.guess(p.context) == p.answer for p in made]
    lonely = [
      hit for p, hit in zip(made, found, strict=True) if p.op == 2 and p.context.count("equals ") == 1
    ]
    self.assertNotEmpty([hit for hit in found if hit])
    self.assertTrue(all(lonely))
    self.assertGreater(sum(found[::2]), 2 * sum(found[1::2]))  # op 2 is a number of the text, op 4 rarely
