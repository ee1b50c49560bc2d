"""The tokenizer: byte-level BPE against a slow one written here, special tokens, files and the command line."""
import json
import random

import pytest

import tokenizer as module
from tokenizer import CHAT_TOKENS, EXTRA_TOKENS, RESERVED, Tokenizer

CORPUS = [
    'point to the cups. <points coords="1 1 523 410;2 610 398">the cups</points>\n',
    "There are 12 cups on the table; the table isn't full.\n\n  Count the cups, then point to them!\n",
    "<|im_start|>user\nVideo at 0.5 s: <im_patch><im_patch><frame_end>\r\n",
    "\tna\u00efve caf\u00e9 \u676f\u5b50 \U0001f964\n",
]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(CORPUS, base_size=340)


def random_texts(count: int) -> list[str]:
    """Texts over ASCII, over all of Unicode, of latin-1 'bytes', of blanks, and of the corpus's letters."""
    rng = random.Random(0)
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    blanks = [*map(ord, " \t\n\r\v\x1c\u00a0\u3000a1_'")]
    alphabets = [range(128), anything, range(256), blanks, [*map(ord, "".join(CORPUS))]]
    return ["".join(map(chr, rng.choices(alphabets[n % 5], k=rng.randint(0, 40)))) for n in range(count)]


def slow_merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """One merge, left to right, by slicing."""
    i = 0
    while i + 1 < len(ids):
        if (ids[i], ids[i + 1]) == pair:
            ids = ids[:i] + [new] + ids[i + 2:]
        i += 1
    return ids


def slow_train(words: list[str], count: int) -> list[tuple[int, int]]:
    """BPE that counts all pairs of all words anew at each step."""
    sequences, merges = [list(word.encode()) for word in words], []
    for step in range(count):
        pairs = [(s[i], s[i + 1]) for s in sequences for i in range(len(s) - 1)]
        if not pairs:
            break
        most = max(map(pairs.count, set(pairs)))
        best = sorted(pair for pair in set(pairs) if pairs.count(pair) == most)[0]
        sequences = [slow_merge(s, best, 256 + step) for s in sequences]
        merges.append(best)
    return merges


def random_words(seed: int) -> list[str]:
    """Words of few letters (so that runs like 'aaaa' and ties are common); each is one pre-token."""
    rng = random.Random(seed)
    return ["".join(rng.choices("aab\u00e9", k=rng.randint(1, 9))) for _ in range(40)]


@pytest.mark.parametrize("text, pieces", [
    ('<points coords="1 1 523">', ["<points", " coords", '="', "1", " ", "1", " ", "5", "2", "3", '">']),
    ('">cups</points>', ['">', "cups", "</", "points", ">"]),
    ("It isn't, WE'LL see", ["It", " isn", "'t", ",", " WE", "'LL", " see"]),
    ("O'Reilly 'quote'", ["O", "'Re", "illy", " '", "quote", "'"]),
    ("a  b\n\n c \t\n", ["a", " ", " b", "\n\n", " c", " \t\n"]),
    ("a_b __ x1y  ", ["a", "_b", " __", " x", "1", "y", "  "]),
    ("caf\u00e9\u676f 12.5!?\n", ["caf\u00e9\u676f", " ", "1", "2", ".", "5", "!?\n"]),
    ("\x1c \x1fz", ["\x1c ", "\x1fz"]),
])
def test_pre_tokens(text, pieces):
    """Words carry one leading character, digits stand alone, punctuation and blanks form pieces of their own."""
    assert module.PRE_TOKEN.findall(text) == pieces


def test_round_trip(tok):
    """Decoding what was encoded gives back exactly the text, whatever its characters."""
    for text in [*CORPUS, *random_texts(1000)]:
        assert tok.decode(tok.encode(text)) == text


def test_learned_words_are_few_tokens(tok):
    """Merges are used: a frequent word is one token, and digits never merge with anything."""
    assert len(tok.encode(" cups")) == 1
    assert tok.encode("10") == [ord("1"), ord("0")]


@pytest.mark.parametrize("seed", range(5))
def test_training_equals_slow_training(seed):
    """Incremental counting learns the merges of an independent BPE that recounts everything at each step."""
    words = random_words(seed)
    merges = Tokenizer.train(words, 256 + len(CHAT_TOKENS) + 25).merges
    assert len(merges) == 25
    assert merges == slow_train(words, 25)


@pytest.mark.parametrize("seed", range(5))
def test_encoding_equals_replaying_the_merges(seed):
    """Encoding a word gives what replaying all merges in the order they were learned gives."""
    tokenizer = Tokenizer.train(random_words(seed), 300)
    for word in random_words(seed + 100):
        ids = list(word.encode())
        for i, pair in enumerate(tokenizer.merges):
            ids = slow_merge(ids, pair, 256 + i)
        assert tokenizer.encode(word) == ids


def test_encoding_does_not_depend_on_what_came_before(tok):
    """The cache of words changes no ids, nor does emptying it, nor does changing a returned list."""
    expected = [tok.encode(text) for text in CORPUS]
    fresh = Tokenizer(tok.merges)
    fresh._cache = {str(i): [] for i in range(2**16)}  # full: the next new word empties it
    for text, ids in zip(CORPUS * 2, expected * 2):
        answer = fresh.encode(text)
        assert answer == ids
        answer.clear()
    assert 0 < len(fresh._cache) < 200


def test_training_is_deterministic():
    """The merges depend on how often words occur, not on the order of the texts."""
    texts = [text for seed in range(5) for text in random_words(seed)]
    assert Tokenizer.train(texts, 330).merges == Tokenizer.train(iter(texts[::-1]), 330).merges


def test_size_is_exact_or_shrinks():
    """The base vocabulary has the rows asked for, or fewer when all words are single tokens; too few is an error."""
    assert Tokenizer.train(CORPUS, 300).base_size == 300
    assert Tokenizer.train(CORPUS, 259).merges == []
    small = Tokenizer.train(["abc abc"], 512)  # pre-tokens 'abc' and ' abc': a+b, ab+c, ' '+abc
    assert len(small.merges) == 3 and small.base_size == 256 + 3 + len(CHAT_TOKENS)
    assert Tokenizer.train([], 512).base_size == 259
    with pytest.raises(ValueError, match="at least 259 tokens .* not 258"):
        Tokenizer.train(CORPUS, 258)


def test_special_ids(tok):
    """Chat tokens end the base vocabulary, extra token i has id base_size + i, and 128 rows are kept for those."""
    assert tok.base_size == 340 and tok.size == 340 + 128 == tok.base_size + RESERVED
    assert [tok.special[name] for name in CHAT_TOKENS] == [337, 338, 339]
    assert EXTRA_TOKENS == tuple(
        "<im_start> <im_end> <im_patch> <im_col> <low_res_im_start> <|image|> <im_low> <frame_start> <frame_end> "
        "<|video|> <|points|> <|token_index|> <|vit_index|> <|vit_loc|>".split())
    assert [tok.special[name] for name in EXTRA_TOKENS] == list(range(340, 354))
    assert tok.bos_id == tok.eos_id == 339


def test_special_spellings_typed_by_a_user_stay_text(tok):
    """A spelling in a user's text gives ids of bytes and merges only, which decode to the same characters."""
    for name in CHAT_TOKENS + EXTRA_TOKENS:
        for text in (name, f"say {name}{name}!", f"{name}\n"):
            ids = tok.encode(text)
            assert max(ids) < min(tok.special.values()) and tok.decode(ids) == text
            assert tok.chat_prompt(text).count(tok.special[name]) == tok.chat_prompt("").count(tok.special[name])


def test_layout(tok):
    """Only a piece that is exactly a special spelling becomes a special token."""
    patch = tok.special["<im_patch>"]
    assert tok.encode_layout(["0.5 ", "<im_patch>", "<im_patch>", " <im_patch>", ""]) == [
        *tok.encode("0.5 "), patch, patch, *tok.encode(" <im_patch>")]


def test_chat_prompt(tok):
    """A user turn is written in the layout of the chat, byte for byte where nothing is merged."""
    plain = Tokenizer([])
    start, end = plain.special["<|im_start|>"], plain.special["<|im_end|>"]
    for text in ("hi <|im_end|>", "", "\n  two\n", "<im_patch>"):
        assert plain.chat_prompt(text) == [
            start, *b"user\n", *text.encode(), end, *b"\n", start, *b"assistant\n"]
        assert tok.decode(tok.chat_prompt(text)) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_decode_of_odd_ids(tok):
    """Special tokens are spelled out, broken UTF-8 and unnamed rows become U+FFFD, ids outside raise."""
    assert tok.decode([*b"a\xe6", tok.special["<im_col>"], 0x9D, tok.size - 1]) == "a\ufffd<im_col>\ufffd\ufffd"
    assert tok.decode([]) == ""
    for i in (-1, tok.size):
        with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary"):
            tok.decode([65, i])


def test_lone_surrogates_do_not_stop_encoding(tok):
    """Half a surrogate pair, as JSON may hold, is encoded as a question mark."""
    assert tok.decode(tok.encode(json.loads(r'"cup\ud83d!"'))) == "cup?!"


def test_save_and_load(tok, tmp_path):
    """A saved tokenizer comes back equal, saves to the same bytes, and leaves no temporary file."""
    tok.save(tmp_path / "a.json")
    back = Tokenizer.load(tmp_path / "a.json")
    assert (back.merges, back.special, back.size, back.eos_id) == (tok.merges, tok.special, tok.size, tok.eos_id)
    assert [back.encode(text) for text in CORPUS] == [tok.encode(text) for text in CORPUS]
    back.save(str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_broken_files_are_named_in_one_line(tok, tmp_path):
    """A missing, cut, foreign or edited file raises a one-line ValueError that begins with its name."""
    path = tmp_path / "tokenizer.json"

    def refused() -> None:
        with pytest.raises(ValueError) as caught:
            Tokenizer.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message

    refused()
    tok.save(path)
    whole = path.read_text(encoding="utf-8")
    for text in ("", "{}", "[]", "null", "[" * 100_000, "hello\n", whole[:-10], '{"model": {"vocab": [], "merges": 3}}',
                 '{"model": {"vocab": {}, "merges": []}}'):
        path.write_text(text, encoding="utf-8")
        refused()
    path.write_bytes(b"\xff\xfe\x00")
    refused()
    edits = [
        lambda saved: saved["model"]["merges"].reverse(),
        lambda saved: saved["model"]["merges"].pop(),
        lambda saved: saved["model"]["merges"].append(saved["model"]["merges"][0]),
        lambda saved: saved["model"]["merges"].append("a b c"),
        lambda saved: saved["model"]["merges"].append(7),
        lambda saved: saved["model"]["vocab"].update(a=98, b=97),
        lambda saved: saved["model"]["vocab"].update(a=-1),
        lambda saved: saved["model"]["vocab"].update(a="97"),
        lambda saved: saved["model"].update(type="Unigram"),
        lambda saved: saved["added_tokens"].pop(),
        lambda saved: saved.pop("decoder"),
    ]
    for edit in edits:
        saved = json.loads(whole)
        edit(saved)
        path.write_text(json.dumps(saved), encoding="utf-8")
        refused()
    path.unlink()
    path.mkdir()
    refused()


def test_two_merges_of_one_token_are_refused():
    """Two merges that make the same bytes would give one spelling two ids."""
    with pytest.raises(ValueError, match="the same token"):
        Tokenizer([(97, 98), (97, 98)])


def test_file_has_the_common_layout(tok, tmp_path):
    """The file spells bytes as GPT-2 does and holds the parts by which byte-level BPE files are recognised."""
    tok.save(tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    vocab = saved["model"]["vocab"]
    assert saved["model"]["type"] == "BPE"
    assert len(vocab) == 256 + len(saved["model"]["merges"]) == 256 + len(tok.merges)
    assert [vocab[c] for c in ("a", "\u0120", "\u010a", "\u00e9", "\u0100", "\u0143")] == [97, 32, 10, 0xE9, 0, 0xAD]
    assert vocab["\u0120cups"] == tok.encode(" cups")[0]
    assert {token["content"]: token["id"] for token in saved["added_tokens"]} == tok.special
    assert all(token["special"] for token in saved["added_tokens"])
    assert [part["type"] for part in saved["pre_tokenizer"]["pretokenizers"]] == ["Split", "ByteLevel"]
    assert saved["decoder"]["type"] == "ByteLevel"


def test_tokenizers_package_agrees(tok, tmp_path):
    """The `tokenizers` package loads the file and gives the same ids for ASCII text and for the chat layout."""
    tokenizers = pytest.importorskip("tokenizers")
    tok.save(tmp_path / "t.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert {name: other.token_to_id(name) for name in tok.special} == tok.special
    for text in [text.encode("ascii", "ignore").decode() for text in random_texts(2000)]:
        if not any(name in text for name in tok.special):  # the package would read those as special tokens
            assert other.encode(text).ids == tok.encode(text), repr(text)
            assert other.decode(tok.encode(text)) == text
            cuts = [text[start:end] for _, (start, end) in other.pre_tokenizer.pre_tokenize_str(text)]
            assert cuts == module.PRE_TOKEN.findall(text)
    assert other.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n").ids == tok.chat_prompt("hi")


def test_command_line(tmp_path, capsys):
    """`train` writes a file, `show` prints its pieces, and bad input is one line and status 2."""
    corpus, out = tmp_path / "corpus.txt", tmp_path / "t.json"
    corpus.write_bytes("".join(CORPUS).encode())
    module.main(["train", str(corpus), str(out), "--size", "300"])
    assert "300 tokens" in capsys.readouterr().out
    assert Tokenizer.load(out).merges == Tokenizer.train(["".join(CORPUS)], 300).merges
    module.main(["show", str(out), "7 \u00e9"])
    assert [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()][:2] == ["'7'", "' '"]

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    for command in (["train", tmp_path / "none.txt", out], ["train", tmp_path / "latin.txt", out],
                    ["train", corpus, out, "--size", "9"], ["train", corpus, tmp_path / "no" / "t.json"],
                    ["show", corpus, "hi"], ["show", tmp_path / "none.json", "hi"], ["learn"], []):
        with pytest.raises(SystemExit, match="2"):
            module.main([str(word) for word in command])
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("tokenizer.py: ") and captured.err.count("\n") == 1
    assert Tokenizer.load(out).base_size == 300  # the failed runs left it alone
