"""The models go through torch.compile as one graph, and answer and learn as they do without it."""

import pytest
import torch

from pretrain.models.randomness import drawing_from


@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.slow, id="eval"), pytest.param(True, id="train, checkpointing")]
)
def test_one_graph_gives_the_logits_and_gradients_of_eager_mode(training, golden, cotangent):
    answers = []
    for compiled in (False, True):
        model = golden.build(drop_path_rate=0.3).train(training).double()
        model.set_grad_checkpointing(training)
        torch.compiler.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with drawing_from(torch.arange(len(golden.image))):
            logits = run(golden.image.double())
        (logits * cotangent(logits.shape)).sum().backward()
        buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        answers.append((logits, {name: p.grad for name, p in model.named_parameters()} | buffers))
    (expected, eager), (found, graph) = answers
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    largest = max(value.abs().max() for value in eager.values())
    for name, value in eager.items():
        # some gradients are zero but for rounding: those of a key's bias, of a bias before BatchNorm
        assert (graph[name] - value).abs().max() <= 1e-9 * value.abs().max() + 1e-11 * largest, name


@pytest.mark.slow
def test_another_batch_size_runs_through_the_same_graph(golden_t):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(golden_t.build(), fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            image = golden_t.image[:1].expand(batch, -1, -1, -1).contiguous()
            torch.testing.assert_close(run(image), golden_t.build()(image), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
