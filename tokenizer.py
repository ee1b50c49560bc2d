r"""Text <-> token ids: byte-level byte-pair encoding (BPE) by hand.

A text is cut into pre-tokens (words, digits, punctuation), each pre-token is written as UTF-8 bytes, and neighbouring
tokens are merged as long as the list of learned merges knows the pair. Every text can be encoded, nothing is unknown.

    'two cups: 12'  ->  'two' ' cups' ':' ' ' '1' '2'  ->  t w o | _ c u p s | ...  ->  tw o | _c ups | ...  ->  ids

    id   0 ... 255 | 256 ...        | <|endoftext|> <|im_start|> <|im_end|> | <im_start> ... <|vit_loc|> | unused
         the bytes | one per merge  | the chat                              | images, videos, points     |
         '------------------ base vocabulary (base_size rows) --------------' '-------- RESERVED rows ----------'

Ids of special tokens are placed by the program and are never read out of text: `<im_patch>` typed by a user is ten
characters like any others. Files have the layout of a Hugging Face `tokenizer.json`.

    python tokenizer.py train CORPUS.txt OUT.json --size 512
    python tokenizer.py show OUT.json "point to the cups"
"""
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import command

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last rows of the base vocabulary
EXTRA_TOKENS = (  # extra token i has id base_size + i
    "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>",  # images
    "<frame_start>", "<frame_end>", "<|video|>",                                                        # videos
    "<|points|>", "<|token_index|>", "<|vit_index|>", "<|vit_loc|>",                                    # pointing
)
RESERVED = 128  # rows kept after the base vocabulary for extra tokens, more than are named

Pair = tuple[int, int]

# Where a text is cut: the rules of Qwen, in words that Python's `re` and the engine of the `tokenizers` package share,
# so that one pattern serves both. They agree on ASCII, not on all combining marks and numerals like '²'.
BLANK = r"\s\x1c-\x1f"  # Python's \s holds the control characters 1C-1F already, the other engine's does not
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"           # English endings
    r"|(?:[^\w\r\n]|_)?[^\W\d_]+"             # letters, with one character before them: usually a space
    r"|\d"                                    # a digit, always alone
    rf"| ?(?:[^\w{BLANK}]|_)+[\r\n]*"         # punctuation: '">' or '</', then line ends
    rf"|[{BLANK}]*[\r\n]+"                    # line ends and the blanks before them
    rf"|[{BLANK}]+(?![^{BLANK}])|[{BLANK}]+"  # other blanks; the last one is left to the word that follows
)
PRE_TOKEN = re.compile(SPLIT)


def utf8(text: str) -> bytes:
    """Bytes of a text. Half a surrogate pair, which a JSON escape can smuggle in, has none: it becomes '?'."""
    return text.encode("utf-8", errors="replace")


def merge_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """Replace each `pair` of neighbours by `new`, from left to right: merge_pair([1, 1, 1], (1, 1), 9) is [9, 1]."""
    left, right = pair
    merged: list[int] = []
    for token in ids:
        if merged and token == right and merged[-1] == left:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """The `count` merges of BPE, or fewer when every pre-token has become one token.

    Each step merges the pair of neighbours seen most often inside pre-tokens (of equals the one with the smallest ids)
    and recounts only the pre-tokens that held it.
    """
    counts = Counter(match[0] for text in texts for match in PRE_TOKEN.finditer(text))
    words = [list(utf8(word)) for word in counts]
    times = list(counts.values())
    seen: Counter[Pair] = Counter()                          # pair -> how often it occurs
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> the words that (once) held it

    def tally(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            seen[pair] += sign * times[w]
            holders[pair].add(w)

    for w in range(len(words)):
        tally(w, +1)
    merges: list[Pair] = []
    while seen and len(merges) < count:
        best = min(seen, key=lambda pair: (-seen[pair], pair))
        for w in holders.pop(best):
            tally(w, -1)
            words[w] = merge_pair(words[w], best, 256 + len(merges))
            tally(w, +1)
        merges.append(best)
        seen += Counter()  # drops the pairs that are gone
    return merges


class Tokenizer:
    """A byte-level BPE given by its merges.

    merges: pairs of ids; number i makes token 256 + i and may use any token before it.
    Raises ValueError when two merges make the same token.
    """

    def __init__(self, merges: Sequence[Pair]):
        self.merges = list(merges)
        self.merged = {pair: 256 + i for i, pair in enumerate(self.merges)}  # pair -> token; a lower id merges first
        base = [bytes([b]) for b in range(256)]
        for left, right in self.merges:
            base.append(base[left] + base[right])
        if len(set(base)) < len(base):
            raise ValueError("two merges make the same token")

        self.base_size = len(base) + len(CHAT_TOKENS)
        self.special = {name: len(base) + i for i, name in enumerate(CHAT_TOKENS + EXTRA_TOKENS)}
        self.eos_id = self.special["<|im_end|>"]
        self.stop_ids = (self.eos_id,)  # what ends an answer
        self.bos_id = self.eos_id  # Qwen has no token of its own for the beginning; Molmo2 uses the end token
        unnamed = [utf8("\N{REPLACEMENT CHARACTER}")] * (RESERVED - len(EXTRA_TOKENS))
        self.spelling = base + [utf8(name) for name in self.special] + unnamed  # id -> bytes, for all `size` rows
        self._cache: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """Rows of the embedding table: base vocabulary and reserved rows."""
        return self.base_size + RESERVED

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text. Spellings of special tokens in it are just characters, so any user text is safe."""
        return [token for match in PRE_TOKEN.finditer(text) for token in self._encode_word(match[0])]

    def _encode_word(self, word: str) -> list[int]:
        """Merge the pair learned first, again and again; it is the same as replaying all merges in their order."""
        if word in self._cache:
            return self._cache[word]
        ids = list(utf8(word))
        while known := self.merged.keys() & zip(ids, ids[1:]):
            first = min(known, key=self.merged.__getitem__)
            ids = merge_pair(ids, first, self.merged[first])
        if len(self._cache) >= 2**16:
            self._cache.clear()  # words repeat, so starting afresh now and then costs little and bounds the memory
        self._cache[word] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens are written by their spelling; bytes that are no UTF-8, and reserved rows
        without a name, as U+FFFD. Raises ValueError for an id outside the vocabulary."""
        return b"".join(self.spelling[i] for i in self._checked(ids)).decode("utf-8", errors="replace")

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        if outside := [i for i in ids if not 0 <= i < self.size]:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary (0 to {self.size - 1})")
        return ids

    def encode_layout(self, pieces: Iterable[str]) -> list[int]:
        """Ids of a layout: a piece that is exactly a special spelling becomes that token, any other is encoded as text.

        Only for layouts the program wrote itself: a user's text handed in as a piece could forge special tokens.
        """
        return [i for piece in pieces
                for i in ([self.special[piece]] if piece in self.special else self.encode(piece))]

    def chat_prompt(self, user_text: str) -> list[int]:
        """Ids of one user turn, up to where the answer begins. The user's text is encoded as plain text."""
        # "user\n" in front keeps the user's piece from being a special spelling, whatever was typed.
        return self.encode_layout(
            ["<|im_start|>", "user\n" + user_text, "<|im_end|>", "\n", "<|im_start|>", "assistant\n"])

    @classmethod
    def train(cls, texts: Iterable[str], base_size: int) -> "Tokenizer":
        """Learn a vocabulary: 256 bytes + merges + chat tokens = `base_size` rows.

        When the texts are so small that no pair is left to merge, there are fewer rows than asked for: read
        `tokenizer.base_size`. Raises ValueError when `base_size` has no room for the bytes and chat tokens.
        """
        room = base_size - 256 - len(CHAT_TOKENS)
        if room < 0:
            raise ValueError(f"a vocabulary needs at least {256 + len(CHAT_TOKENS)} tokens (the bytes and the chat "
                             f"tokens), not {base_size}")
        return cls(learn_merges(texts, room))

    def save(self, path: str | os.PathLike) -> None:
        """Write a Hugging Face `tokenizer.json`; a file that was there is replaced only once the new one is whole."""
        with command.atomic_write(path) as part:
            part.write_text(json.dumps(file_layout(self), ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a file written by `save`. Raises ValueError naming the file if it is missing or anything else."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            ids = saved["model"]["vocab"]
            tokenizer = cls([(ids[left], ids[right]) for left, right in map(str.split, saved["model"]["merges"])])
            if file_layout(tokenizer) != saved:
                raise ValueError("other settings or another vocabulary than its merges make")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); "
                             "write one with: python tokenizer.py train CORPUS.txt OUT.json") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a tokenizer written by tokenizer.py ({type(error).__name__}: {error}); "
                             "train it again") from error
        return tokenizer


class ReleasedTokenizer(Tokenizer):
    """The tokenizer.json of a released checkpoint, through the `tokenizers` package: same methods, same safety. No added
    token is ever read out of a text, whether the file calls it special or not."""

    def __init__(self, settings: dict, base_size: int, bos: str, eos: str):
        """settings: a parsed tokenizer.json; base_size: rows before the extra tokens; bos, eos: spellings. ImportError
        without the package, ValueError if a special token is missing or has another id than its place says."""
        from tokenizers import Tokenizer as Library  # an extra: requirements-released.txt

        self.settings, self.base_size = settings, base_size
        added = [token | {"special": True} for token in settings.get("added_tokens", [])]
        self.library = Library.from_str(json.dumps(settings | {"added_tokens": added}))
        self.library.encode_special_tokens = True  # their spelling in a text is just characters
        self.library.no_truncation(), self.library.no_padding()  # a file may ask for them
        wanted = {name: base_size + i for i, name in enumerate(EXTRA_TOKENS)}
        for name, i in wanted.items():
            if (found := self.library.token_to_id(name)) not in (i, None):
                raise ValueError(f"{name} has id {found}, the vocabulary of {base_size} rows asks for {i}")
        chat = {name: self.library.token_to_id(name) for name in {*CHAT_TOKENS, bos, eos}}
        if missing := sorted(name for name in {*CHAT_TOKENS[1:], bos, eos} if chat[name] is None):
            raise ValueError(f"the token {missing[0]} is missing")
        self.special = chat | wanted
        self.bos_id, self.eos_id = chat[bos], chat["<|im_end|>"]
        self.stop_ids = (self.eos_id, chat[eos])
        self._names = {i: name for name, i in self.special.items()}
        self._made_of = settings, base_size, bos, eos

    def __reduce__(self):
        """Made anew where a worker process gets it by pickle: the library's own pickle would read special tokens out of text."""
        return type(self), self._made_of, {"stop_ids": self.stop_ids}

    def encode(self, text: str) -> list[int]:
        return self.library.encode(utf8(text).decode("utf-8"), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        parts = []  # special tokens by their names here: Molmo2's files lack the pointing tokens, which the library would leave out
        for special, run in groupby(self._checked(ids), self._names.__contains__):
            parts += [self._names[i] for i in run] if special else [self.library.decode([*run], skip_special_tokens=False)]
        return "".join(parts)

    def save(self, path: str | os.PathLike) -> None:
        with command.atomic_write(path) as part:
            part.write_text(json.dumps(self.settings, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, base_size: int) -> "ReleasedTokenizer":
        """From tokenizer.json and, for bos and eos, tokenizer_config.json in a folder. ValueError names the file."""
        path = beside = Path(folder) / "tokenizer_config.json"
        try:
            said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            spelled = lambda token: token["content"] if isinstance(token, dict) else token
            eos = spelled(said.get("eos_token")) or "<|im_end|>"
            bos = spelled(said.get("bos_token")) or eos
            path = Path(folder) / "tokenizer.json"  # `path` is what an error names
            return cls(json.loads(path.read_text(encoding="utf-8")), base_size, bos, eos)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except ImportError:
            raise ValueError("released checkpoints need the package tokenizers: "
                             "pip install -r requirements-released.txt") from None
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"{path}: not a tokenizer of this model ({error})") from None


def byte_symbols() -> list[str]:
    """One visible character for each byte, as in the files of GPT-2: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def file_layout(tokenizer: Tokenizer) -> dict:
    """A tokenizer as the content of a Hugging Face `tokenizer.json`, which the `tokenizers` package loads.

    It gives the same ids for ASCII text, but reads special tokens out of the text, which `encode` never does.
    """
    symbols = byte_symbols()
    names = ["".join(symbols[byte] for byte in token) for token in tokenizer.spelling[:256 + len(tokenizer.merges)]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in tokenizer.special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{names[left]} {names[right]}" for left, right in tokenizer.merges],
        },
    }


def read_corpus(path: Path) -> str:
    """A text file with its line ends as they are. Raises ValueError when it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends in one line on standard error and status 2."""
    with command.one_line("tokenizer.py"):
        parser = command.Parser(prog="tokenizer.py", description="Train or look at a byte-level BPE tokenizer.")
        commands = parser.add_subparsers(dest="command", required=True, parser_class=command.Parser)
        train = commands.add_parser("train", help="learn merges from a UTF-8 text file")
        train.add_argument("corpus", type=Path)
        train.add_argument("out", type=Path)
        train.add_argument("--size", type=int, default=512, help="rows of the base vocabulary (default %(default)s)")
        show = commands.add_parser("show", help="print the pieces of a text")
        show.add_argument("tokenizer", type=Path)
        show.add_argument("text")
        args = parser.parse_args(arguments)
        if args.command == "train":
            tokenizer = Tokenizer.train([read_corpus(args.corpus)], args.size)
            tokenizer.save(args.out)
            print(f"{args.out}: {tokenizer.base_size} tokens, {len(tokenizer.merges)} of them from merges")
        else:
            tokenizer = Tokenizer.load(args.tokenizer)
            for i in tokenizer.encode(args.text):
                print(f"{i:6d}  {tokenizer.decode([i])!r}")


if __name__ == "__main__":
    main()
