"""The order is a pure function: every sample once an epoch, blocks respected, seeking cheap."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.hashing import bits, key, permutation, uniforms
from data_pipeline.reading.order.mixture import Mixture, period_counts
from data_pipeline.reading.order.samples import Order, SourceOrder
from data_pipeline.reading.order.share import Share

GOLDEN = [
    [0, 0, 0, 1, 0, 0, 1, 0],
    [95, 95, 95, 67, 95, 95, 67, 95],
    [0, 0, 0, 0, 1, 1, 0, 1],
    [0, 1, 2, 1, 1, 0, 3, 3],
]

sizes_lists = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)


def test_the_generator_is_splitmix64():
    # First outputs of the reference C code (Vigna, splitmix64.c) for seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits(1234567, 5).tolist() == expected


def test_keys_depend_on_every_part_and_on_their_order():
    assert len({key(1, 2), key(2, 1), key(1, 2, 0), key(1), key(2), key(0, 1, 2)}) == 6


def test_uniforms_do_not_depend_on_the_other_positions_and_look_uniform():
    whole = uniforms(7, np.arange(20000), 4)
    assert np.array_equal(uniforms(7, np.array([11, 19999]), 4), whole[[11, 19999]])
    assert np.abs(whole.mean(0) - 0.5).max() < 0.01 and np.abs(whole.var(0) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(whole.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(whole[:-1, 0], whole[1:, 0])[0, 1]) < 0.03


@given(st.integers(0, 2**63), st.integers(0, 300))
def test_a_permutation_holds_each_number_once(stream, count):
    assert sorted(permutation(stream, count).tolist()) == list(range(count))


@settings(max_examples=60)
@given(sizes_lists, st.integers(1, 5), st.integers(0, 5), st.integers(0, 3))
def test_every_sample_once_an_epoch_and_blocks_hold_their_shards(sizes, block_shards, seed, epoch):
    order = SourceOrder(sizes, block_shards=block_shards, seed=seed)
    total = sum(sizes)
    epochs, shards, rows = order.locate(np.arange(epoch * total, (epoch + 1) * total))
    assert set(epochs) == {epoch}
    assert sorted(zip(shards, rows, strict=True)) == [(s, r) for s, size in enumerate(sizes) for r in range(size)]
    appearance = list(dict.fromkeys(shards.tolist()))  # a shard's samples lie within a run of block_shards shards
    for shard in set(appearance):
        places = np.flatnonzero(shards == shard)
        between = set(shards[places[0] : places[-1] + 1].tolist())
        assert len(between) <= 2 * block_shards - 1


@settings(max_examples=30)
@given(sizes_lists, st.integers(1, 4), st.data())
def test_seeking_gives_what_reading_on_gives(sizes, block_shards, data):
    whole = SourceOrder(sizes, block_shards=block_shards, seed=1).locate(np.arange(3 * sum(sizes)))
    asked = data.draw(st.lists(st.integers(0, 3 * sum(sizes) - 1), min_size=1, max_size=8))
    found = SourceOrder(sizes, block_shards=block_shards, seed=1).locate(np.array(asked))
    for column, expected in zip(found, whole, strict=True):
        assert column.tolist() == expected[asked].tolist()


def test_epochs_and_seeds_and_sources_have_orders_of_their_own():
    def first(seed, source, epoch):
        order = SourceOrder([10] * 10, block_shards=3, seed=seed, source=source)
        return tuple(map(tuple, np.stack(order.locate(np.arange(epoch * 100, epoch * 100 + 100))[1:]).T))

    assert len({first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), first(0, 0, 1)}) == 4


def test_the_order_stays_what_it_was():
    # A run resumed with a later version must go on with the same samples: this is the order of the first version.
    order = Order([[3, 4], [5]], [2, 1], block_shards=1, seed=9)
    source, epoch, shard, row = order.locate(np.arange(1000, 1008))
    assert source.tolist() == GOLDEN[0] and epoch.tolist() == GOLDEN[1]
    assert shard.tolist() == GOLDEN[2] and row.tolist() == GOLDEN[3]


def test_replacements_come_from_the_block_first_and_are_a_function_of_the_place():
    order = SourceOrder([4] * 6, block_shards=2, seed=0)
    shards = order.locate(np.arange(24))[1]
    block = set(shards[8:16].tolist())
    near = np.array([order.neighbour(10, n) for n in range(6)])
    assert set(order.locate(near)[1].tolist()) <= block
    again = SourceOrder([4] * 6, block_shards=2, seed=0)
    assert near.tolist() == [again.neighbour(10, n) for n in range(6)]
    far = np.array([order.anywhere(24 + 3, n) for n in range(40)])
    assert set(far // 24) == {1} and len(set(order.locate(far)[1].tolist())) > 2


def test_coming_shards_begin_with_the_block_being_read():
    order = SourceOrder([4] * 9, block_shards=3, seed=0)
    read = order.locate(np.arange(12, 24))[1]
    assert set(order.coming_shards(13, 3)) == set(read.tolist())
    following = order.locate(np.arange(24, 36))[1]
    assert set(order.coming_shards(13, 6)[3:]) == set(following.tolist())
    next_epoch = order.locate(np.arange(36, 48))[1]
    assert set(order.coming_shards(25, 6)) <= set(following.tolist()) | set(next_epoch.tolist())


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 1], [512, 512]), ([3, 1], [768, 256]), ([0.7, 0.2, 0.1], [721, 206, 103]), ([5], [1024])],
)
def test_whole_ratios_are_kept_exactly(weights, counts):
    assert period_counts(weights) == counts


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_weights_are_kept_to_one_in_65536_and_nobody_starves(weights):
    counts = period_counts(weights)
    total, whole = sum(counts), sum(weights)
    assert min(counts) >= 1
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / total - weight / whole) <= (len(weights) + 1) / 65536 + 2e-6


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 5000), st.integers(1, 3000))
def test_a_mixture_gives_each_source_its_indices_in_turn(weights, start, count):
    mixture = Mixture(weights, seed=4)
    sources, indices = mixture.locate(np.arange(start, start + count))
    before, after = mixture.consumed(start), mixture.consumed(start + count)
    for number in range(len(weights)):
        assert indices[sources == number].tolist() == list(range(before[number], after[number]))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_of_all_ranks_make_the_global_batch(world):
    for step in (0, 5):
        for micro in range(2):
            parts = [Share(24, 2, rank, world).positions(step, micro) for rank in range(world)]
            assert np.concatenate(parts).tolist() == list(range(step * 24 + micro * 12, step * 24 + micro * 12 + 12))


def test_a_batch_that_does_not_divide_names_batches_that_do():
    with pytest.raises(UserError, match=r"training.batch_size 10 .* = 4: take 8 or 12"):
        Share(10, 2, 0, 2)


def test_seeking_in_427_million_samples_takes_under_a_second_and_little_memory():
    shards = 42700
    tracemalloc.start()
    began = time.perf_counter()
    order = Order([np.full(shards, 10000)], [1.0], block_shards=16, seed=0)
    found = order.locate(np.arange(29 * 427_000_000 + 123_456_789, 29 * 427_000_000 + 123_456_789 + 4096))
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 50e6
    assert len(set(found.shard.tolist())) == 16 and set(found.epoch.tolist()) == {29}
