"""Logits, features and gradient norms are the public code's, for its three kinds of block and both heads."""

import torch


def _close(ours, theirs, relative):
    worst = (ours - theirs).abs().max().item()
    assert worst <= relative * theirs.abs().max().item(), worst


def test_logits_and_all_four_features_agree_to_1e_5_of_the_largest_value(golden):
    model = golden.build()
    with torch.no_grad():
        features = model.forward_stages(golden.image)
        logits = model(golden.image)
    for index, feature in enumerate(features):
        _close(feature, golden.expected[f"stage{index}"], 1e-5)
    _close(logits, golden.expected["logits"], 1e-5)


def test_every_gradient_norm_agrees(golden, cotangent):
    model = golden.build()
    logits = model(golden.image)
    (logits * cotangent(logits.shape)).sum().backward()
    # The official entries of the gradients: put them where the weights were and ask for the official layout.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    from pretrain.models import official

    gradients = official.state_dict(model)
    expected = {
        key.removeprefix("grad_norm/"): v.item() for key, v in golden.expected.items() if key.startswith("grad_norm/")
    }
    assert set(expected) == {key for key in gradients if "running" not in key and "num_batches" not in key}
    largest = max(expected.values())
    for key, norm in expected.items():
        assert abs(gradients[key].norm().item() - norm) <= 1e-3 * norm + 1e-6 * largest, key


def test_parameter_count_is_the_stated_one(golden):
    assert sum(parameter.numel() for parameter in golden.build().parameters()) == golden.num_parameters


def test_activation_checkpointing_changes_no_gradient(golden, cotangent):
    gradients = []
    for checkpointing in (False, True):
        model = golden.build(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        logits = model(golden.image)
        (logits * cotangent(logits.shape)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
