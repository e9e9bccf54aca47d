"""Tokens and the text tower."""

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from data_pipeline.errors import UserError
from pretrain.objectives.text import build_text_tower, build_tokenizer
from pretrain.tasks.pretraining.task import TextConfig

FULL = SimpleTokenizer(context_length=20)
TEXTS = ["a photo of a cat", "Grinning face with smiling eyes!", "éàü 日本 🙂", "", "x " * 100]


def test_the_full_vocabulary_is_open_clips():
    assert torch.equal(build_tokenizer(20)(TEXTS), FULL(TEXTS))


@pytest.mark.parametrize("size", [514, 1024, 10000])
def test_a_smaller_vocabulary_writes_every_text_in_its_range(size):
    tokenizer = build_tokenizer(400, size)
    tokens = tokenizer(TEXTS)
    assert tokens.max() == size - 1 and tokens.shape == (5, 400)
    for text, row in zip(TEXTS, tokens.tolist(), strict=True):
        end = row.index(size - 1)
        assert row[0] == size - 2 and not any(row[end + 1 :])
        assert tokenizer.decode(row[1:end]).split() == FULL.decode(FULL.encode(text)).split()
    # The first merges are those of the full vocabulary, so frequent words keep their tokens.
    if size == 10000:
        assert tokenizer.encode("a cat and the dog") == FULL.encode("a cat and the dog")


def test_a_cut_caption_still_ends_with_the_end_token():
    row = build_tokenizer(8, 1024)(["one two three four five six seven eight nine"])[0]
    assert row[-1] == 1023


@pytest.mark.parametrize("size", [513, 49409])
def test_an_impossible_vocabulary_is_refused(size):
    with pytest.raises(UserError, match="vocab_size"):
        build_tokenizer(16, size)


def test_blanked_tokens_are_refused_with_the_key_that_took_their_place():
    assert TextConfig.model_validate({"token_dropout": 0.0}) == TextConfig()  # as finished runs have it
    with pytest.raises(ValueError, match=r"data\.augmentation\.caption_dropout"):
        TextConfig.model_validate({"token_dropout": 0.5})


def test_the_text_vector_ignores_what_follows_the_end():
    torch.manual_seed(0)
    tower = build_text_tower(TextConfig(width=16, layers=2, heads=2, vocab_size=1024), 12, 8).double()
    tokens = build_tokenizer(12, 1024)(["red cat", "a blue dog sleeps"])
    ends = tokens.argmax(1)
    noisy = tokens.clone()
    for row, end in enumerate(ends.tolist()):
        noisy[row, end + 1 :] = torch.randint(1, 1000, (12 - end - 1,))
    torch.testing.assert_close(tower(noisy), tower(tokens))
    changed = tokens.clone()
    changed[0, 1] = 5
    assert not torch.allclose(tower(changed)[0], tower(tokens)[0])
