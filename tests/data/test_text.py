"""Texts: reading files, the cache of tokens, and rows."""

import gzip
import json
import pathlib
import re

import numpy as np
import pytest

from sleep_jax.config import ConfigError
from sleep_jax.data.text import corpus, files, rows, tokens

TEXT = "The ship left the harbour at dawn — naïve, 船, 🙂.\r\n  Two  spaces\tand a tab.\n"


def write(path: pathlib.Path, data: bytes | str) -> pathlib.Path:
  data = data.encode() if isinstance(data, str) else data
  path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
  return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokens.train([TEXT * 20, "a harbour, a ship. " * 50], 320, path)
  return path


class TestFiles:
  @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
  def test_a_text_comes_back_to_the_byte(self, tmp_path, name):
    assert list(files.documents(write(tmp_path / name, TEXT), "text")) == [TEXT]

  @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
  def test_lines_are_documents(self, tmp_path, name):
    lines = [{"body": TEXT, "text": 1}, {"body": " \n"}, {"body": "second"}]
    data = "\n".join(map(json.dumps, lines)) + "\n\n"
    assert list(files.documents(write(tmp_path / name, data), "body")) == [TEXT, "second"]

  @pytest.mark.parametrize(
    "name, data, said",
    [
      ("a.txt", b"", "is empty"),
      ("a.txt", b" \n\t\n", "is empty"),
      ("a.txt.gz", b"", "is empty"),
      ("a.jsonl", b"\n\n", "is empty"),
      ("a.jsonl", b'{"text": ""}\n', "is empty"),
      ("a.txt", b"some\0text", "is binary and no text: byte 4 is 0"),
      ("a.txt", "é".encode("latin-1"), "is not UTF-8: byte 0 is 0xe9"),
      ("a.txt", "text".encode("utf-16"), "binary|not UTF-8"),
      ("a.jsonl", b'{"text": "a"}\n{"text": \xff}', "line 2 is not UTF-8"),
      ("a.jsonl", b'{"text": "a"}\nnonsense', "line 2 is no JSON"),
      ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
      ("a.jsonl", b"[1]", "line 1 must be a JSON object"),
      ("a.jsonl", b'{"body": "a"}', "line 1 has no field 'text'.*its fields: 'body'"),
      ("a.jsonl", b'{"text": 3}', "line 1: 'text' must be text, got 3"),
      ("a.jsonl", b'{"text": "\\ud800"}', "character 0 is half of one"),
    ],
  )
  def test_what_is_no_text_is_named(self, tmp_path, name, data, said):
    path = write(tmp_path / name, data)
    with pytest.raises(ConfigError, match=f"(?s)^{path}: .*({said})") as e:
      list(files.documents(path, "text"))
    assert "\n" not in str(e.value)

  @pytest.mark.parametrize("kind", ["no gzip at all", "cut off"])
  def test_a_damaged_gzip_file(self, tmp_path, kind):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(kind.encode() if kind == "no gzip at all" else gzip.compress(b"text " * 999)[:40])
    with pytest.raises(ConfigError, match="is damaged, it is no whole gzip file"):
      list(files.documents(path, "text"))

  def test_patterns_name_files_once_in_order(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("deep/er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "x[1].txt"):
      write(pathlib.Path(name), TEXT)
    found = files.expand("b.txt,*.txt, deep/**/*.txt", "data.files")
    assert [str(p) for p in found] == ["b.txt", "a.txt", "x[1].txt", "deep/er/c.txt"]
    assert [str(p) for p in files.expand("x[1].txt", "data.files")] == ["x[1].txt"]  # a name before a pattern

  @pytest.mark.parametrize(
    "patterns, said",
    [("", "needs at least one"), (" , ", "needs at least one"), ("no*.txt", "matches no file"),
     (".", "is a folder"), ("a\0b", "no name of a file|matches no file")],
  )  # fmt: skip
  def test_patterns_that_name_nothing(self, tmp_path, monkeypatch, patterns, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^data.files: .*({said})"):
      files.expand(patterns, "data.files")


class TestTokens:
  @pytest.mark.parametrize("text", [TEXT, "🙂" * 5, " ", "é\n" * 9, "ship" * 100])
  def test_bytes_add_up_to_the_text(self, tokenizer, text):
    ids, sizes, _ = tokens.Tokenizer(tokenizer).encode(text)
    assert len(ids) == len(sizes)
    assert sizes.min() >= 0
    assert sizes.sum() == len(text.encode())

  def test_a_plain_word_has_its_own_bytes(self, tokenizer):
    known = tokens.Tokenizer(tokenizer)
    ids, sizes, _ = known.encode("a harbour, a ship.")
    assert [len(known._backend.decode([i]).encode()) for i in ids] == sizes.tolist()

  def test_names_are_capitalised_words_each_with_its_number(self, tokenizer):
    text = "Anne met Mary. I saw anne, ANNE and Anne-Mary in Łódź, Éva2 or 船Mary; A ship."
    ids, _, names = tokens.Tokenizer(tokenizer).encode(text)
    known = {"Anne": 1, "Mary": 2, "ANNE": 3, "Łódź": 4, "Éva": 5}  # 船Mary is one word, without a capital
    spans = tokens.Tokenizer(tokenizer)._backend.encode(text).offsets
    assert len(names) == len(ids)
    found = [m for m in re.finditer(r"[A-Za-zŁódźÉ船]{2,}", text) if m[0] in known]
    for (start, end), name in zip(spans, names, strict=True):
      over = [known[m[0]] for m in found if m.start() < end and start < m.end()]
      assert name == (over[0] if over else 0), text[start:end]
    assert set(names.tolist()) == set(range(6))

  def test_the_same_texts_give_the_same_tokenizer(self, tmp_path, tokenizer):
    tokens.train([TEXT * 20, "a harbour, a ship. " * 50], 320, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()

  @pytest.mark.parametrize("data", ["", "{}", "nonsense"])
  def test_what_is_no_tokenizer(self, tmp_path, data):
    path = write(tmp_path / "tokenizer.json", data)
    with pytest.raises(ConfigError, match="^data.tokenizer: .* is no tokenizer.json"):
      tokens.Tokenizer(path)


def opened(paths, tokenizer, folder, said=None, **how):
  report = [].append if said is None else said.append
  return corpus.open_corpus(
    paths, "text", tokenizer, folder, vocab_size=how.get("vocab_size", 320), report=report
  )


class TestCorpus:
  @pytest.fixture
  def paths(self, tmp_path):
    lines = "".join(json.dumps({"text": f"ship {i} " * i}) + "\n" for i in range(1, 9))
    return [write(tmp_path / "a.txt", TEXT * 30), write(tmp_path / "b.jsonl", lines)]

  def test_reads_what_the_tokenizer_says(self, tmp_path, monkeypatch, paths, tokenizer):
    monkeypatch.setattr(corpus, "RECORD", 50)  # documents of several records
    found, known = opened(paths, tokenizer, tmp_path / "cache"), tokens.Tokenizer(tokenizer)
    texts = [text for path in paths for text in files.documents(path, "text")]
    assert found.sizes == tuple(len(text.encode()) for text in texts)
    for i, text in enumerate(texts):
      ids, sizes, names = known.encode(text)
      assert found.counts[i] == len(ids)
      for start, stop in (
        (0, len(ids)),
        (len(ids) // 3, len(ids) // 3 + 1),
        (0, 1),
        (len(ids) - 1, len(ids)),
      ):
        got = found.read(i, start, stop)
        np.testing.assert_array_equal(got[0], ids[start:stop])
        np.testing.assert_array_equal(got[1], sizes[start:stop])
        np.testing.assert_array_equal(got[2], names[start:stop])

  def test_is_made_once_and_again_where_it_is_damaged(self, tmp_path, paths, tokenizer):
    said, folder = [], tmp_path / "cache"
    first = opened(paths, tokenizer, folder, said)
    again = opened([p.rename(p.with_name(f"moved_{p.name}")) for p in paths], tokenizer, folder, said)
    assert (again, len(said)) == (first, 1)  # by the contents, wherever they lie
    moved = [p.with_name(f"moved_{p.name}") for p in paths]
    tokens_before = first.read(0, 0, 9)[0].copy()
    for path in sorted(folder.iterdir()):
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 1
      path.write_bytes(data)
      said.clear()
      np.testing.assert_array_equal(opened(moved, tokenizer, folder, said).read(0, 0, 9)[0], tokens_before)
      assert any("tokenized" in line for line in said), path
    assert not [p for p in folder.iterdir() if "tmp" in p.name]

  def test_a_cache_of_an_older_form_is_made_again_of_the_same_texts(
    self, tmp_path, monkeypatch, paths, tokenizer
  ):
    folder, said = tmp_path / "cache", []
    before, texts = opened(paths, tokenizer, folder).read(0, 0, 9), corpus.digest(paths, "text")
    monkeypatch.setattr(corpus, "FORMAT", corpus.FORMAT + 1)
    after = opened(paths, tokenizer, folder, said).read(0, 0, 9)
    np.testing.assert_array_equal(after, before)
    assert "of an older form" in said[0] and "tokenized" in said[1]
    assert corpus.digest(paths, "text") == texts

  def test_another_text_or_field_has_another_digest(self, paths):
    before = corpus.digest(paths, "text")
    assert corpus.digest(paths, "body") != before
    assert corpus.digest(paths[::-1], "text") != before
    write(paths[0], TEXT * 30 + ".")
    assert corpus.digest(paths, "text") != before

  def test_a_vocabulary_that_is_too_small(self, tmp_path, paths, tokenizer):
    with pytest.raises(ConfigError, match="^model.vocab_size: must be above"):
      opened(paths, tokenizer, tmp_path / "cache", vocab_size=100)
    assert not (tmp_path / "cache").exists()


class FakeCorpus:
  """Tokens that say which document and place they are of."""

  def __init__(self, counts):
    self.counts = counts

  def read(self, document, start, stop):
    at = np.arange(start, stop, dtype=np.int32)
    return 1000 * document + at, np.full(len(at), 1 + document, np.int32), np.zeros(len(at), np.int32)


class TestRows:
  COUNTS = (21, 1, 2, 9, 33, 8, 5, 4, 17)

  @pytest.mark.parametrize("documents", ["packed", "alone"])
  @pytest.mark.parametrize("seed", [None, 0, 1])
  def test_every_token_is_predicted_once_after_the_one_before_it(self, documents, seed):
    cfg = rows.TextConfig(length=16, documents=documents)
    made = rows.make_rows(FakeCorpus(self.COUNTS), cfg, 4, seed, "data.files")
    predicted = []
    for i in range(len(made)):
      row = made[i]
      asked = row["loss_mask"] > 0
      np.testing.assert_array_equal(asked, row["valid"])
      np.testing.assert_array_equal(row["inputs"][asked] + 1, row["targets"][asked])
      predicted += row["targets"][asked].tolist()
    expected = [1000 * d + t for d, count in enumerate(self.COUNTS) for t in range(1, count)]
    assert sorted(predicted) == expected

  @pytest.mark.parametrize("documents", ["packed", "alone"])
  def test_no_window_holds_two_documents_and_each_begins_anew(self, documents):
    cfg = rows.TextConfig(length=16, documents=documents)
    made = rows.make_rows(FakeCorpus(self.COUNTS), cfg, 4, 3, "data.files")
    most = 0
    for i in range(len(made)):
      row = made[i]
      documents_of = np.where(row["valid"], row["inputs"] // 1000, -1).reshape(-1, 4)
      begins = row["begins"].reshape(-1, 4)
      assert not begins[:, 1:].any()
      for window, starts in zip(documents_of, begins[:, 0], strict=True):
        assert len(set(window) - {-1}) <= 1
        real = window >= 0
        assert not (np.diff(real.astype(int)) > 0).any()  # pads on the right alone
        assert not starts or real[0]
      place = row["inputs"].reshape(-1, 4)[:, 0] % 1000
      fresh = (place % 16 == 0) & (documents_of[:, 0] >= 0)
      np.testing.assert_array_equal(begins[:, 0], fresh)  # parts begin at multiples of T of their document
      most = max(most, int(begins.sum()))
    assert (most > 1) == (documents == "packed")

  def test_packing_wastes_no_window_that_something_fits_into(self):
    found = rows.pieces(self.COUNTS, 16)
    packed = rows.pack(found, 16, 4)
    used = sum(-(-p.size // 4) for p in found)
    assert sorted(p for row in packed for p in row) == sorted(found)
    assert all(sum(-(-p.size // 4) for p in row) <= 4 for row in packed)
    assert len(packed) <= used / 4 * 1.5 + 1

  def test_is_a_function_of_seed_and_index(self):
    cfg = rows.TextConfig(length=16)
    one, same, other = (
      rows.make_rows(FakeCorpus(self.COUNTS), cfg, 4, seed, "data.files").pieces for seed in (1, 1, 2)
    )
    assert one == same != other

  def test_kinds_by_a_plain_loop(self):
    ids = np.random.default_rng(0).integers(0, 30, 200).astype(np.int32)
    expected = []
    for i in range(1, len(ids)):
      before = [j for j in range(i) if ids[j] == ids[i]]
      ago = i - before[-1] if before else 0
      expected.append(
        "new" if not before else "near" if ago <= 8 else "evicted" if ago <= 16 else "long_evicted"
      )
    assert [rows.KINDS[k] for k in rows._kinds(ids, 8)] == expected
    assert set(expected) == set(rows.KINDS)

  def test_evicted_names_by_the_definition(self):
    rng, window = np.random.default_rng(1), 5
    words = [(number, int(rng.integers(1, 4))) for number in rng.integers(0, 7, 200)]
    expected, names, last = [], [], {}  # last: name -> place of its last token
    for number, size in words:
      if names and number and names[-1] == number:
        continue  # the same word twice in a row is read as one
      start = len(names)
      begins = max(start - 1, 0) // window * window  # of the window whose tokens can be seen
      gone = number != 0 and number in last and last[number] < begins
      expected += [gone] * size
      names += [number] * size
      last[number] = len(names) - 1
    found = rows._evicted(np.asarray(names, np.int32), window)
    assert found.tolist() == expected[1:]
    assert 20 < sum(expected) < len(expected) - 20

  def test_texts_shorter_than_a_window(self):
    with pytest.raises(ConfigError, match="^data.held_out: has 3 tokens to read, fewer than a window"):
      rows.make_rows(FakeCorpus((3, 1, 2)), rows.TextConfig(length=16), 4, None, "data.held_out")
    with pytest.raises(ConfigError, match="^data.length: must be a multiple of model.window = 5"):
      rows.check_window(16, 5)
