"""Tokens and the text tower."""

import open_clip
import pytest
import torch
from objective_samples import make_batch, make_task
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.text import build_text_tower, build_tokenizer, load_text_tower
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


def named(name: str, vocab_size: int = 1024, context: int = 12, dim: int = 24) -> torch.nn.Module:
    return build_text_tower(TextConfig(name=name, vocab_size=vocab_size), context, dim)


def test_a_tower_by_name_is_open_clips_in_shape():
    with torch.device("meta"):
        tower = named("ViT-H-14", vocab_size=49408, context=77, dim=1024)
        whole = open_clip.model.CLIP(**{"quick_gelu": False, **open_clip.get_model_config("ViT-H-14")})
    theirs = {key: value.shape for key, value in whole.state_dict().items() if not key.startswith("visual.")}
    assert all(theirs[key] == value.shape for key, value in tower.state_dict().items())
    siglip = named("ViT-B-16-SigLIP")
    assert siglip(build_tokenizer(12, 1024)(["red cat"])).shape == (1, 24)  # its shape, with CLIP's tokenizer


@pytest.mark.parametrize("name", ["ViT-H-41", "xlm-roberta-base-ViT-B-32"])
def test_a_model_that_is_not_there_or_whose_tower_is_not_open_clips_is_refused(name):
    with pytest.raises(UserError, match=r"near are .*ViT-H-14|would have to be downloaded"):
        named(name)


def test_weights_of_a_whole_model_and_of_a_tower_are_loaded_and_misfits_named(tmp_path):
    torch.manual_seed(1)
    config = {"width": 64, "heads": 2, "layers": 2, "vocab_size": 1024, "context_length": 12}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    clip = open_clip.model.CLIP(24, vision, config)
    custom = open_clip.model.CustomTextCLIP(24, vision, config)
    tokens = build_tokenizer(12, 1024)(["red cat", "a blue dog sleeps"])
    for model in (clip, custom):
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        tower = build_text_tower(TextConfig(width=64, heads=2, layers=2, vocab_size=1024), 12, 24)
        load_text_tower(tower, str(tmp_path / "model.safetensors"))
        torch.testing.assert_close(tower(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
    other = build_text_tower(TextConfig(width=64, heads=2, layers=2, vocab_size=1024), 16, 24)
    with pytest.raises(UserError, match=r"positional_embedding is \[12, 64\] there and \[16, 64\] here"):
        load_text_tower(other, str(tmp_path / "model.safetensors"))
    deeper = build_text_tower(TextConfig(width=64, heads=2, layers=3, vocab_size=1024), 12, 24)
    with pytest.raises(UserError, match=r"it lacks transformer\.resblocks\.2"):
        load_text_tower(deeper, str(tmp_path / "model.safetensors"))


def test_a_frozen_tower_begins_with_its_weights_and_stays_out_of_the_optimizer(tmp_path):
    source = make_task("clip", dtype=torch.float32)
    save_file({f"text.{k}": v + 1 for k, v in source.text.state_dict().items()}, tmp_path / "tower.safetensors")
    shape = {"width": 16, "layers": 1, "heads": 2, "vocab_size": 1024}
    text = {**shape, "weights": str(tmp_path / "tower.safetensors"), "frozen": True}
    task = make_task("clip", dtype=torch.float32, text=text)
    task.begin()
    assert torch.equal(task.text.ln_final.weight, source.text.ln_final.weight + 1)
    assert not any(p.requires_grad for p in task.text.parameters())
    assert task.settings.begins and not source.settings.begins
    task(make_batch(6), StepKeys(0, 0)).total.backward()
    assert task.image.stem.conv1.weight.grad is not None
    with pytest.raises(ValueError, match=r"needs task\.text\.weights"):
        TextConfig(frozen=True)


def test_a_bag_of_words_is_the_mean_of_its_tokens_in_any_order():
    torch.manual_seed(0)
    bag = build_text_tower(TextConfig(kind="bag", vocab_size=1024), 12, 8).double()
    tokens = build_tokenizer(12, 1024)(["red cat", "cat red", "a blue dog sleeps", ""])
    found, weight = bag(tokens), bag.token_embedding.weight
    for row, vector in zip(tokens.tolist(), found, strict=True):
        inside = row[1 : row.index(1023)]
        mean = torch.stack([weight[token] for token in inside]).mean(0) if inside else torch.zeros_like(vector)
        torch.testing.assert_close(vector, mean)
    torch.testing.assert_close(found[0], found[1])
    nothing = bag(torch.zeros(1, 12, dtype=torch.int64))  # a sample without a caption
    assert not nothing.any()
    with pytest.raises(ValueError, match=r"leave task\.text\.name out"):
        TextConfig(kind="bag", name="ViT-H-14")


def test_pretraining_trains_a_bag_of_words_and_its_checkpointing_changes_nothing():
    task = make_task("clip_category", text={"kind": "bag", "vocab_size": 1024})
    task.set_grad_checkpointing()
    task(make_batch(6), StepKeys(0, 0)).total.backward()
    assert task.text.token_embedding.weight.grad.abs().sum() > 0
