"""The vocabulary of Transformer-XL (vocab.pkl, vocab.bin or vocab.txt) as a fast tokenizer with the same ids.

transformers 4.35.2 (TransfoXLTokenizer) cleans punctuation, splits as the Moses tokenizer for English does, with
dashes split too, and then writes 5,000.1 as 5 @,@ 000 @.@ 1. The steps below do the same, in the same order, within
the `tokenizers` library. What differs:

- Letters that Unicode has gained since Moses' tables were made count as letters.
- A third apostrophe in a row with single characters between, as in 'a'b'c, is treated as the second is.
- Of several marks after a quotation mark, as in "?!".., only full stops, commas and an ellipsis go before it.
- Decoding undoes the dashes and numbers and closes the space before punctuation and after opening brackets. Quotation
  marks keep the space on both sides, since Moses finds by counting whether one opens or closes; so do ideographs.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import first_line
from .checkpoint import Source, only, read_json

FILES = ("vocab.pkl", "vocab.bin", "vocab.txt")  # in transformers' order
SPECIAL = ("<eos>", "<unk>", "<UNK>", "<formula>", "<S>")  # those of them that a vocabulary has are never split
LONGEST = 2**28  # bytes of a vocabulary: more is none

# Modules whose classes old vocabularies mention: the tokenizer was pickled with all that it held.
KNOWN_MODULES = ("transformers", "tokenizers", "sacremoses", "re", "regex", "vocabulary", "utils")


def vocabulary_tokenizer(source: Source) -> PreTrainedTokenizerFast | None:
    """The source's vocabulary as a tokenizer; None if it has none.

    Raises ValueError if the file is no vocabulary, or holds objects other than containers, strings and numbers.
    """
    path = next((source.folder / name for name in FILES if (source.folder / name).is_file()), None)
    if path is None:
        return None
    about = source.folder / "tokenizer_config.json"
    settings = read_json(about) if about.is_file() else {}
    only(settings, language=("en",))
    symbols, more = read_vocabulary(path)
    settings = more | settings
    if settings.get("delimiter") == "":
        raise ValueError(f"{path} is a vocabulary of characters (its delimiter is ''); only words are converted")
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    if len(ids) != len(symbols):
        raise ValueError(f"{path} has {len(symbols)} symbols, of which only {len(ids)} differ")
    size = source.config.get("vocab_size", len(ids))
    if isinstance(size, int) and len(ids) > size:
        raise ValueError(f"{path} has {len(ids)} symbols; the model's vocab_size is {size}")
    special = [symbol for symbol in SPECIAL if symbol in ids]
    unknown = next((symbol for symbol in ("<unk>", "<UNK>") if symbol in ids), None)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    steps = [normalizers.Lowercase()] if settings.get("lower_case") else []
    tokenizer.normalizer = normalizers.Sequence(steps + [_replace(*rule) for rule in CLEAN + SPLIT])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        # A space before every token but the first: no token starts with a prefix that no text can hold.
        [decoders.WordPiece(prefix="\0", cleanup=False), decoders.Fuse()]
        + [decoders.Replace(Regex(pattern), to) for pattern, to in JOIN]
    )
    tokenizer.add_special_tokens([AddedToken(symbol, normalized=False) for symbol in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        eos_token="<eos>" if "<eos>" in ids else None,
        additional_special_tokens=[symbol for symbol in ("<formula>",) if symbol in ids],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------------------ the files


def read_vocabulary(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The symbols in the order of their ids, and what else the file says of how a text is split.

    vocab.txt holds a symbol a line; the others a pickled tokenizer or its attributes, read without its classes.
    """
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a vocabulary has a few million")
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # and nowhere else: splitlines() knows ten more ends
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip())), {}
    content = _unpickle(path)
    about = content if isinstance(content, dict) else vars(content) if hasattr(content, "__dict__") else {}
    symbols, ids = about.get("idx2sym"), about.get("sym2idx")
    if not symbols and isinstance(ids, dict) and all(type(i) is int for i in ids.values()):
        symbols = sorted(ids, key=ids.__getitem__)
    if not symbols or not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        raise ValueError(f"{path} holds no vocabulary: neither idx2sym, a list of words, nor sym2idx, their numbers")
    if isinstance(ids, dict) and any(ids.get(symbol) != i for i, symbol in enumerate(symbols)):
        raise ValueError(f"{path} contradicts itself: idx2sym and sym2idx number the words differently")
    return symbols, {name: about[name] for name in ("lower_case", "delimiter") if name in about}


def _unpickle(path: Path):
    """The file's content, made of containers, strings and numbers alone, whatever classes it names."""
    refused = f"{path} holds more than a vocabulary, and unpickling that could run any code, so it is not opened"
    content = None
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                content = _Unpickler(file).load()
    except _Foreign as error:
        raise ValueError(f"{refused}: it asks for {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is no vocabulary, or is damaged: {error}") from error
    if content is not None and not isinstance(content, int):
        return content
    try:  # a torch file; old ones begin with a pickled number
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{refused}: {first_line(error)}") from error


class _Foreign(pickle.UnpicklingError):
    """The name of something that no vocabulary is made of."""


class _Unpickler(pickle._Unpickler):
    """Knows containers, and for classes of the tokenizer's time an empty bag of attributes. It imports nothing.

    The one written in Python: that in C makes room for as many objects as a few bytes of a pickle ask for.
    """

    def __init__(self, file):
        super().__init__(file)

        # Classes of this one file, since a pickle may write into the classes that it is given.
        class Bag:
            def __init__(self, *args, **kwargs):
                pass

        class Default(dict):
            def __init__(self, factory=None, *args):
                super().__init__(*args)

        self.bag = Bag
        self.containers = {
            ("collections", "OrderedDict"): dict,
            ("collections", "Counter"): dict,
            ("collections", "defaultdict"): Default,
            ("builtins", "set"): set,
            ("builtins", "int"): int,
            ("builtins", "object"): Bag,
        }

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.containers:
            return self.containers[module, name]
        if module.split(".")[0] in KNOWN_MODULES or (module, name) == ("copyreg", "_reconstructor"):
            return self.bag
        raise _Foreign(f"{module}.{name}")


# ------------------------------------------------------------------------------------------------------ the rules


def _replace(pattern: str, to: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), to)


# Moses' classes end where its Unicode tables did, and leave Han and Hangul out for English.
_OF_MOSES = r"&&[^\p{Han}\p{Hangul}]&&[\x{0}-\x{ffff}]"
LETTER = rf"[[\p{{Alphabetic}}]{_OF_MOSES}]"
ALNUM = rf"[[\p{{Alphabetic}}\p{{Nd}}]{_OF_MOSES}]"
NO_LETTER = f"[^{LETTER}]"
NEITHER = rf"[^\p{{N}}{LETTER}]"
APART = rf"[^\s.'`,\-{ALNUM}]"

# Punctuation in one form: the substitutions of Moses' normalize-punctuation.perl, as sacremoses has them for English.
CLEAN = [
    (r"\r", ""),
    (r"\(", " ("),
    (r"\)", ") "),
    (r" +", " "),
    (r"(?<=\)) (?=[.!:?;,])", ""),
    (r"\( ", "("),
    (r" \)", ")"),
    (r"(?<=\d) (?=%)", ""),
    (r" (?=[:;])", ""),
    (r"`", "'"),
    (r"''", ' " '),
    (r"[„“”]", '"'),
    (r"–", "-"),
    (r"—", " - "),
    (r" +", " "),
    (r"[´‘‚’]", "'"),
    (r"''", '"'),
    (r"…", "..."),
    (r"\u00A0«\u00A0|«\u00A0|«|\u00A0»\u00A0|\u00A0»|»", '"'),
    (r"\u00A0(?=[%:?!;])", ""),
    (r"nº\u00A0", "nº "),
    (r"\u00A0(?=ºC|cm)", " "),
    (r",\u00A0", ", "),
    (r" +", " "),
    *[(r'"\.\.\.', '..."'), (r'",', ',"'), (r'"\.', '."')] * 2,  # a quotation mark goes behind commas and full stops
    (r"(?<=\d)\u00A0(?=\d)", "."),
    (r"\s+", " "),
    (r"[\x00-\x1f]", ""),
    (r"^ | $", ""),
]

# Words before whose full stop no sentence ends, so that it stays theirs: Moses' list for English, and the three that
# count only before a number.
ABBREVIATIONS = (
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con "
    "Corp Cpl DR Dr Drs Ens Gen Gov Hon Hr Hosp Insp Lt MM MR MRS MS Maj Messrs Mlle Mme Mr Mrs Ms Msgr Op Ord Pfc Ph "
    "Prof Pvt Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr St Supt Surg v vs rev Rs Nos Nr Jan Feb Mar Apr Jun Jul Aug Sep "
    "Oct Nov Dec"
)
BEFORE_NUMBERS = "No Art pp"
KEPT = "|".join(
    [
        rf"(?:{ABBREVIATIONS.replace(' ', '|')})\.(?!\S)",
        rf"(?:{BEFORE_NUMBERS.replace(' ', '|')})\.\s+[0-9]",
        rf"(?=\S*{LETTER})\S*\.\S*\.(?!\S)",  # a word with a full stop inside: U.S.
        r"\S+\.\s+\p{Lowercase}",  # the sentence goes on
    ]
)

# Moses' tokenizer.perl for English, then the numbers.
SPLIT = [
    (f"(?={APART})|(?<={APART})", " "),
    (f"(?<={ALNUM})-(?={ALNUM})", " @-@ "),
    (r"(?<!\.)(?=\.\.)|(?<=\.\.)(?!\.)", " "),
    (r"(?<=[^\p{N}]),|,(?=[^\p{N}])|(?<=\p{N}),$", " , "),
    # Moses' rules for an apostrophe take in the character on either side, so that of two around one character the
    # second finds none before it.
    (f"(?<={NO_LETTER})(?<!{NO_LETTER}'{NO_LETTER})'(?={NO_LETTER})", " ' "),
    (f"(?<={NEITHER})'(?={LETTER})|(?<={LETTER})'(?={NO_LETTER})", " ' "),
    (rf"(?<={LETTER})(?<!{LETTER}'{LETTER})'(?={LETTER})|(?<=\p{{N}})'(?=s)", " '"),
    (rf"(?<!\S)(?!{KEPT})\S+?(?<!\.)\K\.(?!\S)", " ."),
    (r"\.' ?$", " . '"),
    (r"(?<=\d),(?=\d)", " @,@ "),
    (r"(?<=\d)\.(?=\d)", " @.@ "),
]

# The way back.
JOIN = [
    (" @-@ ", "-"),
    (r" (?=[,.?!:;\\%}\])]+(?: |$))", ""),
    (r"(?<= [\p{Sc}(\[{¿¡]) |(?<=^[\p{Sc}(\[{¿¡]) ", ""),
    (r" (?='\p{Alphabetic})|(?<=s) (?='(?: |$))", ""),
    (" @,@ ", ","),
    (r" @\.@ ", "."),
]
