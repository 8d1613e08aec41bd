"""Token windows against obvious oracles: a tokenizer whose tokens are the text's bytes shows every cut."""

import hashlib
import struct

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compress import datasets
from compress.datasets import windows
from compress.datasets.windows import MARGIN, calibration_windows, evaluation_windows, fingerprint
from compress.errors import UsageError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = 256, 257


def with_special_tokens(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """`template` is where the text, $A, stands among <s> and </s>."""
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A token is a byte of the text; the ids follow ALPHABET."""
    vocab = {token: index for index, token in enumerate([*ALPHABET, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return with_special_tokens(tokenizer, template)


def byte_tokens(text: str) -> list[int]:
    """The oracle of `byte_tokenizer`, for ASCII."""
    shown = {ord(" "): "Ġ", ord("\n"): "Ċ"}
    return [ALPHABET.index(text.translate(shown)[position]) for position in range(len(text))]


def merging_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE: how a word is cut depends on the whole word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return with_special_tokens(tokenizer, "<s> $A")


def articles(count: int) -> list[str]:
    """Rows as WikiText-2 has them: titles, blank lines, paragraphs; no line twice."""
    rows = []
    for number in range(count):
        rows += ["", f" = Title {number} = \n", "", f" Paragraph {number} is about the number {number * number} . \n"]
    return rows


@pytest.fixture
def corpus(tmp_path):
    """A local WikiText-2 whose test split differs from the train split."""
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    train = articles(300)
    (folder / "wiki.train.raw").write_text("".join(row or " \n" for row in train))
    (folder / "wiki.test.raw").write_text(" = Test = \n \n The tested text . \n")
    return train, tmp_path


def calibrate(corpus_folder, tokenizer, num_samples=8, seq_len=32, seed=0):
    return calibration_windows(
        "wikitext2", tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, data_dir=corpus_folder
    )


def test_evaluation_is_one_string_with_one_bos_and_no_tail(corpus):
    joined = " = Test = \n\n\n\n\n The tested text . \n"
    expected = [BOS, *byte_tokens(joined)]
    answer = evaluation_windows("wikitext2", byte_tokenizer(), seq_len=5, data_dir=corpus[1])
    assert answer.dtype == torch.int64
    assert answer.tolist() == [expected[start : start + 5] for start in range(0, len(expected) - 4, 5)]
    assert len(expected) % 5 != 0


def test_calibration_on_a_file_spreads_over_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.")
    expected = [BOS, *byte_tokens(file.read_text())]
    answer = calibration_windows(
        str(file), byte_tokenizer("<s> $A </s>"), num_samples=3, seq_len=7, seed=5, data_dir=None
    )
    # Six windows fit: the first, the third and the fifth.
    assert answer.tolist() == [expected[0:7], expected[14:21], expected[28:35]]


def test_calibration_is_seeded(corpus):
    tokenizer = byte_tokenizer()
    first, again, other = (calibrate(corpus[1], tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (8, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(window) for window in first.tolist()}) > 4


def test_windows_are_those_of_the_uncut_text(corpus):
    rows, folder = corpus
    tokenizer = merging_tokenizer("".join(rows))
    whole = datasets.SEPARATOR.join([*rows, *rows])
    for window in calibrate(folder, tokenizer).tolist():
        start = whole.index(tokenizer.decode(window, skip_special_tokens=True))
        assert whole[start - 1] == "\n"
        assert EOS not in window
        assert window == tokenizer(whole[start:])["input_ids"][:32]


def test_only_passages_of_a_large_text_are_tokenized(corpus, monkeypatch):
    rows, folder = corpus
    seen = []
    encode = windows.encode
    monkeypatch.setattr(windows, "encode", lambda tokenizer, text: seen.append(len(text)) or encode(tokenizer, text))
    calibrate(folder, byte_tokenizer(), num_samples=4, seq_len=16)
    assert seen == [windows.CHARACTERS_PER_TOKEN * 16 + MARGIN] * 4
    assert sum(seen) < sum(len(row) for row in rows) / 10


def test_a_tokenizer_that_knows_no_character_ends(corpus):
    mute = with_special_tokens(Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[])), "<s> $A")
    with pytest.raises(UsageError, match=r"^'wikitext2' holds 0 windows of 4 tokens, needed: 1\."):
        calibrate(corpus[1], mute, num_samples=1, seq_len=4)


def test_fingerprint_is_of_shape_and_tokens():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 70000]])
    digest = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 70000)).hexdigest()
    assert fingerprint(tokens) == digest
    assert digest == "049f28e252a33a0399ee5e636ea6b3ca9e9541fe855a02c55d9b6145e415da13"
    assert fingerprint(tokens.view(3, 2)) != digest
    assert fingerprint(tokens.t().contiguous().t()) == digest
